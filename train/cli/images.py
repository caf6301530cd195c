"""`alextrain predict`, `features` and `search`: what a network computes for images."""

from __future__ import annotations

from pathlib import Path

import click

from prep.console import UserError, WrongArgument, count_noun, json_option, print_json, print_line, say
from prep.files import output_file
from prep.store.manifest import Store
from train.cli.options import (
    checkpoint_option,
    gpus_option,
    index_option,
    max_pixels_option,
    precision_option,
    run_argument,
    run_store_option,
)
from train.config.architecture import LAYERS
from train.config.choices import PREDICT_VIEWS

# Largest number of photographs for `search`, which draws a row for each photograph. A sheet with many more rows would
# be too large for matplotlib.
MAX_SHEET_ROWS = 100

images_argument = click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))


@click.command()
@run_argument
@images_argument
@click.option(
    "--views",
    type=click.Choice(PREDICT_VIEWS),
    default="10",
    show_default=True,
    help="Crops over which the softmax is averaged: 1 (centre) or 10 (corners and centre, and their mirror images).",
)
@click.option(
    "--top", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Number of classes to print."
)
@max_pixels_option
@checkpoint_option
@gpus_option
@precision_option
@json_option
def predict(
    run_dir: Path,
    images: tuple[Path, ...],
    views: str,
    top: int,
    max_pixels: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """Print the most probable classes of photographs.

    The photographs are preprocessed like the images of the training store. If a file cannot be used, the command prints
    an error, continues with the other photographs, and ends with exit code 1.

    \b
    Example:
      alextrain predict run cat.jpg
      alextrain predict run/best.pt *.jpg --views 1 --json
    """
    from train.evaluation.predict import (
        load_photographs,
        refuse_bad_photographs,
        report_bad_photograph,
        top_predictions,
    )
    from train.evaluation.trained_run import TrainedRun

    trained = TrainedRun.open(run_dir, None, gpus, precision, checkpoint)
    errors = []
    for path, square in load_photographs(images, trained.transform, max_pixels):
        if isinstance(square, UserError):
            errors.append(square)
            report_bad_photograph(path, square, len(images), as_json)
            continue
        predictions = top_predictions(trained.network, trained.transform, square, int(views), top, precision)
        names = [trained.classes[label] for label in predictions.labels]
        ranked = list(zip(names, predictions.probabilities, strict=True))
        if as_json:
            guesses = [{"class": name, "probability": p} for name, p in ranked]
            print_json({"image": str(path), "views": int(views), "step": trained.checkpoint.step, "guesses": guesses})
        else:
            print_line(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in ranked))
    refuse_bad_photographs(errors, len(images))


@click.command()
@run_argument
@click.option(
    "--layer", type=click.Choice(LAYERS), default="fc7", show_default=True, help="Layer whose activations are written."
)
@run_store_option
@click.option("--split", default="val", show_default=True, help="Split of the store whose images are used.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=output_file(".npy", kind="features are written as"),
    metavar="FILE.npy",
    help="File for the activations.  [default: RUN_DIR/features-LAYER-SPLIT.npy]",
)
@checkpoint_option
@gpus_option
@precision_option
@json_option
def features(
    run_dir: Path,
    layer: str,
    store: Path | None,
    split: str,
    out: Path | None,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """Write the activations of a layer for every image of a split to a float32 .npy file, with one row per image.

    A second file, .keys.txt, has a line for each row: key, class and source path of the image. The activations are
    those of the centre crop, after the nonlinearity (for fc8: the logits). In a row, the activations of the network's
    column 0 come before those of column 1.

    \b
    Example:
      alextrain features run --layer fc7
      alextrain features run --layer fc7 --store store --split val --out fc7.npy
    """
    if store is not None:
        Store.open(store).split(split)
    from train.evaluation.features import keys_path, write_features
    from train.evaluation.trained_run import TrainedRun

    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    out = out or trained.run_dir / f"features-{layer}-{split}.npy"
    shape = write_features(trained.network, trained.require_store(split), split, layer, out, precision)
    if as_json:
        print_json({"out": str(out), "keys": str(keys_path(out)), "layer": layer, "split": split, "shape": list(shape)})
    else:
        print_line(f"{out}: {layer} of {count_noun(shape[0], 'image')}, {' × '.join(map(str, shape))}")


@click.command()
@run_argument
@images_argument
@run_store_option
@click.option(
    "--count",
    type=click.IntRange(1),
    default=6,
    show_default=True,
    metavar="N",
    help="Number of training images to find for each photograph.",
)
@index_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=output_file(".png", ".svg", kind="a figure is"),
    metavar="FILE.png|.svg",
    help="File for the sheet of images.  [default: RUN_DIR/search.png]",
)
@max_pixels_option
@checkpoint_option
@gpus_option
@precision_option
@json_option
def search(
    run_dir: Path,
    images: tuple[Path, ...],
    store: Path | None,
    count: int,
    index_records: int,
    out: Path | None,
    max_pixels: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """For each photograph, find the training images with the nearest fc7 activations, and draw the images on a sheet.

    If a file cannot be used, the command prints an error and ends with exit code 1. The sheet then shows the other
    photographs.

    \b
    Example:
      alextrain search run cat.jpg
      alextrain search run *.jpg --store store --json --out nearest.svg
    """
    from prep.plot_style import figure_format, render_figure
    from train.evaluation.predict import refuse_bad_photographs, report_bad_photograph
    from train.evaluation.trained_run import TrainedRun
    from train.report.plots_images import draw_neighbors, neighbors_inches
    from train.report.search import search as find_nearest
    from train.report.style import save_figure, with_caption

    format = "png" if out is None else figure_format(out, "--out")
    if len(images) > MAX_SHEET_ROWS:
        raise WrongArgument(f"{len(images)} photographs: a sheet holds {MAX_SHEET_ROWS} at most. Name fewer.")
    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    sheet = out or trained.run_dir / "search.png"
    results, errors = find_nearest(trained, images, count, index_records, max_pixels)
    for path, error in errors.items():
        report_bad_photograph(path, error, len(images), as_json)
    if not results:
        refuse_bad_photographs(list(errors.values()), len(images))
    rows = [result.row for result in results.values()]
    # A small index may have fewer than `count` images.
    size_inches = neighbors_inches(len(rows), len(rows[0].neighbors))
    caption = (
        f"Left: photographs. Right: the {len(rows[0].neighbors)} training images with the nearest fc7 activations, "
        "each with its class and distance."
    )
    draw, size_inches = with_caption(lambda figure: draw_neighbors(figure, rows, trained.classes), size_inches, caption)
    save_figure(render_figure(draw, size_inches, format), sheet)
    say(f"Drawn: {sheet}")
    for path, result in results.items():
        if as_json:
            print_json({"image": str(path), "step": trained.checkpoint.step, "nearest": result.nearest})
        else:
            texts = [f"{n['class']} {n['source'] or n['key']} ({n['distance']:.3g})" for n in result.nearest]
            print_line(f"{path}: {', '.join(texts)}")
    refuse_bad_photographs(list(errors.values()), len(images))

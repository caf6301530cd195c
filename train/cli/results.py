"""`alextrain figures`, `report`, `predict`, `features` and `search`: commands that show what a run has learned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import UserError, WrongArgument, count_noun, json_option, one_line, print_json, say, store_option
from prep.plot_style import FORMATS
from prep.store.manifest import Store
from train.cli.options import checkpoint_option, gpus_option, max_pixels_option, precision_option, run_argument
from train.config.architecture import LAYERS
from train.config.choices import INDEX_RECORDS, PREDICT_VIEWS

if TYPE_CHECKING:
    from train.evaluation.trained_run import TrainedRun

MAX_SHEET_ROWS = 100  # maximum number of photographs for `search`; matplotlib cannot draw a sheet with far more rows

images_argument = click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
image_store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="ALEXNET_STORE",
    show_envvar=True,
    help="Folder of the store whose images are shown.  [default: the training store, if it still exists]",
)
image_split_option = click.option(
    "--split", default="val", show_default=True, help="Split whose images are shown and whose errors are counted."
)
index_option = click.option(
    "--index",
    "index_records",
    type=click.IntRange(1),
    default=INDEX_RECORDS,
    show_default=True,
    metavar="N",
    help="Maximum number of training images to search through.",
)
image_seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random choice of images to show."
)


def _figure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add to `command` the argument and the options that `figures` and `report` share."""
    options = (run_argument, image_store_option, image_split_option, image_seed_option, index_option)
    for option in reversed((*options, checkpoint_option, gpus_option, precision_option)):
        command = option(command)
    return command


@click.command()
@_figure_options
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Folder for the figures.  [default: RUN_DIR]"
)
@click.option(
    "--format", type=click.Choice(FORMATS), default="png", show_default=True, help="File format of the figures."
)
@json_option
def figures(
    run_dir: Path,
    store: Path | None,
    split: str,
    seed: int,
    index_records: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    out: Path | None,
    format: str,
    as_json: bool,
) -> None:
    """Draw figures of a run: learning curves, kernels, colour axes, predictions, nearest images, feature maps, errors.

    Without a store, the figures that need images are left out.

    \b
    Example:
      alextrain figures run
      alextrain figures run --store store --format svg --out figures
    """
    from prep.plot_style import render_figure
    from train.evaluation.trained_run import TrainedRun
    from train.report.figures import run_figures
    from train.report.style import save_figure

    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    folder = out or trained.run_dir
    _make_folder(folder)
    names = []
    for figure in run_figures(trained, split, seed, index_records):
        path = folder / f"{figure.name}.{format}"
        save_figure(render_figure(figure.draw, figure.size_inches, format), path)
        names.append(path.name)
    _print_omitted_figures(trained, split)
    if as_json:
        print_json({"out": str(folder), "files": names, "step": trained.checkpoint.step})
    else:
        say(f"Drawn into {folder}: {', '.join(names)}")


def _print_omitted_figures(trained: TrainedRun, split: str) -> None:
    left_out = "so figures of images, feature maps and errors per class are left out"
    if trained.store is None:
        say(f"The training store was moved, removed or rebuilt, {left_out}. Name a store with --store.")
    elif split not in trained.store.splits:
        say(f"{trained.store.root} has no split {split}, {left_out}.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}. Name another folder.") from None


@click.command()
@_figure_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="File for the report.  [default: RUN_DIR/report.html]",
)
@json_option
def report(
    run_dir: Path,
    store: Path | None,
    split: str,
    seed: int,
    index_records: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write a report of a run: errors, all figures, the recipe with its sources, store, software and throughput.

    The report is one HTML file, which can be read offline.

    \b
    Example:
      alextrain report run --store store
    """
    from train.evaluation.trained_run import TrainedRun
    from train.report.html import write_report

    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    path = out or trained.run_dir / "report.html"
    size_bytes = write_report(trained, path, split, seed, index_records)
    _print_omitted_figures(trained, split)
    if as_json:
        print_json({"out": str(path), "bytes": size_bytes, "step": trained.checkpoint.step})
    else:
        say(f"Written: {path}, {size_bytes / 1e6:.1f} MB")


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

    The photographs are prepared like the images of the training store. For a file that cannot be used, an error is
    printed, the other photographs follow, and the exit code is 1.

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
            click.echo(one_line(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in ranked)))
    refuse_bad_photographs(errors, len(images))


@click.command()
@run_argument
@click.option(
    "--layer", type=click.Choice(LAYERS), default="fc7", show_default=True, help="Layer whose activations are written."
)
@store_option
@click.option("--split", default="val", show_default=True, help="Split of the store whose images are used.")
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, metavar="FILE.npy", help="File for the activations."
)
@checkpoint_option
@gpus_option
@precision_option
@json_option
def features(
    run_dir: Path,
    layer: str,
    store: Path,
    split: str,
    out: Path,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """Write a layer's activations for every image of a split to a float32 .npy file, with one row per image.

    A second file, .keys.txt, has a line for each row: key, class and source path of the image. The activations are
    computed for the centre crop, and taken after the nonlinearity (fc8: the logits). In a row, the network's column 0
    comes before column 1.

    \b
    Example:
      alextrain features run --layer fc7 --store store --split val --out fc7.npy
    """
    Store.open(store).split(split)
    from train.evaluation.features import keys_path, write_features
    from train.evaluation.trained_run import TrainedRun

    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    shape = write_features(trained.network, trained.require_store(split), split, layer, out, precision)
    if as_json:
        print_json({"out": str(out), "keys": str(keys_path(out)), "layer": layer, "split": split, "shape": list(shape)})
    else:
        click.echo(f"{out}: {layer} of {count_noun(shape[0], 'image')}, {' × '.join(map(str, shape))}")


@click.command()
@run_argument
@images_argument
@image_store_option
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
    """For each photograph, find the training images with the nearest fc7 activations, and draw them on a sheet.

    For a file that cannot be used, an error is printed, and the exit code is 1. The sheet has the other photographs.

    \b
    Example:
      alextrain search run cat.jpg --store store
      alextrain search run *.jpg --store store --json --out nearest.svg
    """
    from prep.plot_style import figure_format, render_figure
    from train.evaluation.predict import refuse_bad_photographs, report_bad_photograph
    from train.evaluation.trained_run import TrainedRun
    from train.report.plots_images import draw_neighbors, neighbors_inches
    from train.report.search import search as find_nearest
    from train.report.style import save_figure

    format = "png" if out is None else figure_format(out, "--out")
    if len(images) > MAX_SHEET_ROWS:
        raise WrongArgument(f"{len(images)} photographs: a sheet holds {MAX_SHEET_ROWS}. Name fewer photographs.")
    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    sheet = out or trained.run_dir / "search.png"
    results, errors = find_nearest(trained, images, count, index_records, max_pixels)
    for path, error in errors.items():
        report_bad_photograph(path, error, len(images), as_json)
    if not results:
        refuse_bad_photographs(list(errors.values()), len(images))
    rows = [result.row for result in results.values()]
    size_inches = neighbors_inches(len(rows), len(rows[0].neighbors))  # a small index has fewer than `count` images
    save_figure(render_figure(lambda figure: draw_neighbors(figure, rows, trained.classes), size_inches, format), sheet)
    say(f"Drawn: {sheet}")
    for path, result in results.items():
        if as_json:
            print_json({"image": str(path), "step": trained.checkpoint.step, "nearest": result.nearest})
        else:
            texts = [f"{n['class']} {n['source'] or n['key']} ({n['distance']:.3g})" for n in result.nearest]
            click.echo(one_line(f"{path}: {', '.join(texts)}"))
    refuse_bad_photographs(list(errors.values()), len(images))

"""`alextrain figures`, `report`, `predict`, `features`, `search`: what a run learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from prep.console import UserError, count_noun, json_option, one_line, print_json, say, store_option
from prep.store.manifest import Store
from train.cli.options import checkpoint_option, gpus_option, precision_option
from train.config.architecture import LAYERS
from train.config.choices import FIGURE_FORMATS, INDEX_RECORDS, PREDICT_VIEWS

SHEET_ROWS = 100  # photographs on a sheet: of more, matplotlib cannot draw it

run_argument = click.argument("run_dir", type=click.Path(path_type=Path))
images_argument = click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(path_type=Path))
seen_store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="ALEXNET_STORE",
    show_envvar=True,
    help="Folder of the store whose pictures are shown.  [default: the training store, where it still is]",
)
split_option = click.option("--split", default="val", show_default=True, help="Which split's pictures.")
index_option = click.option(
    "--index",
    "most",
    type=click.IntRange(1),
    default=INDEX_RECORDS,
    show_default=True,
    metavar="N",
    help="Training pictures to search at the most.",
)
shown_seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Of which pictures are shown."
)


def _looks(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of a command that looks at a run's pictures."""
    options = (run_argument, seen_store_option, split_option, shown_seed_option, index_option)
    for option in reversed((*options, checkpoint_option, gpus_option, precision_option)):
        command = option(command)
    return command


@click.command()
@_looks
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Where they go.  [default: RUN_DIR]")
@click.option("--format", type=click.Choice(FIGURE_FORMATS), default="png", show_default=True, help="Of each file.")
@json_option
def figures(
    run_dir: Path,
    store: Path | None,
    split: str,
    seed: int,
    most: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    out: Path | None,
    format: str,
    as_json: bool,
) -> None:
    """Draw what a run learnt: curves, kernels, guesses, nearest pictures, feature maps, errors per class, colour axes.

    Without a store those that look at photographs are left out.

    \b
    Example:
      alextrain figures run
      alextrain figures run --store store --format svg --out pictures
    """
    from train.report.gallery import Trained, plates
    from train.report.style import rendered, save

    trained = Trained.open(run_dir, store, gpus, precision, checkpoint)
    folder = out or trained.run_dir
    _make(folder)
    drawn = []
    for plate in plates(trained, split, seed, most):
        path = folder / f"{plate.name}.{format}"
        save(rendered(plate.draw, plate.size, format), path)
        drawn.append(path.name)
    _say_left_out(trained, split)
    if as_json:
        print_json({"out": str(folder), "files": drawn, "step": trained.state.step})
    else:
        say(f"Drawn into {folder}: {', '.join(drawn)}")


def _say_left_out(trained: Any, split: str) -> None:
    if trained.store is None:
        say("No store to look at, so no photographs, errors per class and feature maps. Name one with --store.")
    elif split not in trained.store.splits:
        say(f"{trained.store.root} has no split {split}, so no photographs, errors per class and feature maps.")


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}. Name another.") from None


@click.command()
@_looks
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.html", help="The page.  [default: RUN_DIR/report.html]"
)
@json_option
def report(
    run_dir: Path,
    store: Path | None,
    split: str,
    seed: int,
    most: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write one page about a run: its errors, all its pictures, its recipe with sources, store, machine, throughput.

    The page is one HTML file that needs no network and no other file.

    \b
    Example:
      alextrain report run --store store
    """
    from train.report.gallery import Trained
    from train.report.html import write_report

    trained = Trained.open(run_dir, store, gpus, precision, checkpoint)
    path = out or trained.run_dir / "report.html"
    size = write_report(trained, path, split, seed, most)
    _say_left_out(trained, split)
    if as_json:
        print_json({"out": str(path), "bytes": size, "step": trained.state.step})
    else:
        say(f"Written: {path}, {size / 1e6:.1f} MB")


@click.command()
@run_argument
@images_argument
@click.option(
    "--views",
    type=click.Choice(PREDICT_VIEWS),
    default="10",
    show_default=True,
    help="The centre, or ten views; the softmax is averaged.",
)
@click.option("--top", type=click.IntRange(1), default=5, show_default=True, metavar="N", help="Classes to name.")
@checkpoint_option
@gpus_option
@precision_option
@json_option
def predict(
    run_dir: Path,
    images: tuple[Path, ...],
    views: str,
    top: int,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """The most probable classes of photographs, prepared as the records of the training store were.

    \b
    Example:
      alextrain predict run cat.jpg
      alextrain predict run/best.pt *.jpg --views 1 --json
    """
    from train.evaluation.predict import load_photograph, top_predictions
    from train.report.gallery import Trained

    trained = Trained.open(run_dir, None, gpus, precision, checkpoint)
    for path in images:
        square = load_photograph(path, trained.eye)
        said = top_predictions(trained.model, trained.eye, square, int(views), top, precision)
        both = zip([trained.classes[label] for label in said.labels], said.probabilities, strict=True)
        if as_json:
            guesses = [{"class": name, "probability": p} for name, p in both]
            print_json({"image": str(path), "views": int(views), "step": trained.state.step, "guesses": guesses})
        else:
            click.echo(one_line(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in both)))


@click.command()
@run_argument
@click.option("--layer", type=click.Choice(LAYERS), default="fc7", show_default=True, help="Whose activations.")
@store_option
@click.option("--split", default="val", show_default=True, help="Which split.")
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE.npy", help="Where they go.")
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
    """Write a layer's activations for every image of a split: float32 .npy, and a .keys.txt with a line for each row.

    They are of the centre view, after the nonlinearity (fc8: the logits), both columns' side by side.

    \b
    Example:
      alextrain features run --layer fc7 --store store --split val --out fc7.npy
    """
    Store.open(store).split(split)
    from train.evaluation.features import keys_path, write_features
    from train.report.gallery import Trained

    trained = Trained.open(run_dir, store, gpus, precision, checkpoint)
    shape = write_features(trained.model, trained.looked_at(split), split, layer, out, precision)
    if as_json:
        print_json({"out": str(out), "keys": str(keys_path(out)), "layer": layer, "split": split, "shape": list(shape)})
    else:
        click.echo(f"{out}: {layer} of {count_noun(shape[0], 'image')}, {' × '.join(map(str, shape))}")


@click.command()
@run_argument
@images_argument
@seen_store_option
@click.option("--count", type=click.IntRange(1), default=6, show_default=True, metavar="N", help="Pictures to find.")
@index_option
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE.png|.svg", help="The sheet.  [default: RUN_DIR/search.png]"
)
@checkpoint_option
@gpus_option
@precision_option
@json_option
def search(
    run_dir: Path,
    images: tuple[Path, ...],
    store: Path | None,
    count: int,
    most: int,
    out: Path | None,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    as_json: bool,
) -> None:
    """Find the training pictures nearest to photographs in the space of fc7, and draw them as a sheet.

    \b
    Example:
      alextrain search run cat.jpg --store store
      alextrain search run *.jpg --store store --json --out nearest.svg
    """
    from train.report.gallery import Trained
    from train.report.plots_images import nearest_rows, rows_size
    from train.report.search import search as find
    from train.report.style import format_of, rendered, save

    format = "png" if out is None else format_of(out)
    if len(images) > SHEET_ROWS:
        raise UserError(f"{len(images)} photographs: a sheet holds {SHEET_ROWS}. Name fewer at a time.")
    trained = Trained.open(run_dir, store, gpus, precision, checkpoint)
    sheet = out or trained.run_dir / "search.png"
    found = find(trained, images, count, most)
    rows = [row for row, _ in found]
    size = rows_size(len(rows), len(rows[0].neighbors))  # a small store may have fewer than were asked for
    save(rendered(lambda figure: nearest_rows(figure, rows, trained.classes), size, format), sheet)
    say(f"Drawn: {sheet}")
    for path, (_, near) in zip(images, found, strict=True):
        if as_json:
            print_json({"image": str(path), "step": trained.state.step, "nearest": near})
        else:
            told = ", ".join(f"{one['class']} {one['source'] or one['key']} ({one['distance']:.3g})" for one in near)
            click.echo(one_line(f"{path}: {told}"))

"""`alextrain figures` and `report`: results of a run as figures and as one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import UserError, did_you_mean, json_option, print_json, say
from prep.files import check_output_folder, output_file
from prep.plot_style import FORMATS
from train.cli.options import (
    checkpoint_option,
    gpus_option,
    index_option,
    precision_option,
    run_argument,
    run_store_option,
)

if TYPE_CHECKING:
    from train.evaluation.trained_run import TrainedRun


image_split_option = click.option(
    "--split", default="val", show_default=True, help="Split whose images are shown and on which errors are measured."
)
no_images_option = click.option(
    "--no-images", is_flag=True, help="Draw no images of a store, and leave out the figures that need images."
)
image_seed_option = click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the random choice of images to show."
)


def _figure_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add to `command` the argument and the options that `figures` and `report` share."""
    options = (run_argument, run_store_option, image_split_option, image_seed_option, index_option)
    for option in reversed((*options, no_images_option, checkpoint_option, gpus_option, precision_option)):
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
    no_images: bool,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    out: Path | None,
    format: str,
    as_json: bool,
) -> None:
    """Draw figures of a run: learning curves, kernels, colour axes, predictions, nearest images, feature maps, errors.

    If there is no store, the figures that need images are left out, and the exit code is 1. With --no-images, these
    figures are also left out, but the exit code is 0.

    \b
    Example:
      alextrain figures run
      alextrain figures run --store store --format svg --out figures
      alextrain figures run --no-images
    """
    from prep.plot_style import render_figure
    from train.report.figures import run_figures
    from train.report.style import save_figure, with_caption

    trained = _open_run(run_dir, store, gpus, precision, checkpoint, no_images)
    folder = out or trained.run_dir
    _make_folder(folder)
    names = []
    for figure in run_figures(trained, split, seed, index_records):
        path = folder / f"{figure.name}.{format}"
        draw, size_inches = with_caption(figure.draw, figure.size_inches, f"{figure.title}. {figure.caption}")
        save_figure(render_figure(draw, size_inches, format), path)
        names.append(path.name)
    if as_json:
        print_json({"out": str(folder), "files": names, "step": trained.checkpoint.step})
    else:
        say(f"Drawn into {folder}: {', '.join(names)}")
    if not no_images:
        _check_complete(trained, split)


def _open_run(
    run_dir: Path, store: Path | None, gpus: str | None, precision: str, checkpoint: str, no_images: bool
) -> TrainedRun:
    """Return the run to draw. With `no_images`, the run is returned without its store.

    Raises UserError for a damaged run.json, before a figure is written.
    """
    from dataclasses import replace

    from train.evaluation.trained_run import TrainedRun
    from train.runs.run_dir import read_description

    trained = TrainedRun.open(run_dir, store, gpus, precision, checkpoint)
    read_description(trained.run_dir)
    return replace(trained, store=None) if no_images else trained


def _check_complete(trained: TrainedRun, split: str) -> None:
    """Raise UserError if the figures that need images had to be left out."""
    left_out = "Figures of images, feature maps and errors per class are left out"
    advice = "Name a store with --store, or pass --no-images"
    if trained.store is None:
        from train.runs.training_store import saved_store_path

        where = saved_store_path(trained.description)
        raise UserError(f"{left_out}: the training store {where} was moved, removed or rebuilt. {advice}.")
    if split not in trained.store.splits:
        splits = list(trained.store.splits)
        raise UserError(
            f"{left_out}: {trained.store.root} has no split {split}, only {' and '.join(splits)}. Name another --split."
            + did_you_mean(split, splits)
        )


def _make_folder(folder: Path) -> None:
    check_output_folder(folder, "--out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror}. Name another folder.") from None


@click.command()
@_figure_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=output_file(".html", ".htm", kind="a report is"),
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
    no_images: bool,
    checkpoint: str,
    gpus: str | None,
    precision: str,
    out: Path | None,
    as_json: bool,
) -> None:
    """Write a report of a run: errors, all figures, the recipe with its sources, store, software and throughput.

    The report is one HTML file, which can be read offline. If there is no store, the figures that need images are left
    out, and the exit code is 1. With --no-images, these figures are also left out, but the exit code is 0.

    \b
    Example:
      alextrain report run
      alextrain report run --store store --split val --out report.html
    """
    from train.report.html import write_report

    trained = _open_run(run_dir, store, gpus, precision, checkpoint, no_images)
    path = out or trained.run_dir / "report.html"
    size_bytes = write_report(trained, path, split, seed, index_records)
    if as_json:
        print_json({"out": str(path), "bytes": size_bytes, "step": trained.checkpoint.step})
    else:
        say(f"Written: {path}, {size_bytes / 1e6:.1f} MB")
    if not no_images:
        _check_complete(trained, split)

"""The command `alexprep`: options in, one call, one answer out. No work is done here."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from prep.console import (
    CONTEXT,
    Group,
    answer,
    bytes_text,
    count_noun,
    duration_text,
    json_option,
    progress,
    say,
    store_option,
    usable_cores,
)
from prep.manifest import SPLITS, ColourStats, Settings, Store


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="alexnet")
def main() -> None:
    """Photographs into a store that a stream can read: rescaled, checksummed, in a seeded order.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep pca-stats --store store
    """


@main.command("build-lmdb")
@click.argument("source", type=click.Path(path_type=Path))
@store_option
@click.option("--split", type=click.Choice(SPLITS), help="Which split to build.  [default: each that SOURCE has]")
@click.option(
    "--labels",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Labels of a flat folder: `name label` a line, or ILSVRC's ground truth, one number a line.",
)
@click.option(
    "--label-order",
    type=click.Choice(["sorted", "devkit"]),
    help="What number k of a ground truth means: k-th class name in sorted order, or as the devkit's meta.mat "
    "beside it says.  [default: devkit where meta.mat is there]",
)
@click.option("--side", type=click.IntRange(32, 4096), default=256, show_default=True, help="Shorter side, px.")
@click.option("--keep-aspect", is_flag=True, help="Keep the whole picture, not its central square.")
@click.option("--format", type=click.Choice(["jpeg", "ppm"]), default="jpeg", show_default=True, help="Of each record.")
@click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality.")
@click.option(
    "--filter",
    type=click.Choice(["area", "bilinear", "bicubic", "lanczos"]),
    default="area",
    show_default=True,
    help="Rescaling filter; area enlarges by bicubic.",
)
@click.option(
    "--on-bad",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="A file that is no picture: stop, or leave it out and say so.",
)
@click.option("--jobs", type=click.IntRange(1), metavar="N", help="Worker processes.  [default: all cores]")
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of the order of the records."
)
@json_option
def build_lmdb(
    source: Path,
    store: Path,
    split: str | None,
    labels: Path | None,
    label_order: str | None,
    side: int,
    keep_aspect: bool,
    format: str,
    quality: int,
    filter: str,
    on_bad: str,
    jobs: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Rescale the photographs of SOURCE into a sharded LMDB store.

    SOURCE is a folder with a folder for each class, or a flat folder of photographs with --labels, or holds such
    folders as train/ and val/. A build that was interrupted goes on when the same command is given again.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep build-lmdb /data/val --split val --labels /data/ILSVRC2012_validation_ground_truth.txt
    """
    from prep.build import build_split
    from prep.runners import run_local
    from prep.sources import find_splits, read_source

    settings = Settings(side, keep_aspect, format, quality, filter, seed)
    folders = find_splits(source, split)
    for name, folder in folders.items():
        known = Store.open(store).classes if (store / "manifest.json").exists() else ()
        inputs = read_source(folder, name, labels, label_order, known)
        started = time.monotonic()
        with progress(f"{name}: rescaling", len(inputs.inputs), "pictures") as report:
            built = build_split(inputs, store, settings, jobs or usable_cores(), on_bad == "skip", run_local, report)
        _report_build(built, name, report.done - report.skipped, time.monotonic() - started, as_json)


def _report_build(store: Store, name: str, done: int, seconds: float, as_json: bool) -> None:
    split = store.split(name)
    skipped = split.account["inputs"] - split.records
    if as_json:
        answer(
            {
                "split": name,
                "records": split.records,
                "classes": len(store.classes),
                "skipped": skipped,
                "bytes": split.bytes,
                "seconds": round(seconds, 3),
                "images_per_s": round(done / max(seconds, 1e-9), 1),
                "fingerprint": split.fingerprint,
            }
        )
        return
    click.echo(
        f"{name}: {count_noun(split.records, 'record')} of {count_noun(len(store.classes), 'class', 'classes')}, "
        f"{bytes_text(split.bytes)} in {count_noun(len(split.shards), 'shard')}, fingerprint {split.fingerprint[:16]}"
    )
    converted = ", ".join(f"{n:,} {how}" for how, n in sorted(split.account["converted"].items()))
    if converted:
        click.echo(f"  converted: {converted}")
    if skipped:
        click.echo(
            f"  left out: {count_noun(skipped, 'file')}; {store.root / name / 'inputs.jsonl'} says which and why"
        )
    if done:
        click.echo(f"  {duration_text(seconds)}, {done / max(seconds, 1e-9):,.0f} pictures/s")
    else:
        click.echo("  built before with the same inputs and settings; nothing to do")


@main.command("pca-stats")
@store_option
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Which split.")
@click.option(
    "--recompute", is_flag=True, help="Decode the store's records again and compare, instead of reading sums."
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png", help="Draw the components."
)
@json_option
def pca_stats(store: Path, split: str, recompute: bool, plot: Path | None, as_json: bool) -> None:
    """Mean, covariance and principal components of the RGB pixels of a split.

    They come from exact sums that were gathered during the build, and are written to SPLIT/colour.json for the stream.
    With --recompute the stored pictures are decoded instead and the difference is said; the file stays as it is.

    \b
    Example:
      alexprep pca-stats --store store
      alexprep pca-stats --store store --json | jq .stdevs
    """
    from prep.build import write_colour
    from prep.colour import moments_of_records

    opened = Store.open(store)
    if not recompute:
        try:
            write_colour(store / split, opened.split(split))
        except OSError as error:
            say(f"{store / split / 'colour.json'} stays as it is: {error.strerror}.")
    stats = opened.colour(split)
    difference = None
    if recompute:
        with progress(f"{split}: decoding", stats.records, "records") as report:
            again = moments_of_records(opened, split, report)
        difference = max(abs(a - b) for a, b in zip(stats.stdevs, again.stdevs, strict=True))
        stats = again
    if plot is not None:
        from prep.plot import plot_colour

        plot_colour(stats, plot)
        say(f"Drawn: {plot}")
    if as_json:
        answer(asdict(stats))
        return
    _print_stats(stats)
    if difference is not None:
        click.echo(
            f"recomputed from the stored records; the standard deviations of the build differ by at most "
            f"{difference:.4f} grey levels"
            + ("" if opened.settings.format == "ppm" else " (they are of the pixels before JPEG)")
        )


def _print_stats(stats: ColourStats) -> None:
    def row(values: Any, width: int = 10, digits: int = 4) -> str:
        return "".join(f"{v:{width}.{digits}f}" for v in values)

    click.echo(
        f"{stats.records:,} records, {stats.pixels:,} pixels, RGB on the scale 0..{stats.pixel_scale} (grey levels)"
    )
    click.echo(f"mean RGB                {row(stats.mean_rgb, digits=2)}   grey levels")
    for name, values in zip("RGB", stats.covariance, strict=True):
        click.echo(f"covariance {name}            {row(values, digits=1)}   grey levels squared")
    click.echo(f"                        {'PC 1':>10}{'PC 2':>10}{'PC 3':>10}")
    click.echo(f"standard deviation      {row(stats.stdevs, digits=2)}   grey levels (color_pca of the authors' code)")
    click.echo(f"eigenvalue              {row(stats.eigenvalues, digits=1)}   variance, grey levels squared")
    unit = [value / stats.pixel_scale**2 for value in stats.eigenvalues]
    click.echo(
        f"eigenvalue, [0, 1]      {row(unit)}   variance of pixels in [0, 1] (fb.resnet.torch: 0.2175 0.0188 0.0045)"
    )
    for name, values in zip("RGB", stats.eigenvectors, strict=True):
        click.echo(f"eigenvectors {name}          {row(values)}")

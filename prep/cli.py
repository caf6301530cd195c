"""The command `alexprep`: options in, one call, one answer out. No work is done here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import (
    CONTEXT,
    Group,
    UserError,
    answer,
    bytes_text,
    count_noun,
    disk_error,
    duration_text,
    json_option,
    one_line,
    progress,
    say,
    store_option,
    usable_cores,
)
from prep.manifest import FILTERS, FORMATS, SPLITS, Settings, Store
from prep.report import print_stats, report_build, report_forecast

if TYPE_CHECKING:
    from prep.build import Policy
    from prep.runners import Runner
    from prep.sources import Source


@click.group(cls=Group, context_settings=CONTEXT, goes_on=("build-lmdb", "import-caffe", "export-files"))
@click.version_option(package_name="alexnet")
def main() -> None:
    """Photographs into a store that a stream can read: rescaled, checksummed, in a seeded order.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep verify --store store
      alexprep pca-stats --store store

    Exit code 0: done; 1: something to mend; 2: the command was wrong; 3: the disk is full; 130, 143: interrupted.
    """


split_option = click.option(
    "--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Which split."
)
jobs_option = click.option(
    "--jobs", type=click.IntRange(1, 1024), metavar="N", help="Worker processes.  [default: all cores]"
)


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide what a record is, and what happens on the way to it."""
    for option in reversed(
        (
            click.option(
                "--side", type=click.IntRange(32, 4096), default=256, show_default=True, help="Shorter side, px."
            ),
            click.option("--keep-aspect", is_flag=True, help="Keep the whole picture, not its central square."),
            click.option(
                "--format", type=click.Choice(FORMATS), default="jpeg", show_default=True, help="Of each record."
            ),
            click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality."),
            click.option(
                "--filter",
                type=click.Choice(FILTERS),
                default="area",
                show_default=True,
                help="Rescaling filter; area enlarges by bicubic.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**63 - 1),
                default=0,
                show_default=True,
                help="Of the order of the records.",
            ),
            click.option(
                "--on-bad",
                type=click.Choice(["fail", "skip"]),
                default="fail",
                show_default=True,
                help="An input that is no picture: stop, or leave it out and say so.",
            ),
            click.option(
                "--max-bad",
                type=click.IntRange(0),
                metavar="N",
                help="Leave out at most N, then stop (as --on-bad skip).",
            ),
            click.option("--restart", is_flag=True, help="Discard what an unfinished build of the split left."),
            jobs_option,
            json_option,
        )
    ):
        command = option(command)
    return command


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
@click.option("--follow-links", is_flag=True, help="Take symbolic links that lead out of SOURCE.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, how long and how large; build nothing.")
@record_options
def build_lmdb(
    source: Path,
    store: Path,
    split: str | None,
    labels: Path | None,
    label_order: str | None,
    follow_links: bool,
    dry_run: bool,
    jobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Rescale the photographs of SOURCE into a sharded LMDB store.

    SOURCE is a folder with a folder for each class, or a flat folder of photographs with --labels, or a tar archive of
    either (ILSVRC2012_img_train.tar as it is), or holds such as train and val. It is only read. A build that was
    interrupted goes on when the same command is given again.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep build-lmdb /data/ilsvrc --store store --dry-run
      alexprep build-lmdb /data/val --split val --labels /data/ILSVRC2012_validation_ground_truth.txt
    """
    from prep.runners import Workers

    with Workers(jobs or usable_cores(), preload="prep.work") as workers:
        from prep.build import forecast
        from prep.sources import find_splits, read_source

        settings, policy = _settings_and_policy(options)
        for name, path in find_splits(source, split).items():
            found = read_source(path, name, labels, label_order, _known(store), follow_links)
            if dry_run:
                report_forecast(forecast(found, store, settings, workers, policy), name, as_json)
            else:
                _build(found, store, settings, workers, policy, as_json)


def _settings_and_policy(options: dict[str, Any]) -> tuple[Settings, Policy]:
    from prep.build import Policy

    settings = Settings(
        options["side"],
        options["keep_aspect"],
        options["format"],
        options["quality"],
        options["filter"],
        options["seed"],
    )
    skip_bad = options["on_bad"] == "skip" or options["max_bad"] is not None
    return settings, Policy(skip_bad, options["max_bad"], options["restart"])


def _known(store: Path) -> tuple[str, ...]:
    """The classes of a store, none where it is not there yet."""
    return Store.open(store).classes if (store / "manifest.json").exists() else ()


def _build(source: Source, store: Path, settings: Settings, workers: Runner, policy: Policy, as_json: bool) -> None:
    from prep.build import build_split

    started = time.monotonic()
    with progress(f"{source.split}: rescaling", len(source.inputs), "pictures") as report:
        built = build_split(source, store, settings, workers, report, policy)
    report_build(built, source.split, report.done - report.skipped, time.monotonic() - started, as_json)


@main.command("import-caffe")
@click.argument("lmdbs", nargs=-1, required=True, metavar="LMDB...", type=click.Path(path_type=Path))
@store_option
@split_option
@click.option(
    "--classes",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Names of the classes, one a line in the order of the labels (synset_words.txt).",
)
@record_options
def import_caffe(
    lmdbs: tuple[Path, ...],
    store: Path,
    split: str,
    classes: Path | None,
    jobs: int | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Make a split of the Datums in LMDBs that Caffe's convert_imageset wrote.

    Encoded pictures and bare pixels (C,H,W, blue first) are taken through the same steps as photographs; labels stay
    what they are. What Caffe's tool has squashed or compressed stays so: from the photographs a better store is made.

    \b
    Example:
      alexprep import-caffe ilsvrc12_train_lmdb --store store --classes synset_words.txt
      alexprep import-caffe ilsvrc12_val_lmdb --store store --split val
    """
    from prep.caffe import read_datums
    from prep.runners import Workers

    settings, policy = _settings_and_policy(options)
    with Workers(jobs or usable_cores(), preload="prep.work") as workers:
        with progress(f"{split}: listing", 0, "records") as report:
            found = read_datums(lmdbs, split, classes, _known(store), workers, report)
        _build(found, store, settings, workers, policy, as_json)


@main.command("verify")
@store_option
@click.option("--split", type=click.Choice(SPLITS), help="Which split.  [default: all]")
@click.option("--quick", is_flag=True, help="Checksums, digests and counts only: open no picture.")
@jobs_option
@json_option
def verify(store: Path, split: str | None, quick: bool, jobs: int | None, as_json: bool) -> None:
    """Check every record of a store against its checksum and the manifest, and name each fault.

    Pictures are decoded and their colour sums compared with the build's: to the bit for ppm, within what JPEG explains
    for jpeg. Exit code 1 where there is a fault.

    \b
    Example:
      alexprep verify --store store
      alexprep verify --store store --quick --json | jq .faults
    """
    from prep.runners import Workers
    from prep.verify import verify_split

    opened = Store.open(store)
    names = [split] if split else list(opened.splits)
    records = sum(opened.split(name).records for name in names)
    faults, started = [], time.monotonic()
    with Workers(jobs or usable_cores()) as workers, progress("verifying", records, "records") as report:
        for name in names:
            faults += verify_split(opened, name, workers, report, decode=not quick)
    seconds = time.monotonic() - started
    if as_json:
        answer(
            {
                "ok": not faults,
                "splits": names,
                "records": records,
                "seconds": round(seconds, 3),
                "faults": [asdict(fault) for fault in faults],
            }
        )
    else:
        for fault in faults:
            click.echo(one_line(fault.line()))
    if faults:
        raise UserError(
            f"{store}: {count_noun(len(faults), 'fault')}. Move the store away and give its alexprep build-lmdb again."
        )
    if not as_json:
        click.echo(
            f"{store}: {count_noun(records, 'record')} of {' and '.join(names)} as the manifest says, "
            f"{duration_text(seconds)}, {records / max(seconds, 1e-9):,.0f} records/s"
        )


@main.command("inspect")
@store_option
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Where --key looks.")
@click.option("--key", metavar="K", help="One record, by its key.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the record's picture to a file.")
@json_option
def inspect(store: Path, split: str, key: str | None, out: Path | None, as_json: bool) -> None:
    """Say what a store holds: splits, classes, settings, the fate of every input; or one record of it.

    \b
    Example:
      alexprep inspect --store store
      alexprep inspect --store store --key 17 --out picture.jpg
    """
    opened = Store.open(store)
    if key is not None:
        _inspect_record(opened, split, key, out, as_json)
        return
    if out is not None:
        raise UserError(f"--out {out}: of which record? Name it with --key.")
    from prep.look import describe, summary_lines

    if as_json:
        answer(describe(opened))
        return
    for line in summary_lines(opened):
        click.echo(line)


def _inspect_record(store: Store, split: str, key: str, out: Path | None, as_json: bool) -> None:
    from prep.look import find_record
    from prep.manifest import write_atomic
    from prep.runners import Workers

    with Workers(1) as workers:
        shard, datum = find_record(store, split, key, workers)
    if out is not None:
        try:
            write_atomic(out, datum.data)
        except OSError as error:
            raise disk_error(error, f"--out {out}: {error.strerror or error}.") from None
    facts = {
        "shard": shard,
        "key": key.zfill(8),
        "source": datum.source.decode("utf-8", "backslashreplace"),
        "label": datum.label,
        "class": store.classes[datum.label] if datum.label < len(store.classes) else "",
        "width_px": datum.width,
        "height_px": datum.height,
        "bytes": len(datum.data),
        "out": out and str(out),
    }
    if as_json:
        answer(facts)
        return
    for name, value in facts.items():
        if value is not None:
            click.echo(f"{name:10} {value}")


@main.command("export-files")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@store_option
@split_option
@jobs_option
@json_option
def export_files(out: Path, store: Path, split: str, jobs: int | None, as_json: bool) -> None:
    """Write every record of a split to OUT/CLASS/NAME: a folder of images again.

    The files are the stored pictures to the byte, 256 px on the shorter side; the same command again goes on.

    \b
    Example:
      alexprep export-files pictures --store store --split val
    """
    from prep.look import export_split
    from prep.runners import Workers

    opened = Store.open(store)
    records, started = opened.split(split).records, time.monotonic()
    with Workers(jobs or usable_cores()) as workers, progress(f"{split}: writing", records, "files") as report:
        export_split(opened, split, out, workers, report)
    seconds = time.monotonic() - started
    if as_json:
        answer({"split": split, "files": records, "bytes": report.size, "seconds": round(seconds, 3)})
        return
    click.echo(f"{out}: {count_noun(records, 'file')}, {bytes_text(report.size)}, {duration_text(seconds)}")


@main.command("pca-stats")
@store_option
@split_option
@click.option(
    "--recompute", is_flag=True, help="Decode the store's records again and compare, instead of reading sums."
)
@click.option(
    "--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png|.svg", help="Draw the components."
)
@jobs_option
@json_option
def pca_stats(store: Path, split: str, recompute: bool, plot: Path | None, jobs: int | None, as_json: bool) -> None:
    """Mean, covariance and principal components of the RGB pixels of a split.

    They come from exact sums that were gathered during the build, and are written to SPLIT/colour.json for the stream.
    With --recompute the stored pictures are decoded instead and the difference is said; the file stays as it is.

    \b
    Example:
      alexprep pca-stats --store store
      alexprep pca-stats --store store --json | jq .stdevs
      alexprep pca-stats --store store --plot colours.png
    """
    from prep.build import write_colour
    from prep.colour import moments_of_records
    from prep.runners import Workers

    opened = Store.open(store)
    if not recompute:
        try:
            write_colour(store / split, opened.split(split))
        except OSError as error:
            say(f"{store / split / 'colour.json'} stays as it is: {error.strerror}.")
    stats = opened.colour(split)
    difference = None
    if recompute:
        workers = Workers(jobs or usable_cores())
        with workers, progress(f"{split}: decoding", stats.records, "records") as report:
            again = moments_of_records(opened, split, workers, report)
        difference = max(abs(a - b) for a, b in zip(stats.stdevs, again.stdevs, strict=True))
        stats = again
    if plot is not None:
        from prep.plot import plot_colour

        plot_colour(opened, split, stats, plot)
        say(f"Drawn: {plot}")
    if as_json:
        answer(asdict(stats))
        return
    print_stats(stats)
    if difference is not None:
        click.echo(
            f"recomputed from the stored records; the standard deviations of the build differ by at most "
            f"{difference:.4f} grey levels"
            + ("" if opened.settings.format == "ppm" else " (they are of the pixels before JPEG)")
        )

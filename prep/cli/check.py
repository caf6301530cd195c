"""`alexprep verify`, `inspect`, `export-files` and `pca-stats`: commands that read a store."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import click

from prep.build.report import print_stats
from prep.cli.options import cluster_option, jobs_option, make_runner, path_for, split_option
from prep.console import (
    UserError,
    WrongArgument,
    bytes_text,
    count_noun,
    disk_error,
    duration_text,
    json_option,
    print_json,
    print_line,
    progress,
    say,
    store_option,
    usable_cores,
)
from prep.files import output_file
from prep.store.manifest import SPLITS, Store


@click.command("verify")
@store_option
@click.option("--split", type=click.Choice(SPLITS), help="Split to verify.  [default: all]")
@click.option("--quick", is_flag=True, help="Compare checksums, digests and counts only; decode no image.")
@jobs_option
@cluster_option
@json_option
def verify(store: Path, split: str | None, quick: bool, jobs: int | None, cluster: str | None, as_json: bool) -> None:
    """Verify every record of a store against its checksum and the manifest, and print each fault.

    Images are decoded, and the sums of their pixels are compared with the sums in the manifest. For ppm stores, the
    sums must be equal. For jpeg stores, the sums may differ by the error of JPEG compression. The exit code is 1 if a
    fault is found.

    \b
    Example:
      alexprep verify --store store
      alexprep verify --store store --quick --json | jq .faults
    """
    from prep.build.plan import tool_versions
    from prep.check.verify import unverifiable_settings, verify_split

    opened = Store.open(path_for(cluster, store))
    names = [split] if split else list(opened.splits)
    records = sum(opened.split(name).records for name in names)
    faults, started = [], time.monotonic()
    with make_runner(cluster, jobs) as workers, progress("verifying", records, "records") as verify_progress:
        workers.check_machines(None, opened.root / "manifest.json", tool_versions)
        for name in names:
            faults += verify_split(opened, name, workers, verify_progress, decode=not quick)
    seconds = time.monotonic() - started
    if as_json:
        print_json(
            {
                "ok": not faults,
                "splits": names,
                "records": records,
                "seconds": round(seconds, 3),
                "faults": [asdict(fault) for fault in faults],
                "not_verified": unverifiable_settings(opened),
            }
        )
    else:
        for fault in faults:
            print_line(fault.text())
    if faults:
        raise UserError(
            f"{store}: {count_noun(len(faults), 'fault')}. Move the store away and build it again with alexprep "
            "build-lmdb."
        )
    if not as_json:
        print_line(
            f"{store}: {count_noun(records, 'record')} of {' and '.join(names)} agree with the manifest, "
            f"{duration_text(seconds)}, {records / max(seconds, 1e-9):,.0f} records/s"
        )
        print_line(f"settings that cannot be verified from the records: {', '.join(unverifiable_settings(opened))}")


@click.command("inspect")
@store_option
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="train",
    show_default=True,
    help="Split of the record that --key names.",
)
@click.option("--key", metavar="K", help="Key of the record to describe.  [default: describe the store]")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file(),
    help="File for the image of the record that --key names.",
)
@json_option
def inspect(store: Path, split: str, key: str | None, out: Path | None, as_json: bool) -> None:
    """Describe a store (splits, classes, settings, numbers of inputs) or, with --key, one record.

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
        raise WrongArgument(f"--out {out} is for the image of one record. Name the record with --key.")
    from prep.check.inspect import describe_store, summary_lines

    if as_json:
        print_json(describe_store(opened))
        return
    for line in summary_lines(opened):
        print_line(line)


def _inspect_record(store: Store, split: str, key: str, out: Path | None, as_json: bool) -> None:
    from prep.check.inspect import find_record, record_extra
    from prep.files import write_atomic
    from prep.workers import WorkerPool

    with WorkerPool(1) as workers:
        shard, number, datum = find_record(store, split, key, workers)
    extra = record_extra(store, split, number)
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
        print_json(facts | ({"extra": extra} if extra else {}))
        return
    for name, value in (facts | {f"extra {name}": value for name, value in extra.items()}).items():
        if value is not None:
            print_line(f"{name:10} {value}")


@click.command("export-files")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@store_option
@split_option
@jobs_option
@json_option
def export_files(out: Path, store: Path, split: str, jobs: int | None, as_json: bool) -> None:
    """Write the image of every record of a split to OUT/CLASS/NAME.

    Each file has the bytes of the stored image. If the split has extra fields, OUT/extra.csv has their values, in the
    form that `build-lmdb --extra` reads. OUT must be empty or must not exist. After an interruption the same command
    resumes the export.

    \b
    Example:
      alexprep export-files pictures --store store --split val
    """
    from prep.check.export import export_split
    from prep.workers import WorkerPool

    opened = Store.open(store)
    records, started = opened.split(split).records, time.monotonic()
    shown_progress = progress(f"{split}: writing", records, "files")
    with WorkerPool(jobs or usable_cores()) as workers, shown_progress as export_progress:
        export_split(opened, split, out, workers, export_progress)
    seconds = time.monotonic() - started
    if as_json:
        size_bytes = export_progress.size_bytes
        print_json({"split": split, "files": records, "bytes": size_bytes, "seconds": round(seconds, 3)})
        return
    size = bytes_text(export_progress.size_bytes)
    print_line(f"{out}: {count_noun(records, 'file')}, {size}, {duration_text(seconds)}")


@click.command("pca-stats")
@store_option
@split_option
@click.option(
    "--recompute",
    is_flag=True,
    help="Compute the statistics again from the stored images, and compare them with the statistics of the build.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file(".png", ".svg", kind="a figure is"),
    metavar="FILE.png|.svg",
    help="File for a plot of the colours and their principal components.",
)
@jobs_option
@cluster_option
@json_option
def pca_stats(
    store: Path,
    split: str,
    recompute: bool,
    plot: Path | None,
    jobs: int | None,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Print mean, covariance and principal components of the RGB pixels of a split.

    The statistics are computed from the exact pixel sums in the manifest, and are written to SPLIT/colour.json, which
    training reads. With --recompute, the statistics are computed from the stored images, and colour.json is not
    changed. The command then prints by how much the standard deviations of the build differ from the recomputed ones.

    \b
    Example:
      alexprep pca-stats --store store
      alexprep pca-stats --store store --json | jq .stdevs
      alexprep pca-stats --store store --plot colours.png
    """
    from prep.build.assemble import write_color_stats
    from prep.build.plan import tool_versions
    from prep.images.color_stats import recompute_color_stats

    if cluster is not None and not recompute:
        raise WrongArgument(
            f"--cluster {cluster} is for --recompute: without --recompute, no image is decoded. Leave --cluster out."
        )
    opened = Store.open(path_for(cluster, store))
    if not recompute:
        try:
            write_color_stats(store / split, opened.split(split))
        except OSError as error:
            say(f"{store / split / 'colour.json'} was not written: {error.strerror}.")
    stats = opened.color_stats(split)
    difference = None
    if recompute:
        runner, shown_progress = make_runner(cluster, jobs), progress(f"{split}: decoding", stats.records, "records")
        with runner as workers, shown_progress as decode_progress:
            workers.check_machines(None, opened.root / "manifest.json", tool_versions)
            recomputed = recompute_color_stats(opened, split, workers, decode_progress)
        difference = max(abs(a - b) for a, b in zip(stats.stdevs, recomputed.stdevs, strict=True))
        stats = recomputed
    if plot is not None:
        from prep.check.color_plot import plot_colors

        plot_colors(opened, split, stats, plot)
        say(f"Wrote {plot}.")
    if as_json:
        levels, unit = stats.channel_stats(), stats.channel_stats(max_value=1)
        in_unit_range = {"mean_rgb": unit.mean, "std_rgb": unit.std}
        print_json({**asdict(stats), "std_rgb": levels.std, "unit_range": in_unit_range})
        return
    print_stats(stats)
    if difference is not None:
        print_line(
            f"recomputed from the stored images; the standard deviations of the build differ from these by at most "
            f"{difference:.4f} grey levels"
            + ("" if opened.settings.format == "ppm" else " (the build measures pixels before JPEG compression)")
        )

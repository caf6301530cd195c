"""The command `alexstream`: look at the stream, and measure it. The stream itself is `pipeline.loader`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from prep.console import (
    CONTEXT_SETTINGS,
    Group,
    UserError,
    json_option,
    print_json,
    progress,
    say,
    store_option,
    usable_cores,
)
from prep.store.manifest import SPLITS, Store
from prep.version import version_option


@click.group(cls=Group, context_settings=CONTEXT_SETTINGS)
@version_option
def main() -> None:
    """The stream from a store to a training loop: random windows, flips, colour noise, with NVIDIA DALI.

    In Python: from pipeline.loader import train_loader, eval_loader.

    \b
    Example:
      alexstream preview preview.png --store store
      alexstream inspect --store store
      alexstream bench --store store
    """


@main.command()
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False), metavar="OUT.png")
@store_option
@click.option("--rows", type=click.IntRange(1, 64), default=6, show_default=True, help="Photographs, one a row.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of every random draw.")
def preview(out: Path, store: Path, rows: int, seed: int) -> None:
    """Draw a contact sheet: photographs, eight random augmentations of each, and colour noise ten times larger.

    \b
    Example:
      alexstream preview preview.png --store store --rows 4
    """
    opened = Store.open(store)
    if not out.parent.is_dir():
        raise UserError(f"{out}: there is no folder {out.parent}. Make it first, or name another.")
    from pipeline.diagnostics.preview import save_preview

    save_preview(opened, out, rows, seed)
    say(f"Drawn: {out}")


@main.command()
@store_option
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Which split.")
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images in a batch.")
@click.option("--world-size", type=click.IntRange(1), default=1, show_default=True, help="Loaders of an epoch.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Of every random draw.")
@click.option("--epoch", type=click.IntRange(0), default=0, show_default=True, help="Which epoch to look at.")
@click.option("--batches", type=click.IntRange(1), default=100, show_default=True, help="How many batches to look at.")
@json_option
def inspect(
    store: Path, split: str, batch: int, world_size: int, seed: int, epoch: int, batches: int, as_json: bool
) -> None:
    """Say what an epoch is: its batches, what they leave out, how well classes are mixed, what memory it takes.

    \b
    Example:
      alexstream inspect --store store --batch 128
    """
    opened = Store.open(store)
    from pipeline.diagnostics.shuffle_quality import LEAST_SHARE, measure_shuffle_quality
    from pipeline.sampling import BLOCK_RECORDS, WINDOW_RECORDS

    records, step = opened.split(split).records, batch * world_size
    if records < step:
        raise UserError(
            f"{store} has {records:,} records in {split}, a step takes {step:,}. Ask for a smaller --batch."
        )
    with progress("looking", min(batches, records // step), "batches") as report:
        found = measure_shuffle_quality(opened, split, step, seed, epoch, batches, report)
    told = {
        "split": split,
        "records": records,
        "steps": records // step,
        "left_out": records % step,
        **asdict(found),
        "block_records": BLOCK_RECORDS,
        "window_records": WINDOW_RECORDS,
        "batch_bytes": 4 * 3 * 224 * 224 * batch,
    }
    if as_json:
        print_json(told)
    else:
        many = "" if world_size == 1 else f" × {world_size}"
        click.echo(f"{split}: {records:,} records of {len(opened.classes):,} classes")
        click.echo(f"an epoch: {records // step:,} batches of {batch}{many}, {records % step:,} records left out")
        click.echo(f"order: blocks of {BLOCK_RECORDS} records, mixed within {WINDOW_RECORDS:,}")
        click.echo(
            f"distinct classes in a batch: {found.distinct_classes:.1f}, {found.share_of_ideal:.3f} of a perfect "
            f"shuffle's {found.ideal_distinct_classes:.1f}, over {found.batches:,} batches of epoch {epoch}"
        )
    if found.share_of_ideal < LEAST_SHARE:
        say(
            f"Warning: batches have {found.share_of_ideal:.2f} of a perfect shuffle's classes, below {LEAST_SHARE}. "
            "Are the records in the order of their classes? Build the store with alexprep, which mixes them."
        )


@main.command()
@store_option
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images in a batch.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N", help="Where DALI works.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="How long to measure.")
@json_option
def bench(store: Path, batch: int, threads: int | None, device: str, seconds: float, as_json: bool) -> None:
    """Measure the stream, its stages, and a bare libjpeg-turbo decode of the same records on as many threads.

    \b
    Example:
      alexstream bench --store store --threads 2 --seconds 10
    """
    opened = Store.open(store)
    from pipeline.diagnostics.bench import ROUNDS, bench_stream, result_json

    with progress("measuring", ROUNDS, "rounds") as report:
        result = bench_stream(opened, batch, threads or usable_cores(), device, seconds, report)
    if as_json:
        print_json(result_json(result))
        return
    click.echo(f"{result.format} records, batch {result.batch}, {result.device}, {result.threads} threads")
    for name, rate in result.stages.items():
        through = "one thread, looking up only" if name == "read" else "with all before it"
        click.echo(f"{name:10}{rate:10,.0f} images/s  {through}")
    click.echo(f"{'stream':10}{result.images_per_s:10,.0f} images/s")
    click.echo(f"{'bound':10}{result.bound_images_per_s:10,.0f} images/s  {result.bound}")
    click.echo(f"{'share':10}{result.share_of_bound:10.2f}")

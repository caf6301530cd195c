"""`alexstream preview`, `inspect` and `bench`: commands that show and measure the stream of a store."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline.settings.augmentation import PRESETS
from prep.console import (
    FiniteRange,
    WrongArgument,
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

Command = TypeVar("Command", bound=Callable[..., Any])


_preset_option = click.option(
    "--preset",
    type=click.Choice(PRESETS),
    default="alexnet",
    show_default=True,
    help="Settings of the images: random crops (alexnet), resized regions of random size (resnet), or resized regions "
    "with jitter, grey and blur (simclr).",
)


def _seed_option(max_seed: int) -> Callable[[Command], Command]:
    return click.option(
        "--seed",
        type=click.IntRange(0, max_seed),
        default=0,
        show_default=True,
        help="Seed of the record order and the random augmentations.",
    )


@click.command("preview")
@click.argument(
    "out",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file(),
    metavar="[OUT.png]",
    default="preview.png",
)
@store_option
@click.option(
    "--rows", type=click.IntRange(1, 64), default=6, show_default=True, help="Number of rows. Each row shows one image."
)
@_preset_option
@_seed_option(2**31 - 1)
def preview(out: Path, store: Path, rows: int, preset: str, seed: int) -> None:
    """Draw a contact sheet of random augmentations.

    Each row shows a stored image and eight random augmentations. If the preset has colour noise, the row also shows the
    eighth augmentation again with ten times the colour noise. The names of the classes are at the left. By default,
    OUT.png is preview.png.

    \b
    Example:
      alexstream preview
      alexstream preview preview.png --store store --rows 4 --preset resnet
    """
    opened = Store.open(store)
    from pipeline.diagnostics.preview import save_preview

    save_preview(opened, out, rows, seed, preset=preset)
    say(f"Wrote {out}")


@click.command("inspect")
@store_option
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Name of the split.")
@click.option(
    "--batch", type=click.IntRange(1), default=128, show_default=True, help="Number of images in a batch of one loader."
)
@click.option(
    "--world-size", type=click.IntRange(1), default=1, show_default=True, help="Number of loaders that share an epoch."
)
@_seed_option(2**63 - 1)
@click.option(
    "--epoch", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Epoch to inspect, counted from 0."
)
@click.option(
    "--batches",
    type=click.IntRange(1),
    default=100,
    show_default=True,
    help="Number of batches in which the classes are counted. These batches are spread evenly over the epoch.",
)
@json_option
def inspect(
    store: Path, split: str, batch: int, world_size: int, seed: int, epoch: int, batches: int, as_json: bool
) -> None:
    """Print the number of batches and the shuffle quality of an epoch.

    Shuffle quality is the mean number of distinct classes in a step (one batch of every loader), compared with the
    number for a perfect shuffle.

    \b
    Example:
      alexstream inspect --store store --batch 128
    """
    opened = Store.open(store)
    from pipeline.diagnostics.shuffle_quality import LEAST_SHARE, measure_shuffle_quality
    from pipeline.sampling import BLOCK_RECORDS, WINDOW_RECORDS

    records, step_records = opened.split(split).records, batch * world_size
    if records < step_records:
        raise WrongArgument(
            f"{store} has {records:,} records in {split}, but a step takes {step_records:,} records. Choose a smaller "
            "--batch."
        )
    steps, left_out = divmod(records, step_records)
    with progress("inspecting", min(batches, steps), "batches") as counter:
        quality = measure_shuffle_quality(opened, split, step_records, seed, epoch, batches, counter)
    if as_json:
        print_json(
            {
                "split": split,
                "records": records,
                "steps": steps,
                "left_out": left_out,
                **asdict(quality),
                "block_records": BLOCK_RECORDS,
                "window_records": WINDOW_RECORDS,
                "batch_bytes": 4 * 3 * 224 * 224 * batch,
            }
        )
    else:
        loaders = "" if world_size == 1 else f" × {world_size} loaders"
        print_line(f"{split}: {records:,} records of {len(opened.classes):,} classes")
        print_line(f"epoch: {steps:,} batches of {batch}{loaders}; {left_out:,} records left out")
        print_line(
            f"shuffle: blocks of {BLOCK_RECORDS} records, and then the records within groups of {WINDOW_RECORDS:,}"
        )
        print_line(
            f"distinct classes in a batch: {quality.distinct_classes:.1f} ({quality.share_of_ideal:.1%} of a perfect "
            f"shuffle's {quality.ideal_distinct_classes:.1f}), mean of {quality.batches:,} batches of epoch {epoch}"
        )
    if quality.share_of_ideal < LEAST_SHARE:
        say(
            f"Warning: a batch has {quality.share_of_ideal:.2f} times as many classes as with a perfect shuffle, "
            f"expected at least {LEAST_SHARE}. The records may be in the order of their classes. Build the store with "
            "alexprep, which shuffles records."
        )


@click.command("bench")
@store_option
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Number of images in a batch.")
@click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    metavar="N",
    help="Number of CPU threads that decode and augment.  [default: number of usable cores]",
)
@click.option(
    "--device",
    default="cpu",
    show_default=True,
    metavar="cpu|cuda:N",
    help="Device on which images are decoded and augmented.",
)
@click.option(
    "--seconds",
    type=FiniteRange(0.1, 1e6),
    default=5.0,
    show_default=True,
    help="Duration of the measurement of each stage, in seconds.",
)
@_preset_option
@json_option
def bench(
    store: Path, batch: int, threads: int | None, device: str, seconds: float, preset: str, as_json: bool
) -> None:
    """Measure the speed of the stream, stage by stage.

    The command also measures an upper bound. In a JPEG store, the upper bound is the speed at which libjpeg-turbo
    decodes records on --threads threads. In a PPM store, the upper bound is the speed at which records are copied on
    --threads threads.

    \b
    Example:
      alexstream bench --store store --threads 2 --seconds 10
    """
    opened = Store.open(store)
    from pipeline.diagnostics.bench import ROUNDS, bench_stream, result_json

    with progress("measuring", ROUNDS, "rounds") as counter:
        result = bench_stream(opened, batch, threads or usable_cores(), device, seconds, counter, preset=preset)
    if as_json:
        print_json(result_json(result))
        return
    print_line(f"{result.format} records, batch {result.batch}, {result.device}, {result.threads} threads")
    for name, images_per_s in result.stages.items():
        note = "reading records on one thread" if name == "read" else "this stage and all stages before it"
        print_line(f"{name:10}{images_per_s:10,.0f} images/s  {note}")
    print_line(f"{'stream':10}{result.images_per_s:10,.0f} images/s")
    print_line(f"{'bound':10}{result.bound_images_per_s:10,.0f} images/s  {result.bound}")
    print_line(f"{'share':10}{result.share_of_bound:10.2f}  of the bound")

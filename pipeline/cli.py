"""The command `alexstream`: look at the stream, and measure it. The stream itself is `pipeline.loader`."""

from __future__ import annotations

from pathlib import Path

import click

from prep.console import CONTEXT, Group, UserError, answer, json_option, progress, say, store_option, usable_cores
from prep.manifest import Store


@click.group(cls=Group, context_settings=CONTEXT)
@click.version_option(package_name="alexnet")
def main() -> None:
    """The stream from a store to a training loop: random windows, flips, colour noise, with NVIDIA DALI.

    In Python: from pipeline.loader import train_loader, eval_loader.

    \b
    Example:
      alexstream preview preview.png --store store
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
    from pipeline.preview import draw_preview

    draw_preview(opened, out, rows, seed)
    say(f"Drawn: {out}")


@main.command()
@store_option
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Images in a batch.")
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads.  [default: all cores]")
@click.option("--device", default="cpu", show_default=True, metavar="cpu|cuda:N", help="Where DALI works.")
@click.option("--seconds", type=click.FloatRange(0.1), default=5.0, show_default=True, help="How long to measure.")
@json_option
def bench(store: Path, batch: int, threads: int | None, device: str, seconds: float, as_json: bool) -> None:
    """Measure the stream, beside a bare libjpeg-turbo decode of the same records on as many threads.

    \b
    Example:
      alexstream bench --store store --threads 2 --seconds 10
    """
    opened = Store.open(store)
    from pipeline.bench import ROUNDS, bench_stream, result_json

    with progress("measuring", ROUNDS, "rounds") as report:
        result = bench_stream(opened, batch, threads or usable_cores(), device, seconds, report)
    if as_json:
        answer(result_json(result))
        return
    click.echo(
        f"stream  {result.images_per_s:10,.0f} images/s  {result.format} records, batch {result.batch}, {result.device}"
    )
    click.echo(f"bound   {result.bound_images_per_s:10,.0f} images/s  {result.bound}, {result.threads} threads")
    click.echo(f"share   {result.share_of_bound:10.2f}")

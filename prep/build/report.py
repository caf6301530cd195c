"""What the commands of `alexprep` answer: a few lines for a person, or one JSON object for a program."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from prep.console import bytes_text, count_noun, duration_text, one_line, print_json
from prep.store.input_log import read_outcomes
from prep.store.manifest import ColorStats, Store

if TYPE_CHECKING:
    from prep.build.split import Forecast


def report_build(store: Store, name: str, done: int, seconds: float, as_json: bool) -> None:
    """A split that was just built, `done` inputs of it in this run."""
    split = store.split(name)
    skipped = split.account["inputs"] - split.records
    if as_json:
        print_json(
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
    fates = store.root / name / "inputs.jsonl"
    converted = ", ".join(f"{n:,} {how}" for how, n in sorted(split.account["converted"].items()))
    if converted:
        click.echo(f"  converted: {converted}")
    if skipped:
        click.echo(f"  left out: {count_noun(skipped, 'input')}; {fates} says which and why. The first:")
        for fate in islice((fate for fate in read_outcomes(fates) if fate["fate"] == "bad"), 3):
            click.echo(one_line(f"    {fate['source']}: {fate['why']}"))
    if done:
        click.echo(f"  {duration_text(seconds)}, {done / max(seconds, 1e-9):,.0f} pictures/s")
    else:
        click.echo("  built before with the same inputs and settings; nothing to do")


def report_forecast(told: Forecast, name: str, as_json: bool) -> None:
    """What a build would do."""
    guess = told.estimate
    if as_json:
        print_json(
            {
                "split": name,
                "inputs": told.inputs,
                "classes": told.classes,
                "bad": [{"source": source, "why": why} for source, why in told.bad],
                "done": told.done,
                "bytes": guess and guess.bytes,
                "seconds": guess and round(guess.seconds, 1),
                "free_bytes": told.free_bytes,
            }
        )
        return
    click.echo(f"{name}: {count_noun(told.inputs, 'input')} of {count_noun(told.classes, 'class', 'classes')}")
    if told.bad:
        click.echo(
            f"  {count_noun(len(told.bad), 'input')} seen that {'is' if len(told.bad) == 1 else 'are'} no picture:"
        )
        for source, why in told.bad[:10]:
            click.echo(one_line(f"    {source}: {why}"))
    if told.whole:
        click.echo("  built before with the same inputs and settings; nothing to do")
        return
    if told.done:
        click.echo(f"  {count_noun(told.done, 'input')} in finished shards; {told.inputs - told.done:,} to do")
    if guess is None:
        click.echo(f"  no estimate: none of the pictures tried can be decoded; {bytes_text(told.free_bytes)} free")
        return
    room = "fits" if guess.bytes <= told.free_bytes else "does NOT fit"
    click.echo(
        f"  about {bytes_text(guess.bytes)} and {duration_text(guess.seconds)} (from {guess.sampled} of them; a slow "
        f"source takes longer); {bytes_text(told.free_bytes)} free: {room}"
    )


def print_stats(stats: ColorStats) -> None:
    """Mean, covariance and components, each with its unit."""

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

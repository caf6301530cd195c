"""Contestants in turn: what the three benchmarks share.

A contestant does a fixed amount of work and says how many images that was. All take turns in one process, A B C,
A B C, …, so that a machine whose speed drifts does so for everyone; the first time through is not counted. A ratio
is taken within each round, and the median over the rounds is given: it is not always the ratio of the two medians.
Nothing is asserted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import click

from prep.console import CONTEXT, UserError, answer, say

_PAUSE_S = 1.0  # before each turn: what the one before has begun ahead of its consumer is finished by then


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--rounds and --json, which every benchmark has."""
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")(command)
    help = "Counted turns of each contestant."
    return click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help=help)(command)


class Benchmark(click.Command):
    """A command that turns a user's mistake into one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": CONTEXT, **kwargs})

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; raises click.ClickException for UserError."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error


@dataclass(frozen=True)
class Contestant:
    """Someone who is timed. The first of them all is ours."""

    name: str
    work: Callable[[], int]  # what is timed; returns images done
    bound: str | None = None  # the name of the contestant that is its bound
    prepare: Callable[[], object] = lambda: None  # before each turn, not timed


@dataclass(frozen=True)
class Row:
    """One contestant's rates over the rounds, in images/s, and medians of its ratios, taken round by round."""

    name: str
    images_per_s: float
    least: float
    most: float
    of_ours: float
    of_bound: float | None


def libjpeg_turbo() -> ModuleType:
    """The module simplejpeg, which makes the bounds; raises UserError where it is missing."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        raise UserError("simplejpeg is not installed. Install it with: pip install 'alexnet[bench]'") from None
    module: ModuleType = simplejpeg
    return module


def photo_digits(folder: Path) -> Path:
    """The 1,500 training pictures of tools.photo_digits, made in a new folder."""
    from tools.photo_digits import make

    make(folder)
    return folder / "train"


def race(contestants: Sequence[Contestant], rounds: int) -> list[Row]:
    """Run all in turn, once for nothing and `rounds` times for the record."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warming up, not counted")
        for contestant in contestants:
            time.sleep(_PAUSE_S)
            contestant.prepare()
            started = time.perf_counter()
            images = contestant.work()
            rate = images / (time.perf_counter() - started)
            if number:
                rates[contestant.name].append(rate)

    def ratio(name: str, other: str) -> float:
        return round(median(a / b for a, b in zip(rates[name], rates[other], strict=True)), 3)

    ours = contestants[0].name
    rows = []
    for contestant in contestants:
        mine = rates[contestant.name]
        middle, least, most = (round(rate, 1) for rate in (median(mine), min(mine), max(mine)))
        of_bound = None if contestant.bound is None else ratio(contestant.name, contestant.bound)
        rows.append(Row(contestant.name, middle, least, most, ratio(contestant.name, ours), of_bound))
    return rows


def show(rows: Sequence[Row], as_json: bool, more: dict[str, Any], note: str = "") -> None:
    """The table, then `note`; or one JSON object: `more`, and a list of rows under "contestants"."""
    if as_json:
        answer({**more, "contestants": [asdict(row) for row in rows]})
        return
    width = max(len(row.name) for row in rows)
    bounded = any(row.of_bound is not None for row in rows)
    click.echo(f"{'images/s':<{width}} {'median':>8} {'min .. max':>18} {'of ours':>8}{' of bound' if bounded else ''}")
    for row in rows:
        spread = f"{_rate(row.least)} .. {_rate(row.most)}"
        of_bound = "" if row.of_bound is None else f"{row.of_bound:9.2f}"
        click.echo(f"{row.name:<{width}} {_rate(row.images_per_s):>8} {spread:>18} {row.of_ours:8.2f}{of_bound}")
    if note:
        click.echo(note)


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"

"""Contestants in turn: what the three benchmarks share.

A contestant works for one turn and says at what rate. All take turns, A B C, A B C, …, so that a machine whose speed
drifts does so for everyone; the first time through is not counted. A ratio is taken within each round, and the median
over the rounds is given: it is not always the ratio of the two medians. Nothing is asserted.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import click

from prep.console import CONTEXT_SETTINGS, UserError, print_json, say

INTERPRETER = click.Path(exists=True, dir_okay=False, path_type=Path)
_ROOT = Path(__file__).parents[2]
_PAUSE_S = 1.0  # before each turn: what the one before has begun ahead of its consumer is finished by then


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--rounds and --json, which every benchmark has."""
    command = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")(command)
    help = "Counted turns of each contestant."
    return click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help=help)(command)


class Benchmark(click.Command):
    """A command that turns a user's mistake into one line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": CONTEXT_SETTINGS, **kwargs})

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
    rate: Callable[[], float]  # one turn; returns images/s
    bound: str | None = None  # the name of the contestant that is its bound
    prepare: Callable[[], object] = lambda: None  # before each turn, not timed
    ours: str | None = None  # the name of the contestant of ours that it stands beside; None: the first of all


def timed(work: Callable[[], int]) -> Callable[[], float]:
    """The rate, in images/s, of `work`, which returns how many images it did."""

    def rate() -> float:
        started = time.perf_counter()
        images = work()
        return images / (time.perf_counter() - started)

    return rate


class Program:
    """A process that answers in lines; its standard error is kept for the case that it fails."""

    def __init__(
        self, name: str, command: Sequence[str], errors: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.command, self.errors = name, command, errors
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it in the root of the checkout, where `-m tools.…` finds the peers."""
        pipe, env = subprocess.PIPE, self.environment
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=_ROOT, env=env
            )

    def line(self) -> str:
        """The next line that it prints; raises UserError where it ends instead."""
        assert self.process is not None and self.process.stdout is not None
        text = self.process.stdout.readline()
        if not text:
            code = self.process.wait()
            why = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{self.name}: exit code {code}. {' '.join(why)}")
        return text.strip()

    def go(self, word: str = "go") -> None:
        """Give the word."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """Wait for its end, if it was started; raises UserError where it failed."""
        if self.process is not None:
            self.process.communicate()
            ended, self.process = self.process, None
            if ended.returncode:
                raise UserError(f"{self.name}: exit code {ended.returncode}.")

    def stop(self, patience_s: float = 0.0) -> None:
        """End it if it still runs; one that ends with its standard input may have time to do so by itself."""
        if self.process is not None and self.process.poll() is None:
            try:
                self.process.communicate(timeout=patience_s)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                self.process.communicate()
        self.process = None


@dataclass(frozen=True)
class Row:
    """One contestant's rates over the rounds, in images/s, and medians of its ratios, taken round by round."""

    name: str
    images_per_s: float
    least: float
    most: float
    ours: str  # the name of the contestant of ours that it stands beside
    of_ours: float
    of_bound: float | None


def libjpeg_turbo() -> ModuleType:
    """The module simplejpeg, which makes the bounds; raises UserError where it is missing."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        raise UserError("simplejpeg is not installed. Install it with: pip install simplejpeg") from None
    module: ModuleType = simplejpeg
    return module


def photo_digits(folder: Path) -> Path:
    """The 1,500 training pictures of tools.photo_digits, made in a new folder."""
    from tools.photo_digits import make

    make(folder)
    return folder / "train"


def race(contestants: Sequence[Contestant], rounds: int, pause_s: float = _PAUSE_S) -> list[Row]:
    """Run all in turn, once for nothing and `rounds` times for the record, with a pause before each turn."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warming up, not counted")
        for contestant in contestants:
            time.sleep(pause_s)
            contestant.prepare()
            rate = contestant.rate()
            if number:
                rates[contestant.name].append(rate)

    def ratio(name: str, other: str) -> float:
        return round(median(a / b for a, b in zip(rates[name], rates[other], strict=True)), 3)

    rows = []
    for contestant in contestants:
        ours = contestant.ours or contestants[0].name
        mine = rates[contestant.name]
        middle, least, most = (round(rate, 1) for rate in (median(mine), min(mine), max(mine)))
        of_bound = None if contestant.bound is None else ratio(contestant.name, contestant.bound)
        rows.append(Row(contestant.name, middle, least, most, ours, ratio(contestant.name, ours), of_bound))
    return rows


def ours_over(rows: Sequence[Row]) -> dict[str, float]:
    """By the name of each of the others: how many times its rate ours is."""
    return {row.name: round(1 / row.of_ours, 2) for row in rows if row.name != row.ours}


def ratio_lines(rows: Sequence[Row]) -> str:
    """What ours_over says, a line each."""
    beside = {row.name: row.ours for row in rows}
    return "\n".join(f"{beside[name]} / {name}: {ratio:.2f}" for name, ratio in ours_over(rows).items())


def show(rows: Sequence[Row], as_json: bool, more: dict[str, Any], note: str = "") -> None:
    """The table, then `note`; or one JSON object: `more`, and a list of rows under "contestants"."""
    if as_json:
        print_json({**more, "contestants": [asdict(row) for row in rows]})
        return
    click.echo(table(rows))
    if note:
        click.echo(note)


def table(rows: Sequence[Row]) -> str:
    """The rates and their ratios, a line each."""
    width = max(len(row.name) for row in rows)
    bounded = any(row.of_bound is not None for row in rows)
    head = f"{'images/s':<{width}} {'median':>8} {'min .. max':>18} {'of ours':>8}{' of bound' if bounded else ''}"
    lines = [head]
    for row in rows:
        spread = f"{_rate(row.least)} .. {_rate(row.most)}"
        of_bound = "" if row.of_bound is None else f"{row.of_bound:9.2f}"
        lines.append(f"{row.name:<{width}} {_rate(row.images_per_s):>8} {spread:>18} {row.of_ours:8.2f}{of_bound}")
    return "\n".join(lines)


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"

"""Harness of all benchmarks: runs the contestants one after another and compares their rates.

A contestant is one implementation that is timed. A turn is one timed run of a contestant, and gives a rate in images/s.
A round is one turn of each contestant, in order: A B C, A B C, … A slow change in the speed of the machine therefore
affects all contestants alike. The first round of a benchmark is a warm-up and is not counted. The ratio of two rates is
computed in each round, and the median of these ratios is reported. The median of the ratios can differ from the ratio
of the two median rates. The harness only prints the results: a low rate is not an error.
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
# Pause before each turn, in seconds. During the pause, the previous contestant finishes the batches that it prefetches.
_PAUSE_S = 1.0


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options --rounds and --json, which every benchmark has."""
    command = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")(command)
    help = "Number of timed runs of each contestant, without the warm-up run."
    return click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help=help)(command)


class BenchmarkCommand(click.Command):
    """A command that prints a UserError in one line, without a traceback."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": CONTEXT_SETTINGS, **kwargs})

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises click.ClickException for UserError."""
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise click.ClickException(str(error)) from error


@dataclass(frozen=True)
class Contestant:
    """One implementation that is timed. In every benchmark, the first contestant belongs to this project."""

    name: str
    rate: Callable[[], float]  # a function that runs one turn and returns images/s
    bound: str | None = None  # name of the contestant whose rate is an upper bound of this contestant's rate
    prepare: Callable[[], object] = lambda: None  # a function that is called before each turn and not timed
    # Name of the contestant of this project with which this contestant is compared. None means the first contestant.
    ours: str | None = None


def timed(work: Callable[[], int]) -> Callable[[], float]:
    """Return a function that runs `work` and returns the rate of `work` in images/s.

    `work` returns the number of images.
    """

    def rate() -> float:
        started = time.perf_counter()
        images = work()
        return images / (time.perf_counter() - started)

    return rate


class LineProcess:
    """A subprocess that reads commands from standard input and answers each command with one line on standard output.

    The standard error of the subprocess goes to the file `errors`. If the subprocess fails, the UserError contains the
    last line of this file.
    """

    def __init__(
        self, name: str, command: Sequence[str], errors: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.name, self.command, self.errors = name, command, errors
        self.environment = {**os.environ, **(environment or {})}
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the process in the root of the checkout, where Python can import tools.bench.peers.NAME."""
        pipe, env = subprocess.PIPE, self.environment
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                self.command, stdin=pipe, stdout=pipe, stderr=errors, text=True, cwd=_ROOT, env=env
            )

    def read_line(self) -> str:
        """Return the next line that the process prints.

        Raises UserError if the process ends without printing a line.
        """
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last_error = self.errors.read_text(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{self.name}: exit code {code}. {' '.join(last_error)}")
        return line.strip()

    def send(self, line: str = "go") -> None:
        """Write one line to the process."""
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def wait(self) -> None:
        """If the process was started, wait until it ends. Raises UserError if the exit code is not 0."""
        if self.process is not None:
            self.process.communicate()
            ended, self.process = self.process, None
            if ended.returncode:
                raise UserError(f"{self.name}: exit code {ended.returncode}.")

    def stop(self, timeout_s: float = 0.0) -> None:
        """Close the standard input of the process. If the process still runs after `timeout_s`, terminate it."""
        if self.process is not None:
            try:
                self.process.communicate(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                self.process.terminate()
                self.process.communicate()
        self.process = None


@dataclass(frozen=True)
class Row:
    """Rate of one contestant in images/s, and the ratios of this rate to the rates of other contestants.

    `least` and `most` are the lowest and the highest rate in all rounds. All other numbers are medians over the rounds.
    """

    name: str
    images_per_s: float
    least: float
    most: float
    ours: str  # name of the contestant of this project with which this contestant is compared
    of_ours: float  # rate of this contestant / rate of the contestant `ours`
    of_bound: float | None  # rate of this contestant / rate of the contestant that is its upper bound


def import_simplejpeg() -> ModuleType:
    """Return the module simplejpeg, which wraps libjpeg-turbo. Raises UserError if simplejpeg is not installed."""
    try:
        import simplejpeg
    except ModuleNotFoundError:
        raise UserError("simplejpeg is not installed. Install simplejpeg with: pip install simplejpeg") from None
    module: ModuleType = simplejpeg
    return module


def make_photo_digits(folder: Path) -> Path:
    """Make the data set of tools.photo_digits in a new folder, and return the folder of its 1,500 training images."""
    from tools.photo_digits import make_dataset

    make_dataset(folder)
    return folder / "train"


def race(contestants: Sequence[Contestant], rounds: int, pause_s: float = _PAUSE_S) -> list[Row]:
    """Run a warm-up round and `rounds` counted rounds, with a pause before each turn. Returns a row per contestant."""
    rates: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for number in range(rounds + 1):
        say(f"round {number} of {rounds}" if number else "warm-up round, not counted")
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
        name, ours = contestant.name, contestant.ours or contestants[0].name
        middle, least, most = (round(statistic(rates[name]), 1) for statistic in (median, min, max))
        of_bound = None if contestant.bound is None else ratio(name, contestant.bound)
        rows.append(Row(name, middle, least, most, ours, ratio(name, ours), of_bound))
    return rows


def speedups(rows: Sequence[Row]) -> dict[str, float]:
    """Return {row.name: rate of contestant row.ours / rate of contestant row.name}, for the JSON key "ours_over".

    Rows in which both contestants are the same are left out.
    """
    return {row.name: round(1 / row.of_ours, 2) for row in rows if row.name != row.ours}


def speedup_lines(rows: Sequence[Row]) -> str:
    """Return the speedups as text, one line for each speedup."""
    ours = {row.name: row.ours for row in rows}
    return "\n".join(f"{ours[name]} / {name}: {ratio:.2f}" for name, ratio in speedups(rows).items())


def print_results(rows: Sequence[Row], as_json: bool, details: dict[str, Any], note: str = "") -> None:
    """Print the table and `note`, or one JSON object (`details`, and `rows` under the key "contestants")."""
    if as_json:
        print_json({**details, "contestants": [asdict(row) for row in rows]})
        return
    click.echo(table(rows))
    if note:
        click.echo(note)


def table(rows: Sequence[Row]) -> str:
    """Return the rates and ratios as text, one line for each contestant."""
    width = max(len(row.name) for row in rows)
    bounded = any(row.of_bound is not None for row in rows)
    head = f"{'images/s':<{width}} {'median':>8} {'min .. max':>18} {'of ours':>8}{' of bound' if bounded else ''}"
    lines = [head]
    for row in rows:
        spread = f"{_rate_text(row.least)} .. {_rate_text(row.most)}"
        of_bound = "" if row.of_bound is None else f"{row.of_bound:9.2f}"
        rate = _rate_text(row.images_per_s)
        lines.append(f"{row.name:<{width}} {rate:>8} {spread:>18} {row.of_ours:8.2f}{of_bound}")
    return "\n".join(lines)


def _rate_text(images_per_s: float) -> str:
    return f"{images_per_s:,.0f}" if images_per_s >= 100 else f"{images_per_s:.1f}"

"""A training on a terminal: where it stands, its curves in small, how long it will last; with rich.

It is drawn again twice a second by a thread of its own from numbers that the loop has read anyway. What others say
meanwhile scrolls by above it, as does a line for each validation; at its end it disappears.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prep.console import Progress, bytes_text, duration_text
from train.monitor.console_view import ConsoleView, Line, RunLength, validation_text
from train.runs.run_dir import RATE_LINES, seconds_left

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE = 32  # values in a small curve
_PER_S = 2  # drawings
_CURVES = (("loss", "loss", ".3f"), ("top-1", "top1_error", ".1%"), ("top-5", "top5_error", ".1%"))


def sparkline(values: Sequence[float], width: int = _CURVE) -> str:
    """A curve of `width` characters or less: means of equal parts of `values`, from their least to their greatest."""
    if not values:
        return ""
    width = min(width, len(values))
    parts = [values[k * len(values) // width : (k + 1) * len(values) // width] for k in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


class LiveView(ConsoleView):
    """The view that moves."""

    def __init__(self, console: Console | None = None) -> None:
        """`console`: where it is drawn; standard error unless given."""
        self._console = console or Console(stderr=True)
        self._live = RichLive(self, console=self._console, refresh_per_second=_PER_S, transient=True)
        self._plan = RunLength(1, 1, 1)
        self._step = 0  # of the last line
        self._values: dict[str, list[float]] = {key: [] for _, key, _ in _CURVES}
        self._curves = dict.fromkeys(self._values, "")
        self._last: list[Line] = []  # of training
        self._val: Line | None = None
        self._best: Line | None = None
        self._steps_since: Callable[[], int] = int
        self._report: tuple[str, Progress] | None = None

    def begin(self, plan: RunLength, lines: Sequence[Line], step: int) -> None:
        """As in ConsoleView."""
        self._plan, self._step = plan, step
        for line in lines:
            self._count(line)
        self._draw_curves()
        self._live.start(refresh=True)
        self._console.show_cursor(True)  # or kill -9 would leave a terminal without one

    def follow(self, steps: Callable[[], int]) -> None:
        """As in ConsoleView."""
        self._steps_since = steps

    def train(self, line: Line) -> None:
        """As in ConsoleView."""
        self._count(line)
        self._draw_curves()
        self._step = line["step"]

    def validation(self, line: Line) -> None:
        """As in ConsoleView."""
        self._count(line)
        with suppress(OSError):  # the terminal was closed
            self._console.print(validation_text(line), highlight=False)

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """As in ConsoleView."""
        self._report = label, Progress(total, unit)
        try:
            yield self._report[1]
        finally:
            self._report = None

    def end(self) -> None:
        """As in ConsoleView."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The picture: where it stands, what it learns, how fast, what the last validation said."""
        step = self._step + self._steps_since()
        table = Table.grid(padding=(0, 2))
        table.add_row("step", f"{step:,} of {self._plan.steps:,}", self._bar(step, self._plan.steps))
        table.add_row("epoch", f"{step / self._plan.steps_per_epoch:.2f}", self._left(step))
        for name, key, form in _CURVES:
            values, curve = self._values[key], "" if options.ascii_only else self._curves[key]
            table.add_row(name, format(values[-1], form) if values else "", Text(curve, "cyan"))
        yield table
        if self._last:
            line = self._last[-1]
            memory = [_memory(line["memory_mb"]), *(f"GPU {_memory(n)}" for n in line.get("gpu_memory_mb", ()))]
            yield Text(
                f"lr {line['lr']:g}   {line['images_per_s']:,.1f} images/s   waits for stream "
                f"{line['waiting_share']:.1%}, stream waits {line['stream_waiting_share']:.1%}\n"
                f"memory {', '.join(memory)}"
            )
        if (under_way := self._report) is not None:  # looked at once: the loop may end it meanwhile
            label, report = under_way
            yield Text(f"{label}: {report.done:,} of {report.total:,} {report.unit}", "cyan")
        elif (val := self._val) is not None and (best := self._best) is not None:
            yield Text(
                f"validation at epoch {val['epoch']}: top-1 {val['top1_error']:.1%}, top-5 {val['top5_error']:.1%}; "
                f"best top-1 {best['top1_error']:.1%} at epoch {best['epoch']}"
            )

    def _count(self, line: Line) -> None:
        """Take what is drawn from a line: drawing itself is to cost little, however long the run."""
        if line["kind"] == "train":
            self._last = [*self._last, line][-RATE_LINES:]
            for key, values in self._values.items():
                values.append(line[key])
        else:
            self._val = line
            if self._best is None or line["top1_error"] < self._best["top1_error"]:
                self._best = line

    def _draw_curves(self) -> None:
        self._curves = {key: sparkline(values) for key, values in self._values.items()}

    def _bar(self, done: int, total: int) -> Any:
        return ProgressBar(total=total, completed=done, width=_CURVE)

    def _left(self, step: int) -> str:
        seconds = seconds_left(self._last, step, self._plan.steps, self._plan.batch_size)
        return "" if seconds is None else f"{duration_text(seconds)} left"


def _memory(megabytes: float) -> str:
    return bytes_text(megabytes * 1e6)

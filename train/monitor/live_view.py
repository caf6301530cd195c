"""Live display of a run on a terminal: progress, sparklines of loss and errors, and the time left. Drawn with rich.

A thread redraws the display twice a second from values that the training loop has already read from the devices. Other
output, and a line for each validation, scrolls above the display. The display disappears when the run ends.
"""

from __future__ import annotations

import termios
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live as RichLive
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from prep.console import Progress, bytes_text, duration_text, print_above
from train.monitor.console_view import ConsoleView, Line, RunLength, member_values, service_text, validation_text
from train.runs.run_dir import RATE_LINES, errors_text, seconds_left, shown_errors

_BLOCKS = "▁▂▃▄▅▆▇█"
_CURVE_WIDTH = 32  # characters of a sparkline
_NUMBERS_WIDTH = 28  # number of characters beside the progress bar: names and numbers, such as `step 12,345 of 450,000`
_DRAWINGS_PER_S = 2


def sparkline(values: Sequence[float], width: int = _CURVE_WIDTH) -> str:
    """Return a curve of at most `width` block characters. The values are divided among the characters.

    The height of a character shows the mean of its values. The lowest mean has the lowest block, and the highest mean
    has the highest block.
    """
    if not values:
        return ""
    width = min(width, len(values))
    parts = [values[k * len(values) // width : (k + 1) * len(values) // width] for k in range(width)]
    means = [sum(part) / len(part) for part in parts]
    low, span = min(means), (max(means) - min(means)) or 1.0
    return "".join(_BLOCKS[round((mean - low) / span * (len(_BLOCKS) - 1))] for mean in means)


class LiveView(ConsoleView):
    """The live display of a run."""

    def __init__(self, console: Console | None = None) -> None:
        """`console` is the terminal to draw on. None: standard error."""
        super().__init__()
        self._console = console or Console(stderr=True)
        self._live = RichLive(self, console=self._console, refresh_per_second=_DRAWINGS_PER_S, transient=True)
        self._step = 0  # step of the newest log line
        self._values = self._empty()
        self._curves = dict.fromkeys(self._values, "")
        self._recent: list[Line] = []  # the newest training lines, at most RATE_LINES
        self._val: Line | None = None
        self._best: Line | None = None
        self._steps_since: Callable[[], int] = int
        self._validation: tuple[str, Progress] | None = None  # label and counter of a validation in progress

    def begin(self, length: RunLength, lines: Sequence[Line], step: int) -> None:
        """Start the display."""
        self._length, self._step = length, step
        self._values = self._empty()
        for line in lines:
            self._count(line)
        self._draw_curves()
        self._keep_output(True)
        self._live.start(refresh=True)
        print_above(self._print)
        self._console.show_cursor(True)  # rich hides the cursor; after kill -9, the cursor would stay hidden

    def follow(self, steps_since_line: Callable[[], int]) -> None:
        """Set the function that returns the number of steps since the last log line."""
        self._steps_since = steps_since_line

    def train(self, line: Line) -> None:
        """Show the log line of an interval in the display."""
        self._count(line)
        self._draw_curves()
        self._step = line["step"]

    def validation(self, line: Line) -> None:
        """Print the log line of a validation above the display."""
        self._count(line)
        with suppress(OSError):  # the terminal was closed
            self._print(validation_text(line, self._length.classes))

    def _empty(self) -> dict[str, list[float]]:
        """Return an empty list for the values of each curve. The keys are the keys of metrics.jsonl."""
        return {key: [] for key in ("loss", *(key for _, key in shown_errors(self._length.classes)))}

    def _keep_output(self, keep: bool) -> None:
        """Set whether the terminal still prints pending output after Ctrl-C is pressed.

        By default, the terminal drops this output. If the terminal dropped lines of the display, the display would be
        erased at the wrong place.
        """
        try:
            number = self._console.file.fileno()
            mode = termios.tcgetattr(number)
            mode[3] = mode[3] | termios.NOFLSH if keep else mode[3] & ~termios.NOFLSH
            termios.tcsetattr(number, termios.TCSANOW, mode)
        except (OSError, ValueError, termios.error):  # the stream is not a terminal, or the terminal was closed
            return

    def _print(self, text: str) -> None:
        """Print a line above the display.

        If a line were not printed through rich, the display would overwrite the line.
        """
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """Show the progress of a validation inside the display."""
        counter = Progress(total, unit)
        self._validation = label, counter
        try:
            yield counter
        finally:
            self._validation = None

    def end(self) -> None:
        """Remove the display."""
        print_above(None)
        try:
            self._live.stop()
        finally:
            self._keep_output(False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw progress, sparklines, speed, memory, the service, and the last validation."""
        step = self._step + self._steps_since()
        table = Table.grid(padding=(0, 2))
        table.add_row("step", f"{step:,} of {self._length.steps:,}", self._bar(step, options.max_width))
        table.add_row("epoch", f"{step / self._length.steps_per_epoch:.2f}", self._left(step))
        for name, key in (("loss", "loss"), *shown_errors(self._length.classes)):
            form = ".3f" if key == "loss" else ".1%"
            values, curve = self._values[key], "" if options.ascii_only else self._curves[key]
            table.add_row(name, format(values[-1], form) if values else "", Text(curve, "cyan"))
        yield table
        if self._recent:
            line = self._recent[-1]
            if members := member_values(line):
                yield Text(f"losses of the {members.strip(' ()')}")
            memory = [_memory(line["memory_mb"]), *(f"GPU {_memory(n)}" for n in line.get("gpu_memory_mb", ()))]
            yield Text(
                f"lr {line['lr']:g}   {line['images_per_s']:,.1f} images/s   waits for stream "
                f"{line['waiting_share']:.1%}, stream waits {line['stream_waiting_share']:.1%}\n"
                f"memory {', '.join(memory)}"
            )
        if (service := self._service_status()) is not None:
            yield Text(service_text(service))
        if (validation := self._validation) is not None:  # the training thread can set _validation to None at any time
            label, counter = validation
            yield Text(f"{label}: {counter.done:,} of {counter.total:,} {counter.unit}", "cyan")
        elif (val := self._val) is not None and (best := self._best) is not None:
            yield Text(
                f"validation at epoch {val['epoch']}: {errors_text(val, self._length.classes)}; best top-1 error "
                f"{best['top1_error']:.1%} at epoch {best['epoch']}"
            )
        yield Text("")  # an empty row, in which the terminal shows ^C

    def _count(self, line: Line) -> None:
        """Keep those values of a log line that the display shows."""
        if line["kind"] == "train":
            self._recent = [*self._recent, line][-RATE_LINES:]
            for key, values in self._values.items():
                values.append(line[key])
        else:
            self._val = line
            if self._best is None or line["top1_error"] < self._best["top1_error"]:
                self._best = line

    def _draw_curves(self) -> None:
        self._curves = {key: sparkline(values) for key, values in self._values.items()}

    def _bar(self, step: int, display_width: int) -> ProgressBar:
        """Return the progress bar, in a width with which the display fits into the terminal."""
        width = max(1, min(_CURVE_WIDTH, display_width - _NUMBERS_WIDTH))
        return ProgressBar(total=self._length.steps, completed=step, width=width)

    def _left(self, step: int) -> str:
        seconds = seconds_left(self._recent, step, self._length.steps, self._length.batch_size)
        return "" if seconds is None else f"{duration_text(seconds)} left"


def _memory(megabytes: float) -> str:
    return bytes_text(megabytes * 1e6)

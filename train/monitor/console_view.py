"""Console output of a run: plain lines, or warnings only. The live display is in train/monitor/live_view.py.

All output goes to standard error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from pipeline.service.status import ServiceStatus
from prep.console import Progress, count_noun, progress, say
from train.runs.run_dir import shown_errors

Line = Mapping[str, Any]  # an object of metrics.jsonl
# Keys that only the lines of an ensemble have. Each value is a dict from a member's name to its loss or error.
MEMBER_LOSSES, MEMBER_TOP1_ERRORS = "member_losses", "member_top1_errors"


class RunLength(NamedTuple):
    """Length of a run, from which a view computes the epoch and the time left."""

    steps_per_epoch: int
    steps: int  # total number of steps of the run
    batch_size: int  # number of images in a step
    classes: int = 1000  # number of classes; with five classes or fewer, no top-5 error is shown


class ConsoleView:
    """Prints a line for each interval of --log-every steps and for each validation. Base class of the other views."""

    def __init__(self) -> None:
        self._service_status: Callable[[], ServiceStatus | None] = lambda: None
        self._length = RunLength(1, 1, 1)

    def note(self, text: str) -> None:
        """Print information, which `QuietView` omits."""
        say(text)

    def warn(self, text: str) -> None:
        """Print a warning, which every view shows."""
        say(text)

    def begin(self, length: RunLength, lines: Sequence[Line], step: int) -> None:
        """Begin the output of a run that starts or resumes after `step`. `lines` are the earlier log lines."""
        self._length = length

    def follow(self, steps_since_line: Callable[[], int]) -> None:
        """Set the function that returns the number of steps since the last log line."""

    def follow_service(self, status: Callable[[], ServiceStatus | None]) -> None:
        """Set the function that returns the current state of the stream's service, or None without a service."""
        self._service_status = status

    def train(self, line: Line) -> None:
        """Show the log line of an interval that has ended."""
        status = self._service_status()
        say(
            f"epoch {line['epoch']:6.2f}  step {line['step']:,}  loss {line['loss']:.3f}{member_values(line)}  "
            f"{_columns(line, self._length.classes)}  lr {line['lr']:g}  "
            f"{line['images_per_s']:,.1f} images/s  waits for stream {line['waiting_share']:.1%}, "
            f"stream waits {line['stream_waiting_share']:.1%}" + (f"  {service_text(status)}" if status else "")
        )

    def validation(self, line: Line) -> None:
        """Show the log line of a validation that has ended."""
        say(validation_text(line, self._length.classes))

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """Show the progress of a validation with prep.console.progress."""
        with progress(label, total, unit) as counter:
            yield counter

    def end(self) -> None:
        """End the output, because the run has finished, stopped or failed."""


class QuietView(ConsoleView):
    """Prints warnings only. Errors and the last line of the command are printed directly, not by a view."""

    def note(self, text: str) -> None:
        """Print nothing."""

    def train(self, line: Line) -> None:
        """Print nothing."""

    def validation(self, line: Line) -> None:
        """Print nothing."""

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """Count the images without printing."""
        yield Progress(total, unit)


def service_text(status: ServiceStatus) -> str:
    """Return the state of a service as text."""
    if status.state != "connected":
        return f"service {status.name} lost, this machine decodes"
    workers, batches = count_noun(status.workers, "worker"), count_noun(status.queue, "batch", "batches")
    return f"service {status.name}: {workers}, {batches} queued"


def validation_text(line: Line, classes: int) -> str:
    """Return the console line of a validation. `classes` is the network's number of classes."""
    return (
        f"epoch {line['epoch']:6.2f}  validation  loss {line['loss']:.3f}  {_columns(line, classes)}"
        f"{member_values(line)}  of {line['images']:,} images, centre view"
    )


def member_values(line: Line) -> str:
    """Return the losses or the top-1 errors of the members of an ensemble as text; "" for the line of a single run."""
    if losses := line.get(MEMBER_LOSSES):
        return f" (members {' '.join(f'{loss:.3f}' for loss in losses.values())})"
    if errors := line.get(MEMBER_TOP1_ERRORS):
        return f" (members, top-1 {' '.join(f'{error:.1%}' for error in errors.values())})"
    return ""


def _columns(line: Line, classes: int) -> str:
    return "  ".join(f"{name} {line[key]:6.1%}" for name, key in shown_errors(classes))

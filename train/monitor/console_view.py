"""What a person sees of a training: plain lines, nothing, or on a terminal a picture that moves (train/monitor/live_view.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from prep.console import Progress, progress, say

Line = Mapping[str, Any]  # of metrics.jsonl


class RunLength(NamedTuple):
    """How long a run is to be."""

    steps_per_epoch: int
    steps: int  # in all
    batch_size: int


class ConsoleView:
    """A line for each interval and each validation, on standard error."""

    def note(self, text: str) -> None:
        """Say what is good to know."""
        say(text)

    def warn(self, text: str) -> None:
        """Say what needs someone."""
        say(text)

    def begin(self, plan: RunLength, lines: Sequence[Line], step: int) -> None:
        """The run goes on from `step`; `lines` are those of its account so far."""

    def follow(self, steps: Callable[[], int]) -> None:
        """`steps()` tells at any time how many steps were made since the last line."""

    def train(self, line: Line) -> None:
        """An interval has ended."""
        say(
            f"epoch {line['epoch']:6.2f}  step {line['step']:,}  loss {line['loss']:.3f}  "
            f"top-1 {line['top1_error']:6.1%}  top-5 {line['top5_error']:6.1%}  lr {line['lr']:g}  "
            f"{line['images_per_s']:,.1f} images/s  waits for stream {line['waiting_share']:.1%}, "
            f"stream waits {line['stream_waiting_share']:.1%}"
        )

    def validation(self, line: Line) -> None:
        """A validation has ended."""
        say(validation_text(line))

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """As prep.console.progress."""
        with progress(label, total, unit) as report:
            yield report

    def end(self) -> None:
        """The run has ended, well or not."""


class QuietView(ConsoleView):
    """Nothing but warnings: errors and the last line are said elsewhere."""

    def note(self, text: str) -> None:
        """Say nothing."""

    train = validation = lambda self, line: None

    @contextmanager
    def progress(self, label: str, total: int, unit: str) -> Iterator[Progress]:
        """Count, and say nothing."""
        yield Progress(total, unit)


def validation_text(line: Line) -> str:
    """A validation on one line."""
    return (
        f"epoch {line['epoch']:6.2f}  validation  loss {line['loss']:.3f}  top-1 {line['top1_error']:6.1%}  "
        f"top-5 {line['top5_error']:6.1%}  of {line['images']:,} images, centre view"
    )

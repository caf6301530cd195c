"""Progress of a command on standard error, with rate and estimated time left (ETA).

On a terminal, progress is a bar. In a file or a pipe, progress is a series of lines.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from prep.console.output import say
from prep.console.text import bytes_text, duration_text, escaped


class Progress:
    """Count of finished work, with rate and time left (ETA).

    Call `advance(n)`, or call `update(done)` if the caller counts the work itself.
    """

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.started = total, unit, time.monotonic()
        self.done = 0  # units that are finished, out of `total`
        self.skipped = 0  # units of `done` that an earlier run finished; they do not count in the rate
        self.bad = 0  # bad inputs or records, including those that earlier runs found
        self.size_bytes = 0  # bytes that this run wrote

    def skip(self, n: int) -> None:
        """Count `n` units that were finished before this run."""
        self.skipped += n
        self.update(self.done + n)

    def advance(self, n: int = 1) -> None:
        """Count `n` more finished units."""
        self.update(self.done + n)

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        """Set the counts. `done` and `bad` include the work of earlier runs. `size_bytes` counts only this run."""
        self.done, self.bad, self.size_bytes = done, bad, size_bytes

    def rate(self) -> float:
        """Return the average number of units that this run has finished per second since its start."""
        return (self.done - self.skipped) / max(time.monotonic() - self.started, 1e-9)

    def eta_s(self) -> float:
        """Return the seconds left, estimated from the average rate of this run."""
        return max(0, self.total - self.done) / max(self.rate(), 1e-9)

    def notes(self) -> list[str]:
        """Return a text with the bytes written and a text with the number of bad inputs, each only if it is not 0."""
        return [bytes_text(self.size_bytes)] * bool(self.size_bytes) + [f"{self.bad:,} bad"] * bool(self.bad)


class _ProgressLines(Progress):
    """Progress as lines of text or JSON, at most one every `every_s` seconds.

    The first line is printed after `every_s` seconds.
    """

    def __init__(self, label: str, total: int, unit: str, as_json: bool, every_s: float = 5.0) -> None:
        super().__init__(total, unit)
        self.label, self.as_json, self.every_s, self.last_printed = label, as_json, every_s, time.monotonic()

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        super().update(done, bad, size_bytes)
        now = time.monotonic()
        if now - self.last_printed >= self.every_s and done:
            self.last_printed = now
            say(self._json_line() if self.as_json else self._text_line())

    def _json_line(self) -> str:
        line: dict[str, Any] = {"progress": self.label, "done": self.done, "total": self.total, "unit": self.unit}
        eta_s = round(self.eta_s()) if self.done > self.skipped else None
        line |= {f"{self.unit}_per_s": round(self.rate(), 1), "eta_s": eta_s}
        if self.size_bytes or self.bad:
            line |= {"bad": self.bad, "bytes": self.size_bytes}
        return json.dumps(line)

    def _text_line(self) -> str:
        parts = [f"{self.label}: {self.done:,} of {self.total:,} {self.unit}", f"{self.rate():,.1f} {self.unit}/s"]
        if self.done > self.skipped:
            parts.append(f"{duration_text(self.eta_s())} left")
        return ", ".join(parts + self.notes())


class _ProgressBar(Progress):
    """Progress as a bar on a terminal, drawn by the package rich."""

    def __init__(self, label: str, total: int, unit: str, bar: Any) -> None:
        super().__init__(total, unit)
        self.bar, self.task = bar, bar.add_task(escaped(label), total=total, rate="", note="")

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        super().update(done, bad, size_bytes)
        rate = f"{self.rate():,.0f} {self.unit}/s"
        self.bar.update(self.task, completed=done, rate=rate, note=", ".join(self.notes()))


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """Show progress with rate and time left (ETA) on standard error: as a bar on a terminal, otherwise as lines.

    The lines are JSON objects if the command was started with --json, and otherwise text.
    """
    if sys.stderr is None or not sys.stderr.isatty():
        context = click.get_current_context(silent=True)
        yield _ProgressLines(label, total, unit, as_json=context is not None and bool(context.params.get("as_json")))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _ProgressBar(label, total, unit, bar)

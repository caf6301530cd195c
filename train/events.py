"""The lines of metrics.jsonl as TensorBoard's event files, by tensorboard's own writer.

A run that goes on writes another file, which begins by telling TensorBoard to forget what came after the checkpoint
(SessionLog.START, as TensorFlow does after a restart): no point is there twice. What the folder lacks, because
tensorboard was installed later, or is there again from the checkpoint's step on, is taken from metrics.jsonl.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from prep.console import UserError
from train.folder import scalars


class NoTensorBoard(UserError):
    """The package is not there, or the folder cannot be written."""


class EventFiles:
    """An event file in `folder`, which begins with those of `lines` that are not in the files before it."""

    def __init__(self, folder: Path, lines: Iterable[Mapping[str, Any]], step: int) -> None:
        """`lines` are those of metrics.jsonl up to `step`, the step that the run goes on from.

        Raises NoTensorBoard.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            raise NoTensorBoard(
                "No event files for TensorBoard, which is not installed: pip install 'alexnet[tensorboard]'"
            ) from None
        self._event, self._summary = Event, Summary
        try:
            goes_on = _wait_for_a_later_name(folder)
            self._writer = EventFileWriter(str(folder))
            if goes_on:
                start = SessionLog(status=SessionLog.START)
                self._writer.add_event(Event(step=step, session_log=start))
            for line in lines:
                if not goes_on or line["step"] >= step:
                    self._add(line)
            self._writer.flush()
        except OSError as error:
            raise NoTensorBoard(f"{folder}: no event files for TensorBoard ({error}).") from None

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl; it is in the file when this returns. Raises NoTensorBoard."""
        try:
            self._add(line)
            self._writer.flush()
        except OSError as error:
            raise NoTensorBoard(f"No event files for TensorBoard from step {line['step']:,} on ({error}).") from None

    def close(self) -> None:
        """End the file."""
        with suppress(OSError):  # said before, when a line could not be written
            self._writer.close()

    def _add(self, line: Mapping[str, Any]) -> None:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line).items()]
        written = line.get("unix_time_s", time.time())  # lines of version 0.1.0 have no time
        self._writer.add_event(self._event(step=line["step"], wall_time=written, summary=self._summary(value=values)))


def _wait_for_a_later_name(folder: Path) -> bool:
    """Whether there are event files; if so, wait until a new one will be read after them.

    TensorBoard reads them by name, events.out.tfevents.SECOND.HOST.PROCESS.NUMBER, not by age within a second.
    """
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*.*")]
    while seconds and int(time.time()) <= max(seconds) < time.time() + 2:
        time.sleep(0.05)
    return bool(seconds)

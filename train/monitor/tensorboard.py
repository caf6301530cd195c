"""TensorBoard event files with the numbers of metrics.jsonl. TensorBoard's RecordWriter encodes the events.

A run that resumes after step S writes a new file, which begins with the event SessionLog.START of step S. TensorFlow
also writes this event after a restart. When TensorBoard reads the event, it discards all points that earlier files have
for step S and for later steps. The new file therefore repeats the points of step S, and TensorBoard shows each point
once. The first event file in a folder begins with the numbers that metrics.jsonl already has.

TensorBoard's EventFileWriter is not used. The thread of EventFileWriter delays events by up to two minutes, and fails
with a traceback if the disk is full.
"""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from prep.console import UserError
from prep.version import pip_command
from train.runs.append_log import AppendLog
from train.runs.run_dir import shown_errors, tensorboard_scalars


class NoTensorBoard(UserError):
    """Raised if the package tensorboard is not installed. MetricsLog prints the message and writes no event files."""


class EventFile:
    """A new TensorBoard event file of a run."""

    def __init__(self, folder: Path, lines: Iterable[Mapping[str, Any]], step: int, classes: int = 1000) -> None:
        """Create the file of a run that starts or resumes after `step`.

        lines    the lines of metrics.jsonl up to `step`
        classes  number of classes of the network; with five or fewer, the top-5 error is left out

        Raises NoTensorBoard if the package is not installed, and OSError if the folder cannot be created.
        """
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise NoTensorBoard(
                "TensorBoard event files are not written: tensorboard is not installed. Install "
                "tensorboard with: " + pip_command("tensorboard")
            ) from None
        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        self._left_out = {"top1_error", "top5_error"} - {key for _, key in shown_errors(classes)}
        folder.mkdir(exist_ok=True)
        path, is_first = _next_path(folder)
        self._file, now = AppendLog(path), time.time()
        events = [Event(wall_time=now, file_version="brain.Event:2")]
        if not is_first:
            events.append(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))
        self._write(events + [self._event_of(line) for line in lines if is_first or line["step"] >= step])

    def add(self, line: Mapping[str, Any]) -> None:
        """Write the numbers of a line of metrics.jsonl. While the disk is full, the numbers are held in memory."""
        self._write([self._event_of(line)])

    def _event_of(self, line: Mapping[str, Any]) -> Any:
        scalars = tensorboard_scalars({key: value for key, value in line.items() if key not in self._left_out})
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        wall_time = line.get("unix_time_s", time.time())  # lines of version 0.1.0 have no unix_time_s
        return self._event(step=line["step"], wall_time=wall_time, summary=self._summary(value=values))

    def _write(self, events: Iterable[Any]) -> None:
        records = BytesIO()
        writer = self._writer(records)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.add(records.getvalue())


def _next_path(folder: Path) -> tuple[Path, bool]:
    """Return the path of the next event file, and True if the folder has no event file yet.

    The name of the next file sorts after the names of the earlier files, because TensorBoard reads files in the order
    of the names. Files whose names have no time of ten digits are ignored.
    """
    names = (re.fullmatch(r"events\.out\.tfevents\.([0-9]{10})\..*", path.name, re.DOTALL) for path in folder.iterdir())
    seconds = [int(match[1]) for match in names if match]
    second = max([int(time.time()), *(earlier + 1 for earlier in seconds)])
    return folder / f"events.out.tfevents.{second:010d}.{platform.node()}.{os.getpid()}", not seconds

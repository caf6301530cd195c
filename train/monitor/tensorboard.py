"""The lines of metrics.jsonl as TensorBoard's event files, by tensorboard's own messages and writer of records.

A run that goes on writes another file, which begins by telling TensorBoard to forget what came after the checkpoint
(SessionLog.START, as TensorFlow does after a restart) and has what metrics.jsonl keeps of that step: no point is there
twice. Where there are no event files yet, all lines so far come first. Tensorboard's EventFileWriter is not used: its
thread would keep lines for two minutes, and end in a traceback on a full disk.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from prep.console import UserError
from train.runs.append_log import AppendLog
from train.runs.run_dir import tensorboard_scalars


class NoTensorBoard(UserError):
    """The package is not there."""


class EventFile:
    """One more event file in `folder`."""

    def __init__(self, folder: Path, lines: Iterable[Mapping[str, Any]], step: int) -> None:
        """`lines` are those of metrics.jsonl up to `step`, from which the run goes on. Raises NoTensorBoard."""
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            raise NoTensorBoard(
                "No event files for TensorBoard, which is not installed: pip install 'alexnet[tensorboard]'"
            ) from None
        self._event, self._summary, self._writer = Event, Summary, RecordWriter
        folder.mkdir(exist_ok=True)
        path, is_first = _next_path(folder)
        self._file, now = AppendLog(path), time.time()
        events = [Event(wall_time=now, file_version="brain.Event:2")]
        if not is_first:
            events.append(Event(wall_time=now, step=step, session_log=SessionLog(status=SessionLog.START)))
        self._write(events + [self._event_of(line) for line in lines if is_first or line["step"] >= step])

    def add(self, line: Mapping[str, Any]) -> None:
        """Write a line of metrics.jsonl; while the disk is full it waits."""
        self._write([self._event_of(line)])

    def _event_of(self, line: Mapping[str, Any]) -> Any:
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in tensorboard_scalars(line).items()]
        written = line.get("unix_time_s", time.time())  # lines of version 0.1.0 have no time
        return self._event(step=line["step"], wall_time=written, summary=self._summary(value=values))

    def _write(self, events: Iterable[Any]) -> None:
        records = BytesIO()
        writer = self._writer(records)
        for event in events:
            writer.write(event.SerializeToString())
        self._file.add(records.getvalue())


def _next_path(folder: Path) -> tuple[Path, bool]:
    """A name that TensorBoard, which goes by names, reads after those there; and whether there are none."""
    seconds = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.[0-9]*.*")]
    second = max([int(time.time()), *(there + 1 for there in seconds)])
    return folder / f"events.out.tfevents.{second:010d}.{platform.node()}.{os.getpid()}", not seconds

"""What a run tells of itself: metrics.jsonl, status.json, TensorBoard's event files, and a view on the terminal.

metrics.jsonl is the account, the others follow it. A run that goes on takes back the lines that came after its
checkpoint and writes them again, so that each is there once. While the disk is full, lines wait in memory.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.loader import TrainLoader
from prep.console import Terminated, UserError, disk_error
from prep.files import write_atomic
from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.monitor.console_view import ConsoleView, RunLength
from train.monitor.interval_metrics import IntervalMetrics
from train.monitor.tensorboard import EventFile, NoTensorBoard
from train.runs.append_log import AppendLog
from train.runs.run_dir import EVENTS, METRICS, STATUS, parse_line, read_raw_lines


class MetricsLog:
    """The account of one run; a context, whose end says how the run ended."""

    def __init__(self, run_dir: Path, plan: RunLength, step: int, validation_due: bool, view: ConsoleView) -> None:
        """Take back what is later than `step`, and its validation if that is due, then tell from there on.

        Raises as `sync`.
        """
        self.path, self.view, self.step = run_dir / METRICS, view, step
        last = step, "train" if validation_due else "val"  # a step's validation comes after its line of training
        found = [(text, line) for text in read_raw_lines(run_dir) if (line := parse_line(text)) is not None]
        kept = [(text, line) for text, line in found if (line["step"], line["kind"]) <= last]
        lines = [line for _, line in kept]
        try:
            if self.path.exists():
                write_atomic(self.path, b"".join(text + b"\n" for text, _ in kept))
            self._file, self._events = AppendLog(self.path), self._event_file(lines, step)
            self._say_status("training")
        except OSError as error:
            raise _not_written(run_dir, error) from None
        view.begin(plan, lines, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal was closed
            self.view.end()
        with suppress(OSError):  # what ended the run is to be said, not that a full disk holds no more of it
            if error is None:
                self._say_status("finished")
            elif isinstance(error, KeyboardInterrupt | Terminated):
                by = signal.Signals(error.signum).name if isinstance(error, Terminated) else "Ctrl-C"
                self._say_status("stopped", f"by {by}")
            else:
                self._say_status("failed", str(error) or type(error).__name__)

    def interval(self, loader: TrainLoader, model: AlexNet) -> IntervalMetrics:
        """The sums towards the next line."""
        interval = IntervalMetrics(loader, model)
        self.view.follow(lambda: interval.steps)
        return interval

    def train(self, line: dict[str, Any]) -> None:
        """Tell of an interval: epoch, step, lr, and what IntervalMetrics.read gives."""
        self._write(line)
        self.view.train(line)

    def validation(self, epoch: int, step: int, result: EvalResult) -> None:
        """Tell of a validation after `step`."""
        line = {"kind": "val", "epoch": epoch, "step": step, **vars(result)}
        self._write(line)
        self.view.validation(line)

    def sync(self) -> None:
        """Have every line on the disk, before a checkpoint takes them for written.

        Raises DiskFull where there is no room, UserError for another error of the disk.
        """
        try:
            self._file.sync()
        except OSError as error:
            raise _not_written(self.path, error) from None

    def _event_file(self, lines: list[dict[str, Any]], step: int) -> EventFile | None:
        try:
            return EventFile(self.path.with_name(EVENTS), lines, step)
        except NoTensorBoard as error:
            self.view.note(str(error))
            return None

    def _write(self, line: dict[str, Any]) -> None:
        line["unix_time_s"] = round(time.time(), 3)
        self.step = line["step"]
        error = self._file.add(f"{json.dumps(line)}\n".encode())
        if error is not None:
            self.view.warn(f"{self.path}: cannot be written ({error.strerror}). Its lines wait in memory; make room.")
        if self._events is not None:
            self._events.add(line)

    def _say_status(self, state: str, said: str = "") -> None:
        """Replace status.json; `state` is training, finished, stopped or failed, `said` why."""
        about = {"process": os.getpid(), "host": platform.node(), "unix_time_s": round(time.time(), 3)}
        status = {"state": state, "said": said, "step": self.step, **about}
        write_atomic(self.path.with_name(STATUS), json.dumps(status).encode())


def _not_written(path: Path, error: OSError) -> UserError:
    return disk_error(error, f"{path}: cannot be written ({error.strerror or error}). Make room.")

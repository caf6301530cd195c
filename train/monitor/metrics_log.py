"""The log of a run: metrics.jsonl, status.json, TensorBoard's event files, and the console view.

metrics.jsonl has all metrics. The event files and the console view show values from metrics.jsonl. A resumed run first
removes the lines of all steps after its checkpoint from metrics.jsonl, because the run repeats these steps. While the
disk is full, lines are held in memory.
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

from prep.console import Terminated, UserError, disk_error, encodable
from prep.files import write_atomic
from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.monitor.console_view import ConsoleView, RunLength
from train.monitor.interval_metrics import IntervalMetrics, StreamWaits
from train.monitor.tensorboard import EventFile, NoTensorBoard
from train.replicas.errors import OtherReplicaFailed, is_stop
from train.runs.append_log import AppendLog
from train.runs.run_dir import EVENTS, METRICS, STATUS, read_metrics_lines


class MetricsLog:
    """The log of one run, as a context manager. On exit, the log writes into status.json how the run ended."""

    def __init__(self, run_dir: Path, length: RunLength, step: int, validation_due: bool, view: ConsoleView) -> None:
        """Begin the log of a run that starts or resumes after `step`. The lines of later steps are removed.

        validation_due  True if the validation after `step` must still be computed. An old line of this validation is
                        then removed

        Raises DiskFull if there is no disk space, and UserError for any other disk error.
        """
        self.path, self.view, self.step = run_dir / METRICS, view, step
        # Order of lines: (step, kind). "train" < "val" holds, so the training line of a step comes before the
        # validation line.
        newest = step, "train" if validation_due else "val"
        kept = [(raw, line) for raw, line in read_metrics_lines(run_dir) if (line["step"], line["kind"]) <= newest]
        lines = [line for _, line in kept]
        try:
            if self.path.exists():
                write_atomic(self.path, b"".join(raw + b"\n" for raw, _ in kept))
            self._file, self._events = AppendLog(self.path), self._event_file(lines, step, length.classes)
            self._write_status("training")
        except OSError as error:
            raise _write_error(run_dir, error) from None
        view.begin(length, lines, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # the terminal was closed
            self.view.end()
        with suppress(OSError):  # a disk error here must not hide the error that ended the run
            if error is None:
                self._write_status("finished")
            elif isinstance(error, KeyboardInterrupt | Terminated):
                cause = signal.Signals(error.signum).name if isinstance(error, Terminated) else "Ctrl-C"
                self._write_status("stopped", f"by {cause}")
            elif isinstance(error, OtherReplicaFailed) and is_stop(error.kind):
                self._write_status("stopped", "by a signal to another replica")
            else:
                self._write_status("failed", str(error) or type(error).__name__)

    def interval(self, waits: StreamWaits, network: AlexNet) -> IntervalMetrics:
        """Begin an interval. Returns the IntervalMetrics that collects the values of the log line."""
        interval = IntervalMetrics(waits, network)
        self.view.follow(lambda: interval.steps)
        self.view.follow_service(waits.loader.service_status)
        return interval

    def train(self, line: dict[str, Any]) -> None:
        """Write the log line of an interval: kind, epoch, step, lr, and the metrics of IntervalMetrics.read."""
        self._write(line)
        self.view.train(line)

    def validation(self, epoch: int, step: int, result: EvalResult) -> None:
        """Write the log line of the validation after `step`."""
        line = {"kind": "val", "epoch": epoch, "step": step, **vars(result)}
        self._write(line)
        self.view.validation(line)

    def sync(self) -> None:
        """Write all lines to the disk and fsync the file. `sync` is called before a checkpoint is saved.

        Raises DiskFull if there is no disk space, and UserError for any other disk error.
        """
        try:
            self._file.sync()
        except OSError as error:
            raise _write_error(self.path, error) from None

    def _event_file(self, lines: list[dict[str, Any]], step: int, classes: int) -> EventFile | None:
        try:
            return EventFile(self.path.with_name(EVENTS), lines, step, classes)
        except NoTensorBoard as error:
            self.view.note(str(error))
            return None

    def _write(self, line: dict[str, Any]) -> None:
        line["unix_time_s"] = round(time.time(), 3)
        self.step = line["step"]
        error = self._file.add(f"{json.dumps(line)}\n".encode())
        if error is not None:
            self.view.warn(
                f"{self.path}: cannot be written ({error.strerror}). New lines are held in memory; free disk space."
            )
        if self._events is not None:
            self._events.add(line)

    def _write_status(self, state: str, reason: str = "") -> None:
        """Replace status.json. `state` is "training", "finished", "stopped" or "failed"."""
        process = {"process": os.getpid(), "host": platform.node(), "unix_time_s": round(time.time(), 3)}
        status = {"state": state, "said": encodable(reason), "step": self.step, **process}
        write_atomic(self.path.with_name(STATUS), json.dumps(status).encode())


def _write_error(path: Path, error: OSError) -> UserError:
    return disk_error(error, f"{path}: cannot be written ({error.strerror or error}). Free disk space.")

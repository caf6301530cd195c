"""What a run tells of itself: metrics.jsonl, status.json, TensorBoard's event files, and a view on the terminal.

metrics.jsonl is the account, the others follow it. A run that goes on takes back the lines that came after its
checkpoint and writes them again, so that each is there once. While the disk is full, lines wait in memory.
"""

from __future__ import annotations

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.loader import TrainLoader
from prep.console import Terminated
from prep.manifest import write_atomic
from train.evaluate import EvalResult
from train.events import EventFiles, NoTensorBoard
from train.folder import EVENTS, METRICS, STATUS, place_of, read_lines
from train.interval import Interval
from train.model import AlexNet
from train.view import Lines, Plan


class Log:
    """The account of one run; a context, whose end says how the run ended."""

    def __init__(self, run_dir: Path, plan: Plan, step: int, validation_due: bool, view: Lines) -> None:
        """Take back what is later than `step`, and its validation if that is due, then tell from there on."""
        self.path, self.view, self.step = run_dir / METRICS, view, step
        if self.path.exists():
            last = (step, 0 if validation_due else 1)
            kept = [text + "\n" for text in self.path.read_text().splitlines() if place_of(text) <= last]
            write_atomic(self.path, "".join(kept).encode())
        self._waiting = ""  # text that is still to be written
        self._size = self.path.stat().st_size if self.path.exists() else 0
        lines = read_lines(run_dir)
        self._events: EventFiles | None = None
        try:
            self._events = EventFiles(run_dir / EVENTS, lines, step)
        except NoTensorBoard as error:
            view.note(str(error))
        self._say_status("training")
        view.begin(plan, lines, step)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.view.end()
        if self._events is not None:
            self._events.close()
        with suppress(OSError):  # what ended the run is to be said, not that a full disk holds no more of it
            if error is None:
                self._say_status("finished")
            elif isinstance(error, KeyboardInterrupt | Terminated):
                self._say_status("stopped", "by SIGTERM" if isinstance(error, Terminated) else "by Ctrl-C")
            else:
                self._say_status("failed", str(error) or type(error).__name__)

    def interval(self, loader: TrainLoader, model: AlexNet) -> Interval:
        """The sums towards the next line."""
        interval = Interval(loader, model)
        self.view.follow(lambda: interval.steps)
        return interval

    def train(self, line: dict[str, Any]) -> None:
        """Tell of an interval: epoch, step, lr, and what Interval.read gives."""
        self._write(line)
        self.view.train(line)

    def validation(self, epoch: int, step: int, result: EvalResult) -> None:
        """Tell of a validation after `step`."""
        line = {"kind": "val", "epoch": epoch, "step": step, **vars(result)}
        self._write(line)
        self.view.validation(line)

    def _write(self, line: dict[str, Any]) -> None:
        line["unix_time_s"] = round(time.time(), 3)
        self.step = line["step"]
        self._append(json.dumps(line) + "\n")
        if self._events is not None:
            try:
                self._events.add(line)
            except NoTensorBoard as error:
                self._events = None
                self.view.warn(str(error))

    def _append(self, text: str) -> None:
        """Add to metrics.jsonl all that waits, or nothing: a part of it is taken back."""
        warned, self._waiting = bool(self._waiting), self._waiting + text
        content = self._waiting.encode()
        try:
            with open(self.path, "ab") as file:
                file.write(content)
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._size)
            if not warned:
                self.view.warn(f"{self.path}: cannot be written ({error.strerror}). Its lines wait; make room.")
        else:
            self._size, self._waiting = self._size + len(content), ""

    def _say_status(self, state: str, said: str = "") -> None:
        """Replace status.json; `state` is training, finished, stopped or failed, `said` why."""
        about = {"process": os.getpid(), "host": platform.node(), "unix_time_s": round(time.time(), 3)}
        status = {"state": state, "said": said, "step": self.step, **about}
        write_atomic(self.path.with_name(STATUS), json.dumps(status).encode())

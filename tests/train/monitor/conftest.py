"""Fixture `observed_run`: a run, its terminal output, and its status, which was read while the run was in progress."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.helpers.small_training import small_config
from train.monitor.metrics_log import MetricsLog
from train.runs.run import Run
from train.trainer.loop import fit

STATUS_COMMAND = (sys.executable, "-c", "from train.cli import main; main()", "status")


class ObservedRun(NamedTuple):
    """A run of 9 steps with a terminal as its standard error."""

    run_dir: Path
    terminal_output: str
    status_after_step_5: dict  # the JSON object that `alextrain status --json` printed in another process


@pytest.fixture(scope="session")
def observed_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> ObservedRun:
    run_dir = tmp_path_factory.mktemp("observed") / "run"
    status_json: list[str] = []
    log_line = MetricsLog.train

    def read_status_after_five(self: MetricsLog, line: dict) -> None:
        log_line(self, line)
        if line["step"] == 5:
            command = [*STATUS_COMMAND, str(run_dir), "--json"]
            status_json.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    terminal_fd, program_fd = pty.openpty()
    output: list[bytes] = []

    def read_terminal() -> None:
        try:
            while part := os.read(terminal_fd, 65536):
                output.append(part)
        except OSError:  # EIO means that `terminal` is closed
            pass

    reader = threading.Thread(target=read_terminal, daemon=True)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(program_fd, "w") as terminal:
        patch.setattr(MetricsLog, "train", read_status_after_five)
        patch.setattr(sys, "stderr", terminal)
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "110")
        fit(Run.open(small_config(store, run_dir)))
    reader.join()
    os.close(terminal_fd)
    return ObservedRun(run_dir, b"".join(output).decode(), json.loads(status_json[0]))

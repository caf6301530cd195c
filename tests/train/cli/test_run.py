"""`alextrain run` as a command: exit codes, --dry-run, --fork and --quiet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import train.cli
from tests.helpers.small_training import SMALL_ALEXNET
from train.config.architecture import ALEXNET, ARCHITECTURES
from train.monitor.metrics_log import MetricsLog
from train.runs import checkpoint


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_the_command_ends_with_the_code_of_its_signal_and_a_checkpoint(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    before, log_line = signal.getsignal(signal.SIGTERM), MetricsLog.train
    hung_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    def signalled(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == 1:  # a second signal would be obeyed at once
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(MetricsLog, "train", signalled)
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
    words = ["--store", str(store), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--recipe", "short"]
    try:
        ended = CliRunner().invoke(
            train.cli.main, ["run", *words, "--batch", "8", "--accumulate", "2", "--log-every", "1", "--keep", "1"]
        )
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGHUP, hung_up)
    assert ended.exit_code == code, ended.output
    assert "batch 8 in 2 parts" in ended.stderr and "to continue from here" in ended.stderr
    assert checkpoint.load(tmp_path / "run").step == 2  # the step that was under way
    monkeypatch.undo()
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
    ended = CliRunner().invoke(train.cli.main, ["run", *words, "--batch", "8", "--accumulate", "2", "--dry-run"])
    assert ended.exit_code == 0 and "run: would resume after step 2." in ended.stderr
    refused = CliRunner().invoke(train.cli.main, ["run", *words, "--batch", "4", "--dry-run"])
    assert refused.exit_code == 1 and "another batch size (8, here 4)" in refused.stderr
    fork_words = ["--batch", "8", "--fork", str(tmp_path / "fork"), "--epochs", "1"]
    ended = CliRunner().invoke(train.cli.main, ["run", *words, *fork_words, "--dry-run"])
    assert ended.exit_code == 0 and not (tmp_path / "fork").exists()
    assert f"into {tmp_path / 'fork'}" in ended.stderr and "run after step 2." in ended.stderr
    ended = CliRunner().invoke(train.cli.main, ["run", *words, *fork_words])
    assert ended.exit_code == 0, ended.output
    assert "begins with" in ended.stderr and "1 difference: accumulate" in ended.stderr
    assert checkpoint.load(tmp_path / "fork").step == 3 and checkpoint.load(tmp_path / "run").step == 2


def test_a_full_disk_has_its_exit_code_though_standard_error_goes_there_too() -> None:
    script = (
        "import click\nfrom prep.console import DiskFull, Group, say\n"
        "@click.group(cls=Group)\ndef main(): pass\n"
        "@main.command()\ndef run():\n    say('on the way')\n    raise DiskFull('no room')\nmain()"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", script, "run"], stderr=full, check=False)
    assert ended.returncode == 3


def test_quiet_leaves_the_last_line_and_the_answer(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ARCHITECTURES, "alexnet", replace(ALEXNET, widths=SMALL_ALEXNET.widths))
    words = ["run", "--store", str(store), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--batch", "10"]
    done = CliRunner().invoke(train.cli.main, [*words, "--epochs", "1", "--recipe", "short", "--quiet", "--json"])
    assert done.exit_code == 0, done.output
    (last,) = done.stderr.splitlines()
    assert "trained. Next: alextrain evaluate" in last and json.loads(done.stdout)["val"]["images"] == 12

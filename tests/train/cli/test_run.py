"""Tests of `alextrain run` as a command: exit codes, signals, --fork and --quiet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.helpers.alextrain import alextrain
from tests.helpers.small_training import SMALL_ALEXNET
from train.config.architecture import ARCHITECTURES
from train.monitor.metrics_log import MetricsLog
from train.runs import checkpoint


@pytest.fixture(autouse=True)
def small_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)


@pytest.fixture
def default_signals() -> Iterator[None]:
    """Reset SIGHUP to its default action, which nohup may have changed. Restore all handlers after the test."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


def run(store: Path, run_dir: Path, *options: str) -> Result:
    """Run `alextrain run` with the recipe `short` on a CPU."""
    return alextrain("run", "--store", store, "--run-dir", run_dir, "--gpus", "cpu", "--recipe", "short", *options)


def stopped_run(store: Path, run_dir: Path, signum: int, monkeypatch: pytest.MonkeyPatch) -> Result:
    """Run `alextrain run` with batches of 8 images in 2 parts, and send the signal `signum` during step 2."""
    log_line = MetricsLog.train

    def send_signal_after_one(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == 1:  # only one signal is sent, because a second signal would stop the run at once
            os.kill(os.getpid(), signum)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "train", send_signal_after_one)
        return run(store, run_dir, "--batch", "8", "--accumulate", "2", "--log-every", "1", "--keep", "1")


@pytest.mark.usefixtures("default_signals")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_command_with_its_exit_code_and_a_checkpoint_to_resume_or_fork(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int, code: int
) -> None:
    run_dir, fork_dir = tmp_path / "run", tmp_path / "fork"
    result = stopped_run(store, run_dir, signum, monkeypatch)
    assert result.exit_code == code, result.output
    assert "batch 8 in 2 parts" in result.stderr and "to continue from here" in result.stderr
    assert checkpoint.load(run_dir).step == 2  # the run finished step 2 before it stopped

    result = run(store, run_dir, "--batch", "8", "--accumulate", "2", "--dry-run")
    assert result.exit_code == 0 and "run: would resume after step 2." in result.stderr
    result = run(store, run_dir, "--batch", "4", "--dry-run")
    assert result.exit_code == 1 and "another batch size (8, here 4)" in result.stderr

    fork_options = ["--batch", "8", "--fork", str(fork_dir), "--epochs", "1"]
    result = run(store, run_dir, *fork_options, "--dry-run")
    assert result.exit_code == 0 and not fork_dir.exists()
    assert f"into {fork_dir}" in result.stderr
    assert "run after step 2, which is step 2 of the fork; 1 difference: epochs" in result.stderr
    result = run(store, run_dir, *fork_options)
    assert result.exit_code == 0, result.output
    assert "begins with" in result.stderr and "\n  epochs: 3 -> 1\n" in result.stderr
    assert checkpoint.load(fork_dir).step == 3 and checkpoint.load(run_dir).step == 2


def test_a_full_disk_ends_a_command_with_exit_code_3_also_if_standard_error_is_on_that_disk() -> None:
    script = (
        "import click\nfrom prep.console import DiskFull, Group, say\n"
        "@click.group(cls=Group)\ndef main(): pass\n"
        "@main.command()\ndef run():\n    say('in progress')\n    raise DiskFull('disk is full')\nmain()"
    )
    with open("/dev/full", "w") as full:
        result = subprocess.run([sys.executable, "-c", script, "run"], stderr=full, check=False)
    assert result.returncode == 3


def test_quiet_prints_only_the_last_line_and_the_json_object(store: Path, tmp_path: Path) -> None:
    result = run(store, tmp_path / "run", "--batch", "10", "--epochs", "1", "--quiet", "--json")
    assert result.exit_code == 0, result.output
    (last_line,) = result.stderr.splitlines()
    assert "trained. Next: alextrain evaluate" in last_line and json.loads(result.stdout)["val"]["images"] == 12

"""Tests of training on a disk that is full for some steps, or until the end.

A limit on file sizes simulates the full disk.
"""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from prep.console import DiskFull
from tests.helpers.small_training import assert_same_result, small_config
from tests.train.conftest import LimitFileSize
from train.monitor.metrics_log import MetricsLog
from train.runs.checkpoint import checkpoint_paths
from train.runs.run import Run
from train.trainer.loop import fit

LESS_THAN_A_CHECKPOINT = 60_000  # largest size of a file in bytes; a checkpoint is larger


def test_a_run_trains_on_while_the_disk_is_full_and_has_the_same_result(
    stores: dict[str, Path],
    uninterrupted_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit_file_size: LimitFileSize,
) -> None:
    """From step 3 to step 5, a file may be at most 30 bytes longer than metrics.jsonl is at step 3.

    Neither another line of metrics.jsonl nor a checkpoint fits into this size.
    """
    run_dir, log_line = tmp_path / "run", MetricsLog.train

    def fill_disk(self: MetricsLog, line: dict[str, Any]) -> None:
        if line["step"] == 3:
            limit_file_size(self.path.stat().st_size + 30)
        if line["step"] == 5:
            limit_file_size(None)
        log_line(self, line)

    monkeypatch.setattr(MetricsLog, "train", fill_disk)
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    messages = capsys.readouterr().err
    assert messages.count("Warning: ") == 2 and "failure 2 in a row; training stops at failure 3" in messages
    assert_same_result(run_dir, uninterrupted_run)


def test_a_disk_that_stays_full_ends_the_run_with_exit_code_3_and_keeps_the_previous_checkpoint(
    stores: dict[str, Path],
    uninterrupted_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    limit_file_size: LimitFileSize,
) -> None:
    run_dir = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", steps=2)))
    limit_file_size(LESS_THAN_A_CHECKPOINT)
    with pytest.raises(DiskFull, match=r"00000006\.pt: cannot be written \(File too large\)") as raised:
        fit(Run.open(small_config(stores["jpeg"], run_dir)))
    limit_file_size(None)
    assert raised.value.exit_code == 3 and capsys.readouterr().err.count("Warning: ") == 2
    assert [path.name[-5:-3] for path in checkpoint_paths(run_dir)] == ["02"] and not list(run_dir.glob(".*.tmp"))
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_a_full_disk_at_the_last_checkpoint_is_an_error(
    stores: dict[str, Path], tmp_path: Path, limit_file_size: LimitFileSize
) -> None:
    limit_file_size(LESS_THAN_A_CHECKPOINT)
    with pytest.raises(DiskFull):
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run", steps=2)))


@pytest.mark.parametrize("end", ["signal", "validation"])
def test_a_full_disk_is_an_error_after_a_signal_and_a_warning_before_the_last_validation(
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    limit_file_size: LimitFileSize,
    end: str,
) -> None:
    log_line, log_validation = MetricsLog.train, MetricsLog.validation

    def fill_disk(self: MetricsLog, line: dict[str, Any]) -> None:
        log_line(self, line)
        if line["step"] == (1 if end == "signal" else 3):
            limit_file_size(LESS_THAN_A_CHECKPOINT)
            if end == "signal":
                os.kill(os.getpid(), signal.SIGTERM)

    def free_disk(self: MetricsLog, *args: Any) -> None:
        limit_file_size(None)
        log_validation(self, *args)

    monkeypatch.setattr(MetricsLog, "train", fill_disk)
    monkeypatch.setattr(MetricsLog, "validation", free_disk)
    config = small_config(stores["ppm"], tmp_path / "run", steps=3, checkpoint_every=100)
    with pytest.raises(DiskFull) if end == "signal" else nullcontext():
        fit(Run.open(config))
    assert [path.name[-5:-3] for path in checkpoint_paths(config.run_dir)] == ([] if end == "signal" else ["03"])

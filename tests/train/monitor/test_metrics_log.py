"""Tests of metrics.jsonl and status.json of a run in progress, also on a full disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from prep.console import DiskFull, Terminated
from tests.helpers.metrics import RUN_LENGTH, points_of_metrics, tensorboard_points, training_line
from tests.train.conftest import LimitFileSize
from tests.train.monitor.conftest import ObservedRun
from train.monitor.console_view import QuietView
from train.monitor.metrics_log import MetricsLog
from train.runs.run_dir import read_metrics


def test_lines_are_held_in_memory_while_the_disk_is_full_and_written_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], limit_file_size: LimitFileSize
) -> None:
    """metrics.jsonl may grow by 100 bytes. A line that does not fit is removed, and is written again later."""
    with MetricsLog(tmp_path, RUN_LENGTH, 0, False, QuietView()) as log:
        log.train(training_line(1))
        size_bytes = (tmp_path / "metrics.jsonl").stat().st_size
        limit_file_size(size_bytes + 100)
        log.train(training_line(2))
        log.train(training_line(3))
        limit_file_size(None)
        (warning,) = [text for text in capsys.readouterr().err.splitlines() if "metrics.jsonl" in text]
        assert "free disk space" in warning
        assert (tmp_path / "metrics.jsonl").stat().st_size == size_bytes
        log.train(training_line(4))
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]
    assert sorted(tensorboard_points(tmp_path)) == sorted(points_of_metrics(tmp_path))


def test_a_disk_that_is_full_at_the_start_is_an_error_and_loses_no_line(
    tmp_path: Path, limit_file_size: LimitFileSize
) -> None:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(training_line(step)) + "\n" for step in (1, 2)))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    limit_file_size(10)
    with pytest.raises(DiskFull, match=r"cannot be written \(File too large\)\. Free disk space"):
        MetricsLog(tmp_path, RUN_LENGTH, 2, False, QuietView())
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (None, "finished", ""),
        (KeyboardInterrupt(), "stopped", "by Ctrl-C"),
        (Terminated(), "stopped", "by SIGTERM"),
        (ValueError("no\nroom"), "failed", "no\nroom"),
        (ValueError("photos-\udcff"), "failed", "photos-\\udcff"),  # a path with the byte 0xff
    ],
)
def test_status_json_holds_how_the_run_ended(
    tmp_path: Path, error: BaseException | None, state: str, reason: str
) -> None:
    try:
        with MetricsLog(tmp_path, RUN_LENGTH, 0, False, QuietView()) as log:
            assert json.loads((tmp_path / "status.json").read_bytes())["state"] == "training"
            log.train(training_line(7))
            if error:
                raise error
    except BaseException as raised:
        assert raised is error
    status = json.loads((tmp_path / "status.json").read_bytes())
    assert (status["state"], status["said"], status["step"], status["process"]) == (state, reason, 7, os.getpid())


def test_another_process_reads_the_status_of_a_run_in_progress(observed_run: ObservedRun) -> None:
    status = observed_run.status_after_step_5
    assert (status["state"], status["alive"], status["finished"]) == ("training", True, False)
    assert (status["step"], status["steps"], status["train"]["step"], status["val"]["epoch"]) == (5, 9, 5, 1)
    assert status["epoch"] == pytest.approx(5 / 3) and status["checkpoint"]["step"] == 4
    assert status["process"] == os.getpid() and status["seconds_since"] < 60

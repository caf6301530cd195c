"""Tests of a run's event files as TensorBoard reads them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.metrics import RUN_LENGTH, points_of_metrics, tensorboard_points, training_line
from tests.train.monitor.conftest import ObservedRun
from train.evaluation.evaluate import EvalResult
from train.monitor.console_view import ConsoleView, QuietView
from train.monitor.metrics_log import MetricsLog
from train.runs.run_dir import read_metrics


def test_tensorboard_reads_every_value_of_metrics_jsonl_once(observed_run: ObservedRun) -> None:
    """The run has three classes, so its top-5 errors, which are 0, are left out."""
    expected = [point for point in points_of_metrics(observed_run.run_dir) if not point[0].endswith("/top5_error")]
    assert sorted(tensorboard_points(observed_run.run_dir)) == sorted(expected)
    tags = {tag for tag, *_ in tensorboard_points(observed_run.run_dir)}
    assert {"train/loss", "train/lr", "val/top1_error", "gradient_norm/fc8", "weight_norm/conv1"} <= tags


def test_a_resumed_run_has_no_point_and_no_line_twice(tmp_path: Path) -> None:
    """Twice, the run is killed after it has logged step 5, and resumes from step 4.

    At the second resumption, the validation after step 4 is due, and is logged again. When the first MetricsLog is
    created, metrics.jsonl already has a line that is in no event file.
    """
    result = EvalResult(0.5, 0.25, 2.0, 12)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({**training_line(1), "unix_time_s": 5.0}) + "\n")
    first = MetricsLog(tmp_path, RUN_LENGTH, 1, False, QuietView())
    for step in (2, 3, 4):
        first.train(training_line(step))
    first.validation(1, 4, result)
    first.train(training_line(5))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "lo')
    for validation_due in (False, True):
        with MetricsLog(tmp_path, RUN_LENGTH, 4, validation_due, QuietView()) as log:
            if validation_due:
                log.validation(1, 4, result)
            log.train(training_line(5, loss=7.0))
        assert [line["kind"] for line in read_metrics(tmp_path)] == ["train"] * 4 + ["val", "train"]
    assert [(line["kind"], line["step"]) for line in read_metrics(tmp_path)] == [
        *[("train", step) for step in (1, 2, 3, 4)],
        ("val", 4),
        ("train", 5),
    ]
    points = tensorboard_points(tmp_path)
    assert sorted(points) == sorted(points_of_metrics(tmp_path))
    assert max(Counter((tag, step) for tag, step, _ in points).values()) == 1
    assert ("train/loss", 5, 7.0) in points


def test_a_run_without_tensorboard_continues_and_prints_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    with MetricsLog(tmp_path, RUN_LENGTH, 0, False, ConsoleView()) as log:
        log.train(training_line(1))
    hint, line = capsys.readouterr().err.splitlines()
    assert "pip install 'tensorboard>=2.16'" in hint and line.startswith("epoch   0.10")
    assert not (tmp_path / "tensorboard").exists() and len(read_metrics(tmp_path)) == 1

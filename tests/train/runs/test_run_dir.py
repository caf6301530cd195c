"""Tests of reading metrics.jsonl while a run writes this file, and of predicting the remaining time from the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.metrics import training_line
from train.runs.run_dir import read_metrics, seconds_left


def test_an_incomplete_line_is_ignored(tmp_path: Path) -> None:
    line = training_line(1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"kind": "trai')
    assert read_metrics(tmp_path) == [line]


def test_time_left_is_predicted_from_the_mean_rate_of_the_last_20_intervals() -> None:
    assert seconds_left([], 0, 10, 8) is None
    lines = [training_line(1, images_per_s=1.0), *(training_line(2, images_per_s=rate) for rate in [10.0, 40.0] * 10)]
    assert seconds_left(lines, 90, 100, 8) == pytest.approx(10 * 8 * (0.1 + 0.025) / 2)
    assert seconds_left(lines, 100, 100, 8) == 0

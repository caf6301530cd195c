"""The command `alexstream bench`: keys and values of its JSON output, and the upper limit of each stage's rate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main
from pipeline.diagnostics.bench import limit_stages


@pytest.mark.parametrize(("format", "preset"), [("jpeg", "alexnet"), ("ppm", "alexnet"), ("jpeg", "resnet")])
def test_bench_reports_the_speed_and_its_share_of_the_bound(stores: dict[str, Path], format: str, preset: str) -> None:
    args = ["--store", str(stores[format]), "--seconds", "0.2", "--batch", "8", "--threads", "1", "--preset", preset]
    result = CliRunner().invoke(main, ["bench", "--json", *args])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["images_per_s"] > 0 and answer["bound_images_per_s"] > 0
    assert answer["format"] == format and answer["threads"] == 1 and answer["batch"] == 8 and answer["device"] == "cpu"
    assert 0 < answer["share_of_bound"] < 100
    rates = list(answer["stages"].values())
    assert rates == sorted(rates, reverse=True) and rates[-1] == answer["images_per_s"]


def test_a_stage_is_never_faster_than_the_stages_that_it_includes() -> None:
    """In the second round of this example, the machine became faster after `decode` had been measured."""
    rates = {
        "bound": [9.0, 9.0],
        "read": [100.0, 50.0],
        "decode": [8.0, 6.0],
        "augment": [7.0, 7.0],
        "hand over": [5, 9],
    }
    limit_stages(rates)
    assert rates == {"bound": [9, 9], "read": [100, 50], "decode": [8, 6], "augment": [7, 6], "hand over": [5, 6]}

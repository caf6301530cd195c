"""The command `alexstream bench`: keys and values of its JSON output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from pipeline.cli import main


@pytest.mark.parametrize("format", ["jpeg", "ppm"])
def test_bench_reports_the_speed_and_its_share_of_the_bound(stores: dict[str, Path], format: str) -> None:
    args = ["--store", str(stores[format]), "--seconds", "0.2", "--batch", "8", "--threads", "1"]
    result = CliRunner().invoke(main, ["bench", "--json", *args])
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["images_per_s"] > 0 and answer["bound_images_per_s"] > 0
    assert answer["format"] == format and answer["threads"] == 1 and answer["batch"] == 8 and answer["device"] == "cpu"
    assert 0 < answer["share_of_bound"] < 100

"""Executes commands of alextrain one after another, on a CPU, with the paper's network at full width."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.alextrain import alextrain, json_lines


@pytest.mark.soak
def test_the_full_network_trains_resumes_is_evaluated_and_drawn(store: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = ["run", "--store", store, "--run-dir", run_dir, "--gpus", "cpu", "--batch", "10"]
    (answer,) = json_lines(*args, "--recipe", "released", "--steps", "1")
    assert answer["train"]["step"] == 1
    resumed = alextrain(*args, "--recipe", "released", "--epochs", "1", "--json")
    assert resumed.exit_code == 0 and "resumes after step 1" in resumed.stderr
    answer = json.loads(resumed.stdout)
    assert answer["val"]["images"] == 12 and answer["train"]["step"] == 3
    other = alextrain(*args, "--recipe", "paper", "--epochs", "1")
    assert other.exit_code == 1 and "another recipe (released, here paper)" in other.stderr
    (answer,) = json_lines("evaluate", run_dir, "--store", store)
    assert {"top1_error", "top5_error", "loss", "images"} <= set(answer)
    assert answer["images"] == 12 and answer["views"] == 10
    assert alextrain("figures", run_dir, "--no-images").exit_code == 0
    for name in ("learning-curve.png", "kernels.png"):
        assert np.asarray(Image.open(run_dir / name)).std() > 5

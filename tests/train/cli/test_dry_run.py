"""Tests of `alextrain run --dry-run`: the printed description of the run, and that no file is written."""

from __future__ import annotations

import json
from pathlib import Path

from tests.helpers.alextrain import alextrain
from train.config.recipes import RECIPES


def test_a_dry_run_describes_the_run_and_writes_nothing(store: Path, tmp_path: Path) -> None:
    args = ["--store", store, "--run-dir", tmp_path / "run", "--gpus", "cpu", "--batch", "8", "--dry-run"]
    result = alextrain("run", *args, "--epochs", "4", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["dry_run"] is True
    assert "both columns on cpu" in result.stderr and "3 steps an epoch, 12 steps in all" in result.stderr
    assert not (tmp_path / "run").exists()


def test_only_the_recipe_paper_warns_that_learning_starts_late(store: Path, tmp_path: Path) -> None:
    args = ["run", "--store", store, "--run-dir", tmp_path / "run", "--gpus", "cpu", "--batch", "8", "--dry-run"]
    messages = {recipe: alextrain(*args, "--recipe", recipe).stderr for recipe in RECIPES}
    assert {recipe for recipe, text in messages.items() if "learning starts late" in text} == {"paper"}
    assert alextrain(*args).stderr == messages["released"]  # `paper` is the default recipe
    larger_weights = ["--recipe", "paper", "--set", "init_std.conv3=0.03"]
    assert "learning starts late" not in alextrain(*args, *larger_weights).stderr

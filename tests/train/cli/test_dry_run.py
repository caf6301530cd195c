"""Tests that `alextrain run --dry-run` prints a description of the run and writes no file."""

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
    assert alextrain(*args).stderr == messages["released"]  # `released` is the default recipe
    larger_weights = ["--recipe", "paper", "--set", "init_std.conv3=0.03"]
    assert "learning starts late" not in alextrain(*args, *larger_weights).stderr


def test_the_learning_rate_of_the_recipe_large_follows_the_batch(store: Path, tmp_path: Path) -> None:
    args = ["run", "--store", store, "--run-dir", tmp_path / "run", "--gpus", "cpu", "--batch", "16", "--dry-run"]
    result = alextrain(*args, "--recipe", "large", "--json")
    assert result.exit_code == 0, result.output
    assert "learning rate before the schedule, lr · batch / 8192: 0.0195312 at 16\n" in result.stderr
    assert "large is unproven on ImageNet" in result.stderr
    assert json.loads(result.stdout)["lr"] == 10 * 16 / 8192
    scaled = alextrain(*args, "--recipe", "released", "--set", "lr_batch=128", "--json")
    assert json.loads(scaled.stdout)["lr"] == 0.01 / 8 and "unproven" not in scaled.stderr
    assert "learning rate before" not in alextrain(*args).stderr
    for epochs, is_warned in (("5", True), ("6", False)):
        short = alextrain(*args, "--recipe", "large", "--epochs", epochs)
        expected = "the warm-up takes 5 epochs, and the run ends after 5 epochs, so the learning rate never reaches lr."
        assert (expected in short.stderr) == is_warned
    refused = alextrain(*args[:-3], "--recipe", "large", "--dry-run")
    assert refused.exit_code == 2 and "--batch 8192: " in refused.stderr

"""Tests of loading trained networks from the checkpoints of runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.helpers.small_training import small_config
from train.config.recipes import SHORT
from train.runs.loading import load_trained
from train.runs.run import Run
from train.trainer.loop import fit


def test_a_trained_network_is_loaded_with_the_recipe_of_its_checkpoint(stores: dict[str, Path], tmp_path: Path) -> None:
    recipe = replace(SHORT, name="mine", input_divisor=3.0, schedule=())
    run_dir = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", recipe=recipe, steps=1)))
    network, state = load_trained(run_dir, ("cpu", "cpu"))
    assert network.recipe == recipe and len(state.classes) == 3

"""Fixtures: a small network instead of the architecture `torchvision`, and runs of small networks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.small_networks import SMALL, MakeRun
from train.config.architecture import ARCHITECTURES, Architecture
from train.config.recipe import Recipe
from train.config.run_config import RunConfig
from train.convert.import_torchvision import create_run
from train.model.alexnet import AlexNet
from train.runs.run import Run


@pytest.fixture(autouse=True)
def small_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "torchvision", SMALL["torchvision"])


@pytest.fixture
def make_run(store: Path, tmp_path: Path) -> MakeRun:
    """make_run(architecture, recipe) returns the folder of a run at step 0, and its network in evaluation mode."""

    def make(architecture: Architecture, recipe: Recipe) -> tuple[Path, AlexNet]:
        recipe = replace(recipe, init="he", init_bias=dict.fromkeys(("conv1", "conv3", "conv5", "fc6"), 0.2))
        config = RunConfig(store, recipe, 8, model=architecture, run_dir=tmp_path / "run")
        torch.manual_seed(5)
        network = AlexNet(3, recipe, ("cpu", "cpu"), architecture)
        with torch.no_grad():
            network.fc8.weight.mul_(20)
        create_run(Run.open(config), network)
        return config.run_dir, network.eval()

    return make

"""Tests of the random generators of a training: restored from a checkpoint, or seeded again."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.small_training import SMALL_ALEXNET, small_config
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs import checkpoint
from train.trainer.state import restore_state, seed_generators


def test_generators_are_restored_on_the_devices_of_the_checkpoint_and_seeded_again_on_others(
    uninterrupted_run: Path, stores: dict[str, Path]
) -> None:
    state, config = checkpoint.load(uninterrupted_run), small_config(stores["jpeg"], uninterrupted_run)
    network = AlexNet(3, config.recipe, ("cpu", "cpu"), SMALL_ALEXNET)
    optimizer, schedule = make_optimizer(network, config.recipe), Schedule(config.recipe)
    for devices, seed in ((["cuda:0", "cuda:1"], config.seed + 9), (["cpu", "cpu"], None)):
        restore_state(replace(state, devices=devices), config, network, optimizer, schedule)
        assert torch.equal(torch.get_rng_state(), state.random) == (seed is None)
        assert seed is None or torch.initial_seed() == seed


def test_columns_on_two_gpus_get_different_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch.manual_seed would give every GPU the same seed, and both columns would then have the same dropout masks."""
    seeds, devices = [], []
    monkeypatch.setattr("torch.manual_seed", seeds.append)
    monkeypatch.setattr("torch.cuda.manual_seed", seeds.append)
    monkeypatch.setattr("torch.cuda.device", lambda device: devices.append(device) or nullcontext())
    seed_generators(small_config(tmp_path, tmp_path, devices=("cuda:0", "cuda:1")), 0)
    assert len(set(seeds)) == 2 and devices == ["cuda:1"]
    seed_generators(small_config(tmp_path, tmp_path, devices=("cuda:0", "cuda:0")), 0)
    assert len(seeds) == 3

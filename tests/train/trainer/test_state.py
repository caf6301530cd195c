"""Random generators that a checkpoint restores, and those that are seeded anew."""

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
from train.trainer.state import restore_state


def test_on_other_devices_the_generators_begin_anew(uninterrupted_run: Path, stores: dict[str, Path]) -> None:
    state, plan = checkpoint.load(uninterrupted_run), small_config(stores["jpeg"], uninterrupted_run)
    model = AlexNet(3, plan.recipe, ("cpu", "cpu"), SMALL_ALEXNET)
    for devices, seed in ((["cuda:0", "cuda:1"], plan.seed + 9), (["cpu", "cpu"], None)):
        restore_state(
            replace(state, devices=devices), plan, model, make_optimizer(model, plan.recipe), Schedule(plan.recipe)
        )
        assert torch.equal(torch.get_rng_state(), state.random) == (seed is None)
        assert seed is None or torch.initial_seed() == seed


def test_columns_on_two_gpus_are_seeded_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Both columns would otherwise drop the same units: torch.manual_seed gives every GPU the same seed."""

    from train.trainer.state import seed_generators

    seeds, where = [], []
    monkeypatch.setattr("torch.manual_seed", seeds.append)
    monkeypatch.setattr("torch.cuda.manual_seed", seeds.append)
    monkeypatch.setattr("torch.cuda.device", lambda device: where.append(device) or nullcontext())
    seed_generators(small_config(tmp_path, tmp_path, devices=("cuda:0", "cuda:1")), 0)
    assert len(set(seeds)) == 2 and where == ["cuda:1"]
    seed_generators(small_config(tmp_path, tmp_path, devices=("cuda:0", "cuda:0")), 0)
    assert len(seeds) == 3

"""Tests that a training on several replicas has the result of one process, apart from rounding.

torchrun starts the replicas, which exchange values over gloo. Each replica sums over its own images, so the terms of a
sum are added in another order than in one process. After three steps, an update may differ by 1e-4 of its norm plus the
rounding of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.small_training import assert_same_result, metrics_without_clock
from tests.helpers.torchrun.job import TorchrunServer
from tests.train.replicas.train_program import run_config
from train.config.recipes import RECIPES
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.monitor.console_view import QuietView
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit

PROGRAM = Path(__file__).with_name("train_program.py")
EACH_RECIPE = [(name, {"recipe": name, "steps": 3}) for name in RECIPES]


def train(torchrun: TorchrunServer, replicas: int, store: Path, folder: Path, runs: Any) -> None:
    """Train `runs`, a list of (name, settings), on `replicas` replicas. The run folders are in `folder`."""
    folder.mkdir()
    (folder / "runs.json").write_text(json.dumps(runs))
    job = torchrun("--nproc-per-node", replicas, PROGRAM, store, folder / "runs.json")
    assert job.wait(120) == 0, job.stderr


def assert_same_training(store: Path, actual: Path, settings: dict[str, Any], alone: Path) -> None:
    """Assert that the run in `actual` equals, apart from rounding, a run of one process with `settings`."""
    config = run_config(store, alone, settings)
    fit(Run.open(config), QuietView())
    expected, state = checkpoint.load(alone), checkpoint.load(actual)
    start = _initial_parameters(config)
    for name, tensor in expected.parameters.items():
        update_norm = (tensor - start[name]).norm()
        error_norm = (tensor - state.parameters[name]).norm()
        # Float32 rounds each parameter by up to 2⁻²⁴ of its value.
        tolerance = 1e-4 * update_norm + 2**-24 * tensor.norm()
        assert error_norm <= tolerance, (name, float(error_norm / update_norm))
        assert update_norm > 0 or name == "conv2.bias"  # small weights: some units are always 0
    assert torch.equal(state.random, expected.random) and state.identity == expected.identity
    for line, expected_line in zip(metrics_without_clock(actual), metrics_without_clock(alone), strict=True):
        assert line.keys() == expected_line.keys() and line["lr" if line["kind"] == "train" else "images"]
        for key in ("kind", "step", "epoch", "top1_error", "top5_error"):
            assert line[key] == expected_line[key], key
        assert line["loss"] == pytest.approx(expected_line["loss"], rel=1e-5)
        for key in ("gradient_norm", "weight_norm") if line["kind"] == "train" else ():
            assert line[key] == pytest.approx(expected_line[key], rel=1e-3)


def _initial_parameters(config: RunConfig) -> dict[str, torch.Tensor]:
    torch.manual_seed(config.seed)
    return AlexNet(3, config.recipe, config.devices, config.model).joined_tensors()


def test_two_replicas_give_the_weights_and_metrics_of_one_process_with_every_recipe(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    """The runs have dropout. Each replica draws the random numbers for all images of a step, as one process does."""
    train(torchrun, 2, stores["ppm"], tmp_path / "two", EACH_RECIPE)
    for name, settings in EACH_RECIPE:
        assert_same_training(stores["ppm"], tmp_path / "two" / name, settings, tmp_path / name)


def test_four_replicas_and_batches_in_parts_give_the_weights_of_one_process(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    """The runs have no dropout, because dropout depends on the number of replicas if --accumulate is used."""
    parts = {"recipe": "short", "set": ["dropout=0"], "steps": 3, "accumulate": 2}
    runs = [("whole", {"recipe": "short", "steps": 3}), ("parts", parts)]
    train(torchrun, 4, stores["jpeg"], tmp_path / "four", runs)
    for name, settings in runs:
        assert_same_training(stores["jpeg"], tmp_path / "four" / name, settings, tmp_path / name)


def test_one_replica_under_torchrun_gives_the_bits_of_one_process(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    settings = {"recipe": "short", "steps": 2}
    train(torchrun, 1, stores["ppm"], tmp_path / "one", [("run", settings)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many threads as in the processes of torchrun
    fit(Run.open(run_config(stores["ppm"], tmp_path / "alone", settings)), QuietView())
    torch.set_num_threads(threads)
    assert_same_result(tmp_path / "one" / "run", tmp_path / "alone")

"""The norms of gradients and weights are compared with NumPy. Also tests peak memory."""

from __future__ import annotations

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.small_training import SMALL_ALEXNET
from tests.train.monitor.conftest import ObservedRun
from train.config.architecture import LAYERS
from train.config.recipes import SHORT
from train.model.alexnet import AlexNet
from train.monitor.interval_metrics import layer_norms, peak_memory
from train.runs import checkpoint
from train.runs.run_dir import read_metrics
from train.trainer.divergence import parameter_norms


def test_weight_norms_equal_those_of_numpy_on_the_checkpoint(observed_run: ObservedRun) -> None:
    lines = {line["step"]: line for line in read_metrics(observed_run.run_dir) if line["kind"] == "train"}
    for path in checkpoint.checkpoint_paths(observed_run.run_dir):
        state = torch.load(path, weights_only=True)
        for layer in LAYERS:
            weights = state["parameters"][f"{layer}.weight"].double().numpy()
            assert lines[state["step"]]["weight_norm"][layer] == pytest.approx(np.sqrt((weights**2).sum()), rel=1e-5)


def test_gradient_norms_equal_those_solved_from_two_checkpoints(observed_run: ObservedRun) -> None:
    """The test solves v' = momentum · v − decay · lr · w − lr · g for the gradient g, in float64.

    The velocity v and the weights w are from step 8, and the velocity v' is from step 9.
    """
    before, after = (torch.load(path, weights_only=True) for path in checkpoint.checkpoint_paths(observed_run.run_dir))
    last = [line for line in read_metrics(observed_run.run_dir) if line["kind"] == "train"][-1]
    assert (before["step"], after["step"], last["step"]) == (8, 9, 9)
    for layer in LAYERS:
        v, w, next_v = (
            state[part][f"{layer}.weight"].double().numpy()
            for state, part in ((before, "velocity"), (before, "parameters"), (after, "velocity"))
        )
        gradient = (SHORT.momentum * v - SHORT.weight_decay * last["lr"] * w - next_v) / last["lr"]
        assert last["gradient_norm"][layer] == pytest.approx(np.sqrt((gradient**2).sum()), rel=1e-3), layer


def test_a_frozen_layer_has_a_weight_norm_and_no_gradient_norm() -> None:
    model = AlexNet(3, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    for column in model.columns:
        column.conv2.weight.grad = torch.ones_like(column.conv2.weight)
    norms = layer_norms(parameter_norms(model))
    assert norms["gradient_norm"] == {"conv2": pytest.approx((2 * model.columns[0].conv2.weight.numel()) ** 0.5)}
    assert set(norms["weight_norm"]) == set(LAYERS)


def test_the_norm_of_a_large_layer_is_as_exact_as_in_float64() -> None:
    widths = replace(SMALL_ALEXNET.widths, conv5=256, fc6=1024)
    model = AlexNet(3, SHORT, ("cpu", "cpu"), replace(SMALL_ALEXNET, widths=widths))
    with torch.no_grad():
        exact = sum(float((column.fc6.weight.fill_(0.3).double() ** 2).sum()) for column in model.columns) ** 0.5
    assert layer_norms(parameter_norms(model))["weight_norm"]["fc6"] == pytest.approx(exact, rel=3e-5)


def test_memory_mb_is_the_peak_of_the_process(observed_run: ObservedRun) -> None:
    peaks_mb = [line["memory_mb"] for line in read_metrics(observed_run.run_dir) if line["kind"] == "train"]
    peak_now_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1.024e-3
    # Linux updates its memory counters with a delay, so the test allows a difference.
    assert 50 < peaks_mb[0] <= 1.02 * peaks_mb[-1] <= 1.05 * peak_now_mb


def test_peak_memory_lists_each_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 1e9 * (1 + device.index))
    gpu_0, gpu_1 = torch.device("cuda:0"), torch.device("cuda:1")
    assert peak_memory((gpu_0, gpu_0))["gpu_memory_mb"] == [1000.0]
    assert peak_memory((gpu_1, gpu_0))["gpu_memory_mb"] == [2000.0, 1000.0]
    assert set(peak_memory((torch.device("cpu"),))) == {"memory_mb"}

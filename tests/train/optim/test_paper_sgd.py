"""The parameter update against the paper's rule, written out in NumPy, and which parameters decay."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.config.architecture import ALEXNET, Widths
from train.config.recipes import PAPER, RELEASED
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import PaperSGD, make_optimizer

SMALL = replace(ALEXNET, widths=Widths(4, 4, 4, 4, 4, 6, 6))


def run(optimizer: torch.optim.Optimizer, w: torch.nn.Parameter, rates: list[float], grads: np.ndarray) -> np.ndarray:
    for lr, grad in zip(rates, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        w.grad = torch.tensor(grad)
        optimizer.step()
    return w.detach().numpy()


@pytest.fixture
def grads() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12, 5, 3))


RATES = [0.01] * 6 + [0.001] * 6


def test_update_is_the_papers_rule_over_a_drop_of_the_rate(grads: np.ndarray) -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3))
    expected, v = w.detach().numpy().copy(), np.zeros((5, 3))
    for lr, grad in zip(RATES, grads, strict=True):
        v = 0.9 * v - 0.0005 * lr * expected - lr * grad
        expected = expected + v
    found = run(PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9), w, RATES, grads)
    assert np.allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "gradients of another layout"])
def test_lists_of_one_device_are_updated_by_the_rule(
    momentum: float, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without native.c, as on a GPU: two parameters by one call, or one operator after the other."""
    monkeypatch.setattr("train.model.kernels.native", None)
    layout = torch.channels_last if last else torch.contiguous_format
    start = np.random.default_rng(1).normal(size=(2, 4, 3, 2, 2)).astype(np.float32)
    ours = [torch.nn.Parameter(torch.tensor(w).contiguous(memory_format=torch.channels_last)) for w in start]
    optimizer = PaperSGD([{"params": ours, "weight_decay": 0.05}], momentum)
    expected, v = start.astype(np.float64), np.zeros(start.shape)
    for lr, seed in zip([0.1] * 3 + [0.01] * 3, range(6), strict=True):
        grad = np.random.default_rng(seed).normal(size=start.shape).astype(np.float32)
        v = momentum * v - 0.05 * lr * expected - lr * grad
        expected = expected + v
        optimizer.param_groups[0]["lr"] = lr
        for w, g in zip(ours, grad, strict=True):
            w.grad = torch.tensor(g).contiguous(memory_format=layout)
        optimizer.step()
    assert np.allclose([w.detach().numpy() for w in ours], expected, rtol=1e-5, atol=1e-6)
    assert np.allclose([optimizer.velocity(w).numpy() for w in ours], v, rtol=1e-5, atol=1e-6)


def test_torch_sgd_is_the_same_at_one_rate_and_differs_after_a_drop(grads: np.ndarray) -> None:
    def both(rates: list[float]) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = (torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
        sgd = torch.optim.SGD([theirs], lr=1.0, momentum=0.9, weight_decay=0.0005)
        paper = PaperSGD([{"params": [ours], "weight_decay": 0.0005}], 0.9)
        return run(paper, ours, rates, grads), run(sgd, theirs, rates, grads)

    ours, theirs = both([0.01] * 12)
    assert np.allclose(ours, theirs, rtol=1e-12)
    ours, theirs = both(RATES)
    assert np.abs(ours - theirs).max() > 1e-3


def test_rate_zero_freezes_weights_and_velocity(grads: np.ndarray) -> None:
    w = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
    optimizer = PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9)
    run(optimizer, w, [0.01] * 3, grads[:3])
    weights, velocity = w.detach().clone(), optimizer.velocity(w).clone()
    run(optimizer, w, [0.0] * 4, grads[:4])
    assert torch.equal(w, weights) and torch.equal(optimizer.velocity(w), velocity)


def decays(recipe) -> dict[str, float]:
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
    by_parameter = {
        parameter: group["weight_decay"]
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }
    assert len(by_parameter) == len(list(model.parameters()))
    return {name: by_parameter[parameters[0]] for name, parameters in model.parameters_by_joined_name().items()}


def test_the_paper_decays_everything_the_code_only_weights() -> None:
    assert set(decays(PAPER).values()) == {0.0005}
    assert all(decay == (0.0 if name.endswith(".bias") else 0.0005) for name, decay in decays(RELEASED).items())

"""PaperSGD is compared with the paper's rule in NumPy and with torch.optim.SGD. Also tests weight decays of recipes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.config.architecture import ALEXNET, Widths
from train.config.recipe import Recipe
from train.config.recipes import PAPER, RELEASED
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import PaperSGD, make_optimizer

SMALL = replace(ALEXNET, widths=Widths(4, 4, 4, 4, 4, 6, 6))


def make_steps(
    optimizer: torch.optim.Optimizer, w: torch.nn.Parameter, rates: list[float], grads: np.ndarray
) -> np.ndarray:
    """Return `w` after the last step. Step k has the learning rate `rates[k]` and the gradient `grads[k]`."""
    for lr, grad in zip(rates, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        w.grad = torch.tensor(grad)
        optimizer.step()
    return w.detach().numpy()


@pytest.fixture
def grads() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12, 5, 3))


RATES = [0.01] * 6 + [0.001] * 6  # the rate drops after six steps


def test_the_update_is_the_papers_rule_before_and_after_the_rate_drops(grads: np.ndarray) -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3))
    expected, v = w.detach().numpy().copy(), np.zeros((5, 3))
    for lr, grad in zip(RATES, grads, strict=True):
        v = 0.9 * v - 0.0005 * lr * expected - lr * grad
        expected = expected + v
    actual = make_steps(PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9), w, RATES, grads)
    assert np.allclose(actual, expected, rtol=1e-13)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("same_layout", [True, False], ids=["channels last", "gradients of another layout"])
def test_several_parameters_are_updated_by_the_rule_without_compiled_kernels(
    momentum: float, same_layout: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without C kernels, one fused call updates both parameters.

    PyTorch operators update them instead if the gradients have another layout than the parameters.
    """
    monkeypatch.setattr("train.model.kernels.native", None)
    layout = torch.channels_last if same_layout else torch.contiguous_format
    start = np.random.default_rng(1).normal(size=(2, 4, 3, 2, 2)).astype(np.float32)
    parameters = [torch.nn.Parameter(torch.tensor(w).contiguous(memory_format=torch.channels_last)) for w in start]
    optimizer = PaperSGD([{"params": parameters, "weight_decay": 0.05}], momentum)
    expected, v = start.astype(np.float64), np.zeros(start.shape)
    for lr, seed in zip([0.1] * 3 + [0.01] * 3, range(6), strict=True):
        grad = np.random.default_rng(seed).normal(size=start.shape).astype(np.float32)
        v = momentum * v - 0.05 * lr * expected - lr * grad
        expected = expected + v
        optimizer.param_groups[0]["lr"] = lr
        for w, g in zip(parameters, grad, strict=True):
            w.grad = torch.tensor(g).contiguous(memory_format=layout)
        optimizer.step()
    assert np.allclose([w.detach().numpy() for w in parameters], expected, rtol=1e-5, atol=1e-6)
    assert np.allclose([optimizer.velocity(w).numpy() for w in parameters], v, rtol=1e-5, atol=1e-6)


def test_torch_sgd_agrees_at_a_constant_rate_and_differs_after_the_rate_drops(grads: np.ndarray) -> None:
    def update_by_both(rates: list[float]) -> tuple[np.ndarray, np.ndarray]:
        w, other_w = (torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
        paper_sgd = PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9)
        torch_sgd = torch.optim.SGD([other_w], lr=1.0, momentum=0.9, weight_decay=0.0005)
        return make_steps(paper_sgd, w, rates, grads), make_steps(torch_sgd, other_w, rates, grads)

    by_paper, by_torch = update_by_both([0.01] * 12)
    assert np.allclose(by_paper, by_torch, rtol=1e-12)
    by_paper, by_torch = update_by_both(RATES)
    assert np.abs(by_paper - by_torch).max() > 1e-3


def test_a_rate_of_zero_freezes_weights_and_velocity(grads: np.ndarray) -> None:
    w = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
    optimizer = PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9)
    make_steps(optimizer, w, [0.01] * 3, grads[:3])
    weights, velocity = w.detach().clone(), optimizer.velocity(w).clone()
    make_steps(optimizer, w, [0.0] * 4, grads[:4])
    assert torch.equal(w, weights) and torch.equal(optimizer.velocity(w), velocity)


def weight_decays(recipe: Recipe) -> dict[str, float]:
    """Return {name of a joined parameter: its weight decay}."""
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
    decay_of = {
        parameter: group["weight_decay"]
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }
    assert len(decay_of) == len(list(model.parameters()))
    return {name: decay_of[parameters[0]] for name, parameters in model.parameters_by_joined_name().items()}


def test_the_paper_decays_every_parameter_and_the_released_code_only_weights() -> None:
    assert set(weight_decays(PAPER).values()) == {0.0005}
    assert all(decay == (0.0 if name.endswith(".bias") else 0.0005) for name, decay in weight_decays(RELEASED).items())

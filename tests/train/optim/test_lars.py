"""LARS is compared with algorithm 1 of arXiv 1708.03888 in float64 NumPy, also for layers divided into columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.small_training import SMALL_ALEXNET
from train.config.recipe import Polynomial, Recipe
from train.config.recipes import LARGE, SHORT
from train.model import kernels
from train.model.alexnet import AlexNet
from train.optim.lars import LocalRates
from train.optim.paper_sgd import PaperSGD, make_optimizer
from train.optim.rate_tensor_update import RateTensorUpdate, Trio
from train.optim.schedule import Schedule

TRUST, MOMENTUM, DECAY = 0.02, 0.9, 0.05
SHAPES = ((6, 5, 3, 3), (100, 700), (90,), (7,))  # the second tensor needs two blocks of the C kernel
WARMUP = replace(
    LARGE, lr=4.0, lr_batch=64, epochs=20, schedule=Polynomial(warmup_epochs=5, start=0.1, power=2, end=1e-6)
)


def formula(
    weights: Sequence[np.ndarray], gradients: Sequence[Sequence[np.ndarray]], rates: Sequence[float]
) -> list[np.ndarray]:
    """Return the weights after algorithm 1 of the LARS paper, where w = w − v. (This project computes w = w + v.)

    The last two tensors have no weight decay.
    """
    after = []
    for index, start in enumerate(weights):
        w, v, beta = start.astype(np.float64), np.zeros(start.shape), DECAY if index < 2 else 0.0
        for rate, step in zip(rates, gradients, strict=True):
            g = step[index].astype(np.float64)
            norms = np.linalg.norm(w), np.linalg.norm(g)
            local = TRUST * norms[0] / (norms[1] + beta * norms[0]) if min(norms) > 0 else 1.0
            v = MOMENTUM * v + rate * local * (g + beta * w)
            w = w - v
        after.append(w)
    return after


def example(steps: int, dtype: type = np.float32) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Return weights, and the gradients of each step. The last tensor of weights starts at 0, like a bias."""
    rng = np.random.default_rng(5)
    weights = [rng.normal(size=shape).astype(dtype) for shape in SHAPES[:3]] + [np.zeros(SHAPES[3], dtype)]
    return weights, [[(0.01 * rng.normal(size=shape)).astype(dtype) for shape in SHAPES] for _ in range(steps)]


def channels_last(values: Tensor) -> Tensor:
    """Return a copy in the layout of AlexNet's parameters."""
    layout = torch.channels_last if values.dim() == 4 else torch.contiguous_format
    return values.clone(memory_format=layout)


def train(
    weights: Sequence[np.ndarray],
    gradients: Sequence[Sequence[np.ndarray]],
    rates: Sequence[float],
    prepare: Callable[[PaperSGD], None] = lambda optimizer: None,
) -> list[np.ndarray]:
    parameters = [nn.Parameter(channels_last(torch.tensor(w))) for w in weights]
    groups = [{"params": parameters[:2], "weight_decay": DECAY}, {"params": parameters[2:]}]
    optimizer = PaperSGD(groups, MOMENTUM, LocalRates(TRUST, [[p] for p in parameters]))
    prepare(optimizer)
    for rate, step in zip(rates, gradients, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = channels_last(torch.tensor(gradient))
        if optimizer._rate_tensor_update is not None:
            optimizer.write_rates()
        optimizer.step()
    return [p.detach().numpy() for p in parameters]


@pytest.mark.parametrize("steps", [1, 20])
@pytest.mark.parametrize("kind", ["kernel", "operators", "float64", "rate tensor", "rate tensor in Triton"])
def test_the_update_is_the_formula_of_the_paper(steps: int, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 20 learning rates are a warm-up and then a polynomial decay.

    The batch size is half of `lr_batch`, so each learning rate is half of the recipe's.
    """
    if kind != "kernel":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the C kernels are not compiled")
    schedule = Schedule(WARMUP, batch_size=32)
    # The Triton kernel makes fewer steps, because Triton's interpreter is slow.
    steps = min(steps, 3) if kind == "rate tensor in Triton" else steps
    weights, gradients = example(steps, np.float64 if kind == "float64" else np.float32)
    rates = [schedule.learning_rates(epoch)[0] for epoch in np.arange(steps) * 0.5]

    def prepare(optimizer: PaperSGD) -> None:
        if kind.startswith("rate tensor"):
            optimizer.use_rate_tensor()
        if kind == "rate tensor in Triton":
            pytest.importorskip("triton", reason="Triton is not installed")
            update = optimizer._rate_tensor_update
            monkeypatch.setattr(update, "run_operators", lambda: (update.write_addresses(), update.launch()))

    actual = train(weights, gradients, rates, prepare)
    for before, a, expected in zip(weights, actual, formula(weights, gradients, rates), strict=True):
        assert np.abs(expected - before).max() > 1e-4  # the weights changed by much more than the tolerance
        tolerance = 1e-12 if kind == "float64" else 2e-6
        np.testing.assert_allclose(a, expected, rtol=tolerance, atol=tolerance)


def test_without_trust_the_optimizer_has_no_local_rates() -> None:
    network = AlexNet(3, LARGE, architecture=SMALL_ALEXNET)
    assert make_optimizer(network, LARGE)._local_rates is not None
    assert make_optimizer(network, replace(LARGE, lars_trust=None))._local_rates is None


@pytest.mark.parametrize("native", [True, False], ids=["kernel", "operators"])
def test_norms_are_exact_for_many_values(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of PyTorch's float32 norm of 4 million values would exceed the tolerance of this test."""
    if not native:
        monkeypatch.setattr(kernels, "native", None)
    values = torch.randn(2053, 2001, generator=torch.Generator().manual_seed(3))
    parameter = nn.Parameter(values)
    parameter.grad = 3 * values
    (rate,) = LocalRates(1.0, [[parameter]])({parameter: 0.0}).values()
    assert rate.dtype == torch.float64 and abs(rate.item() - 1 / 3) < 1e-7
    parameter.grad = torch.ones_like(values)
    (rate,) = LocalRates(1.0, [[parameter]])({parameter: 0.5}).values()
    norms = np.linalg.norm(values.double().numpy()), np.sqrt(values.numel())
    assert rate.item() == pytest.approx(norms[0] / (norms[1] + 0.5 * norms[0]), rel=1e-7)


def two_columns(recipe: Recipe = LARGE) -> tuple[AlexNet, PaperSGD, dict[str, Tensor]]:
    """Return a network of two columns, its optimizer, and {name of a joined parameter: random gradient}."""
    torch.manual_seed(0)
    network = AlexNet(5, recipe, architecture=SMALL_ALEXNET)
    optimizer = make_optimizer(network, recipe)
    Schedule(recipe).apply(optimizer, 50)
    return network, optimizer, {name: torch.randn(t.shape) for name, t in network.joined_tensors().items()}


def test_two_columns_are_updated_like_the_joined_layers() -> None:
    """A layer that is divided into columns still has one norm, which differs from the norms of the two halves."""
    network, optimizer, gradients = two_columns()
    gradients = {name: channels_last(g) for name, g in gradients.items()}
    before = network.joined_tensors()
    joined = {name: nn.Parameter(channels_last(t)) for name, t in before.items()}
    one_column = PaperSGD(
        [{"params": list(joined.values()), "weight_decay": LARGE.weight_decay, "lr": optimizer.param_groups[0]["lr"]}],
        LARGE.momentum,
        LocalRates(LARGE.lars_trust, [[p] for p in joined.values()]),
    )
    for step in range(3):
        factor = {name: torch.linspace(1, 3 + step, len(g)) for name, g in gradients.items()}  # the two halves differ
        scaled = {name: (g.movedim(0, -1) * factor[name]).movedim(-1, 0) for name, g in gradients.items()}
        scaled = {name: channels_last(g) for name, g in scaled.items()}
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        network.load_joined_tensors(scaled, lambda p: p.grad)
        for name, parameter in joined.items():
            parameter.grad = scaled[name]
        optimizer.step()
        one_column.step()
    after, velocity = network.joined_tensors(), network.joined_tensors(optimizer.velocity)
    for name, parameter in joined.items():
        assert not torch.equal(after[name], before[name]), name
        torch.testing.assert_close(after[name], parameter.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(velocity[name], one_column.velocity(parameter), rtol=1e-5, atol=1e-10)


def test_a_frozen_layer_keeps_its_weights_and_the_others_their_rates() -> None:
    network, optimizer, _ = two_columns()
    for parameter in network.parameters():
        parameter.grad = torch.ones_like(parameter)
    by_name = network.parameters_by_joined_name()
    rates = optimizer._local_rates(dict.fromkeys(network.parameters(), 0.0))
    assert all(torch.equal(rates[p], rates[columns[0]]) for columns in by_name.values() for p in columns)
    for group in optimizer.param_groups:
        if group["name"].startswith("conv1"):
            group["lr"] = 0.0
    frozen = optimizer._local_rates({p: 0.0 for name, ps in by_name.items() if name[:5] != "conv1" for p in ps})
    assert all(torch.equal(rates[p], rate) for p, rate in frozen.items()) and len(frozen) == len(rates) - 4
    before = network.joined_tensors()
    optimizer.step()
    changed = {name for name, t in network.joined_tensors().items() if not torch.equal(t, before[name])}
    assert changed == {name for name in by_name if name[:5] != "conv1"}


def test_a_nan_gradient_is_not_hidden() -> None:
    network, optimizer, _ = two_columns(replace(LARGE, weight_decay=0.0))
    for parameter in network.parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert all(p.isnan().all() for p in network.parameters())


def test_the_scales_of_a_rate_tensor_are_those_of_its_parameters() -> None:
    """Parameters without a gradient have no scale, and stay unchanged."""
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(3)]
    parameters[0].grad, parameters[2].grad = torch.ones(3), torch.ones(3)
    update = RateTensorUpdate([Trio(p, torch.zeros(3), 0, 0.0) for p in parameters], groups=1, momentum=0.9)
    update.write_rates([0.5])
    update.run({parameters[2]: torch.tensor(0.25), parameters[0]: torch.tensor(0.5)})
    assert [p[0].item() for p in parameters] == [0.75, 1.0, 0.875]
    assert SHORT.lars_trust is None

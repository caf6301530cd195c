"""The update with learning rates in a tensor: the Triton kernel and the operators are compared with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from train.optim.paper_sgd import PaperSGD
from train.optim.rate_tensor_update import RateTensorUpdate, Trio

SHAPES = ((3, 5, 3, 3), (4100,), (7, 2), (1,))
GROUPS, DECAYS, RATES = (0, 1, 1, 0), (0.0, 0.01, 0.5, 0.0), (0.25, 0.125)
MOMENTUM = 0.9


def make_trios() -> list[Trio]:
    rng = torch.Generator().manual_seed(1)
    trios = []
    for shape, group, decay in zip(SHAPES, GROUPS, DECAYS, strict=True):
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        w, v, g = (torch.randn(shape, generator=rng).contiguous(memory_format=layout) for _ in range(3))
        parameter = nn.Parameter(w)
        parameter.grad = g
        trios.append(Trio(parameter, v, group, decay))
    return trios


@pytest.mark.parametrize("kind", ["kernel", "operators"])
def test_update_equals_the_formula(kind: str) -> None:
    """Between the two updates, the learning rate of one group changes. One parameter has no gradient."""
    trios = make_trios()
    trios[3].parameter.grad = None
    update = RateTensorUpdate(trios, groups=2, momentum=MOMENTUM)
    expected = [tuple(t.detach().numpy().astype(np.float64).copy() for t in trio[:2]) for trio in trios]
    for rates in (RATES, (RATES[0], 0.5)):
        update.write_rates(rates)
        if kind == "kernel":
            pytest.importorskip("triton", reason="Triton is not installed")
            update.write_addresses()
            update.launch()
        else:
            update.run()
        for index, (w, v) in enumerate(expected[:3]):
            gradient = trios[index].parameter.grad
            assert gradient is not None
            g, rate = gradient.numpy(), rates[GROUPS[index]]
            v[...] = MOMENTUM * v - rate * DECAYS[index] * w - rate * g
            w += v
    for trio, (w, v) in zip(trios, expected, strict=True):
        np.testing.assert_allclose(trio.parameter.detach().numpy(), w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(trio.velocity.numpy(), v, rtol=1e-5, atol=1e-6)


def test_a_gradient_of_another_layout_is_refused() -> None:
    trios = make_trios()
    assert trios[0].parameter.grad is not None
    trios[0].parameter.grad = trios[0].parameter.grad.contiguous()
    with pytest.raises(ValueError, match="memory layout"):
        RateTensorUpdate(trios, 2, MOMENTUM).write_addresses()


def test_a_gradient_at_an_odd_address_is_refused() -> None:
    trios = make_trios()
    w = trios[1].parameter
    w.grad = torch.zeros(w.numel() + 1)[1:]
    with pytest.raises(ValueError, match="16 bytes"):
        RateTensorUpdate(trios, 2, MOMENTUM).write_addresses()


def test_parameters_of_two_types_are_refused() -> None:
    half = nn.Parameter(torch.zeros(2, dtype=torch.float16))
    with pytest.raises(ValueError, match="float32"):
        RateTensorUpdate([*make_trios(), Trio(half, torch.zeros(2), 0, 0.0)], 2, MOMENTUM)


def test_optimizer_with_a_rate_tensor_takes_the_same_steps() -> None:
    """The test compares three steps of PaperSGD with and without a rate tensor.

    The learning rate of one group changes.
    """
    parameters = [[trio.parameter for trio in make_trios()] for _ in range(2)]
    optimizers = [
        PaperSGD([{"params": p[:2], "weight_decay": 0.01, "lr": 0.1}, {"params": p[2:], "lr": 0.2}], MOMENTUM)
        for p in parameters
    ]
    optimizers[1].use_rate_tensor()
    for rate in (0.1, 0.1, 0.01):
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
        optimizers[1].write_rates()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(*parameters, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)

"""The fused parameter update has the same bits as torch's private kernel.

If the fused update cannot be used, the update by PyTorch operators gives nearly the same values.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from train.optim import fused_sgd

CPU = torch.device("cpu")
MOMENTUM, LR, DECAY = 0.9, 0.01, 0.0005
SHAPES = ((6, 5, 3, 3), (30, 71), (17,))


@pytest.fixture(autouse=True)
def clear_cache() -> Iterator[None]:
    """Clear the cached result of fused_update_works before and after each test."""
    fused_sgd.fused_update_works.cache_clear()
    yield
    fused_sgd.fused_update_works.cache_clear()


def tensors(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return weights, velocities and gradients of a channels-last convolution, a linear layer and biases."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(3)]
    weights, velocities, gradients = ([t.contiguous(memory_format=layout(t)) for t in items] for items in lists)
    return weights, velocities, gradients


def layout(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def fused_result(dtype: torch.dtype = torch.float32, momentum: float = MOMENTUM) -> list[Tensor]:
    """Return weights and velocities after two updates."""
    weights, velocities, gradients = tensors(dtype)
    for _ in range(2):
        fused_sgd.update(weights, velocities, gradients, momentum, LR, DECAY)
    return [*weights, *velocities]


def rule_result(momentum: float = MOMENTUM) -> list[Tensor]:
    """Return weights and velocities after two updates by the paper's rule in float64."""
    weights, velocities, gradients = ([t.double() for t in items] for items in tensors())
    for _ in range(2):
        velocities = [
            momentum * v - LR * DECAY * w - LR * g for w, v, g in zip(weights, velocities, gradients, strict=True)
        ]
        weights = [w + v for w, v in zip(weights, velocities, strict=True)]
    return [*weights, *velocities]


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert torch.allclose(a.double(), e.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_installed_torch_has_the_fused_update_and_it_follows_the_papers_rule(dtype: torch.dtype) -> None:
    assert fused_sgd.fused_update_works(CPU, dtype)
    assert_close(fused_result(dtype), rule_result())


def test_the_fused_update_equals_torchs_private_kernel_to_the_bit() -> None:
    """Runs of earlier versions, which called torch's private kernel, must continue with the same bits."""
    weights, velocities, gradients = tensors()
    constants = {"lr": -1.0, "dampening": 1.0 + LR, "nesterov": False, "maximize": False, "is_first_step": False}
    for _ in range(2):
        torch._fused_sgd_(weights, gradients, velocities, weight_decay=DECAY, momentum=MOMENTUM, **constants)
    assert all(map(torch.equal, fused_result(), [*weights, *velocities]))


def absent(*args: object, **kwargs: object) -> None:
    raise AttributeError("module 'torch' has no attribute '_fused_sgd_'")


def refusing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no fused kernel for this device")


def renamed(*args: object, **kwargs: object) -> None:
    raise TypeError("sgd() got an unexpected keyword argument 'dampening'")


def without_lr(weights: list[Tensor], gradients: list[Tensor], velocities: list[Tensor], **kwargs: object) -> None:
    """A replacement for torch's function that ignores a negative learning rate, as a later version of torch might."""
    for velocity in velocities:
        velocity.mul_(0.5)


@pytest.mark.parametrize(
    "replacement",
    [None, absent, refusing, renamed, without_lr],
    ids=["no function", "no kernel", "refused", "other signature", "other values"],
)
def test_a_torch_without_a_usable_fused_update_gives_nearly_the_same_values(
    replacement: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fused_result()
    fused_sgd.fused_update_works.cache_clear()
    monkeypatch.setattr(fused_sgd, "sgd", replacement)
    assert not fused_sgd.fused_update_works(CPU, torch.float32)
    assert_close(fused_result(), expected)


def test_a_torch_without_the_private_kernel_gives_nearly_the_same_values(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fused_result()
    fused_sgd.fused_update_works.cache_clear()
    monkeypatch.delattr(torch, "_fused_sgd_")
    assert not fused_sgd.fused_update_works(CPU, torch.float32)
    assert_close(fused_result(), expected)


def test_other_devices_and_a_momentum_of_zero_are_updated_by_operators() -> None:
    """If momentum is 0, torch's kernel does not update the velocity."""
    assert not fused_sgd.fused_update_works(torch.device("meta"), torch.float32)
    assert_close(fused_result(momentum=0.0), rule_result(momentum=0.0))


def test_an_update_raises_the_version_of_the_tensors() -> None:
    """Autograd compares tensor versions, and refuses a backward pass if a saved tensor was changed in place."""
    weights, velocities, gradients = tensors()
    versions = [t._version for t in (*weights, *velocities)]
    fused_sgd.update(weights, velocities, gradients, MOMENTUM, LR, DECAY)
    assert all(t._version > version for t, version in zip((*weights, *velocities), versions, strict=True))

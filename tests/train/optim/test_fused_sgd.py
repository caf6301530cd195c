"""The fused parameter update: the same bits as torch's private kernel, and the same numbers without that kernel."""

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
def fresh_probe() -> Iterator[None]:
    """fused_update_works remembers its answer."""
    fused_sgd.fused_update_works.cache_clear()
    yield
    fused_sgd.fused_update_works.cache_clear()


def tensors(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Weights, velocities and gradients of a convolution with channels last, of a layer, and of biases."""
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(3)]
    weights, velocities, gradients = ([t.contiguous(memory_format=layout(t)) for t in of] for of in lists)
    return weights, velocities, gradients


def layout(t: Tensor) -> torch.memory_format:
    return torch.channels_last if t.dim() == 4 else torch.contiguous_format


def updated(dtype: torch.dtype = torch.float32, momentum: float = MOMENTUM) -> list[Tensor]:
    """Weights and velocities after two updates."""
    weights, velocities, gradients = tensors(dtype)
    for _ in range(2):
        fused_sgd.update(weights, velocities, gradients, momentum, LR, DECAY)
    return [*weights, *velocities]


def by_the_rule(momentum: float = MOMENTUM) -> list[Tensor]:
    weights, velocities, gradients = ([t.double() for t in of] for of in tensors())
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
def test_the_fused_update_works_with_the_installed_torch(dtype: torch.dtype) -> None:
    assert fused_sgd.fused_update_works(CPU, dtype)
    assert_close(updated(dtype), by_the_rule())


def test_the_fused_update_has_the_bits_of_torchs_private_kernel() -> None:
    """Weights of earlier versions, which called the kernel themselves, come out the same."""
    weights, velocities, gradients = tensors()
    constants = {"lr": -1.0, "dampening": 1.0 + LR, "nesterov": False, "maximize": False, "is_first_step": False}
    for _ in range(2):
        torch._fused_sgd_(weights, gradients, velocities, weight_decay=DECAY, momentum=MOMENTUM, **constants)
    assert all(map(torch.equal, updated(), [*weights, *velocities]))


def absent(*args: object, **kwargs: object) -> None:
    raise AttributeError("module 'torch' has no attribute '_fused_sgd_'")


def refusing(*args: object, **kwargs: object) -> None:
    raise RuntimeError("no fused kernel for this device")


def renamed(*args: object, **kwargs: object) -> None:
    raise TypeError("sgd() got an unexpected keyword argument 'dampening'")


def without_lr(weights: list[Tensor], gradients: list[Tensor], velocities: list[Tensor], **kwargs: object) -> None:
    """A later kernel that ignores a negative learning rate."""
    for velocity in velocities:
        velocity.mul_(0.5)


@pytest.mark.parametrize(
    "other",
    [None, absent, refusing, renamed, without_lr],
    ids=["no function", "no kernel", "refused", "other signature", "other numbers"],
)
def test_a_torch_without_the_fused_update_gives_the_same_numbers(
    other: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = updated()
    fused_sgd.fused_update_works.cache_clear()
    monkeypatch.setattr(fused_sgd, "sgd", other)
    assert not fused_sgd.fused_update_works(CPU, torch.float32)
    assert_close(updated(), fused)


def test_a_torch_without_the_private_kernel_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = updated()
    fused_sgd.fused_update_works.cache_clear()
    monkeypatch.delattr(torch, "_fused_sgd_")
    assert not fused_sgd.fused_update_works(CPU, torch.float32)
    assert_close(updated(), fused)


def test_other_devices_and_no_momentum_are_updated_by_operators() -> None:
    """torch's kernel has no velocity without momentum."""
    assert not fused_sgd.fused_update_works(torch.device("meta"), torch.float32)
    assert_close(updated(momentum=0.0), by_the_rule(momentum=0.0))


def test_an_update_counts_as_a_change_of_the_tensors() -> None:
    """Autograd refuses a backward pass that needs a tensor changed since."""
    weights, velocities, gradients = tensors()
    before = [t._version for t in (*weights, *velocities)]
    fused_sgd.update(weights, velocities, gradients, MOMENTUM, LR, DECAY)
    assert all(t._version > old for t, old in zip((*weights, *velocities), before, strict=True))

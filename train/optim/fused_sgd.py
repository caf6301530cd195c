"""SGD update of many parameters: by the fused kernel of torch.optim.SGD, or else by PyTorch operators.

The update rule (paper_sgd.py), with g = ∂L/∂w, has the learning rate lr in the formula of the velocity v:

    v ← momentum · v − lr · decay · w − lr · g        w ← w + v

The class torch.optim.SGD has lr in the formula of w. torch.optim.SGD calls the function torch.optim.sgd.sgd, which
computes:

    v ← momentum · v + (1 − dampening) · (g + weight_decay · w)        w ← w − lr · v

With the arguments `lr` = −1 and `dampening` = 1 + (lr of the update rule), the function sgd computes the update rule.
The class torch.optim.SGD accepts no negative lr, so the function sgd is called directly. The kernel behind `fused=True`
is private and may change. The fused update is therefore first tried on small tensors, once for each device and dtype.
The fused update is used only if the result is correct. For each parameter, PyTorch operators read or write eleven
values, and the fused kernel only five.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

try:
    from torch.optim.sgd import sgd
except ImportError:
    sgd = None  # type: ignore[assignment]  # if sgd does not exist, _update_by_operators is used


@torch.no_grad()
def update(
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum: float,
    lr: float,
    decay: float,
) -> None:
    """Apply the update rule in place.

    All tensors have the same device and dtype. Tensors with the same index in the three sequences have the same shape.
    """
    trios = list(zip(weights, velocities, gradients, strict=True))
    first = weights[0]
    fits = momentum != 0 and all(same_dense_layout(*trio) for trio in trios)
    if fits and fused_update_works(first.device, first.dtype):
        _update_fused(weights, velocities, gradients, momentum, lr, decay)
        return
    for w, v, g in trios:
        _update_by_operators(w, v, g, momentum, lr, decay)


def same_dense_layout(*tensors: Tensor) -> bool:
    """Return True if all tensors are contiguous in the same layout: channels first, or channels last.

    Elements with the same index then have the same memory offset in all tensors, and one pass can update all tensors.
    """
    layouts = [torch.contiguous_format, *[torch.channels_last] * (tensors[0].dim() == 4)]
    return any(all(t.is_contiguous(memory_format=layout) for t in tensors) for layout in layouts)


@functools.cache
def fused_update_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if the fused update of small tensors of this device and dtype is correct. The result is cached."""
    if sgd is None or device.type not in ("cpu", "cuda"):
        return False
    trio = torch.tensor([[1.0, -2.0, 3.0], [0.5, 0.25, -4.0], [-1.0, 8.0, 2.0]], dtype=dtype, device=device)
    expected, actual = trio.clone(), trio.clone()
    _update_by_operators(expected[0], expected[1], expected[2], momentum=0.5, lr=0.125, decay=0.25)
    try:
        _update_fused([actual[0]], [actual[1]], [actual[2]], momentum=0.5, lr=0.125, decay=0.25)
    except torch.OutOfMemoryError:
        raise
    # sgd has other arguments in this version of torch, or no fused kernel for this device and dtype.
    except (AttributeError, TypeError, RuntimeError):
        return False
    return torch.allclose(actual, expected)


def _update_fused(
    weights: Sequence[Tensor],
    velocities: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum: float,
    lr: float,
    decay: float,
) -> None:
    sgd(
        list(weights),
        list(gradients),
        list(velocities),
        fused=True,
        weight_decay=decay,
        momentum=momentum,
        lr=-1.0,
        dampening=1.0 + lr,
        nesterov=False,
        maximize=False,
    )
    # The fused kernel does not increment the version counters of the tensors.
    torch.autograd.graph.increment_version((*weights, *velocities))


def _update_by_operators(w: Tensor, v: Tensor, g: Tensor, momentum: float, lr: float, decay: float) -> None:
    v.mul_(momentum)
    if decay:
        v.add_(w, alpha=-lr * decay)
    v.add_(g, alpha=-lr)
    w.add_(v)

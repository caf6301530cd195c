"""Max-pooling with stride 2, overlapping where windows are 3 px (section 3.4), with what surrounds it in the network.

On a CPU the maps before it are large and what is done to each number is little: ReLU, normalization and pooling go
over memory once together (kernels.c), keep a byte for each pooled number, with a normalization the maps before it too,
and nothing between. Elsewhere it is PyTorch's operators, one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.recipe import Lrn
from train.model import kernels
from train.model.lrn import channels_last, check_size, fits_kernel, local_response_norm


def max_pool(
    x: Tensor, norm: Lrn | None = None, relu_before: bool = False, relu_after: bool = False, size_px: int = 3
) -> Tensor:
    """Pool (N, C, H, W), `size_px` or more rows and columns, to (N, C, (H − size_px) // 2 + 1, (W − size_px) // 2 + 1).

    In this order: ReLU if `relu_before`, normalization by `norm`, pooling, ReLU if `relu_after`. Differentiable once
    where it is compiled. Equal numbers: the first has the gradient, as in torch.
    """
    if norm is not None:
        check_size(norm.size)
    if size_px != 3 or min(x.shape[2:]) < 3 or not fits_kernel(x, 0.75 if norm is None else norm.beta):
        if norm is not None:
            x = local_response_norm(x, **vars(norm), relu=relu_before)
        elif relu_before:
            x = F.relu(x)
        pooled = F.max_pool2d(x, size_px, 2)
        return F.relu(pooled) if relu_after else pooled
    how = kernels.NormParams(x.shape[1], *((norm.size, norm.alpha, norm.k) if norm else (1, 0.0, 1.0)), relu_before)
    # Without a normalization between, ReLU before pooling and after it are the same, and after it is less work.
    shape = kernels.PoolParams(*x.shape[2:], norm is not None, relu_after or (norm is None and relu_before))
    result: Tensor = _Pooled.apply(channels_last(x), shape, how)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: kernels.PoolParams, how: kernels.NormParams) -> Tensor:
        assert kernels.native
        pooled, taps = kernels.native.pool(x, shape, how)
        ctx.save_for_backward(x if shape.normalize else None, taps)
        ctx.made_by = kernels.native, shape, how
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, taps = ctx.saved_tensors
        kernel, shape, how = ctx.made_by
        return kernel.pool_backward(x, channels_last(grad), taps, shape, how), None, None

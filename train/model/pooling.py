"""Max-pooling with stride 2 (section 3.4 of the paper). On a CPU, ReLU and normalization are fused with the pooling.

Neighboring windows of 3 px overlap. On a CPU, memory access takes more time than arithmetic. kernels.c therefore
computes ReLU, normalization and pooling in one pass over memory. For the backward pass, one byte is saved for each
pooled value. The input is saved only if there is a normalization. If kernels.c cannot be used, PyTorch operators are
applied one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.recipe import Lrn
from train.model import kernels
from train.model.lrn import can_use_kernels, channels_last, check_window_size, local_response_norm


def max_pool(
    x: Tensor, norm: Lrn | None = None, relu_before: bool = False, relu_after: bool = False, size_px: int = 3
) -> Tensor:
    """Apply ReLU if `relu_before`, normalization if `norm`, max-pooling, and ReLU if `relu_after`, in this order.

    x (N, C, H, W) with H, W ≥ size_px gives (N, C, (H − size_px) // 2 + 1, (W − size_px) // 2 + 1). If several values
    of a window equal the maximum, the first of these values gets the gradient, as in PyTorch. If kernels.c or a
    normalization is used, the result can be differentiated only once.
    """
    if norm is not None:
        check_window_size(norm.size)
    if size_px != 3 or min(x.shape[2:]) < 3 or not can_use_kernels(x, 0.75 if norm is None else norm.beta):
        if norm is not None:
            x = local_response_norm(x, **vars(norm), relu=relu_before)
        elif relu_before:
            x = F.relu(x)
        pooled = F.max_pool2d(x, size_px, 2)
        return F.relu(pooled) if relu_after else pooled
    norm_params = kernels.NormParams(
        x.shape[1], *((norm.size, norm.alpha, norm.k) if norm else (1, 0.0, 1.0)), relu_before
    )
    # Without a normalization, ReLU after pooling gives the same result as ReLU before pooling, with less work.
    pool_params = kernels.PoolParams(*x.shape[2:], norm is not None, relu_after or (norm is None and relu_before))
    result: Tensor = _Pool.apply(channels_last(x), pool_params, norm_params)  # type: ignore[no-untyped-call]  # torch does not annotate `apply`
    return result


class _Pool(torch.autograd.Function):
    """Pooling by kernels.c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: kernels.PoolParams, norm: kernels.NormParams) -> Tensor:
        assert kernels.native
        pooled, argmax = kernels.native.pool(x, pool, norm)
        ctx.save_for_backward(x if pool.normalize else None, argmax)
        ctx.kernels, ctx.params = kernels.native, (pool, norm)
        return pooled

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, argmax = ctx.saved_tensors
        return ctx.kernels.pool_backward(x, channels_last(grad), argmax, *ctx.params), None, None

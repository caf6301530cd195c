"""Local response normalisation (section 3.3), across maps and within a map.

Across maps, for maps i of one column:

    b_i = a_i · s_i^−β        s_i = k + α Σ a_j²   over j = i − n/2 … i + n/2, clipped to the column's maps

α here multiplies the plain sum, as the paper writes it. The authors' code divides it by n (layer.py: scale / size),
and so does torch.nn.LocalResponseNorm: its `alpha` is n times ours. One autograd function keeps x, s and nothing
else, and takes s^−¾ from two square roots, where PyTorch's own (average pooling, then a scalar power) costs half of
AlexNet's step on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Normalise (N, C, H, W) across `size` neighbouring maps (odd); alpha multiplies the sum of squares."""
    if size % 2 == 0:
        raise ValueError(f"size {size}: expected an odd number of maps")
    result: Tensor = _AcrossMaps.apply(x, size, alpha, beta, k)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _AcrossMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        s = _window_sum(x * x, size).mul_(alpha).add_(k)
        ctx.save_for_backward(x, s)
        ctx.constants = size, alpha, beta
        return x * _negative_power(s, beta)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        # db_j/da_i = s_j^−β [i = j] − 2αβ a_i a_j s_j^−(β+1) for i in the window of j, which is j in the window of i
        x, s = ctx.saved_tensors
        size, alpha, beta = ctx.constants
        direct = grad * _negative_power(s, beta)
        spread = _window_sum((direct * x).div_(s), size)
        return direct.sub_(spread.mul_(x), alpha=2 * alpha * beta), None, None, None, None


def _negative_power(s: Tensor, beta: float) -> Tensor:
    if beta == 0.75:
        root = s.rsqrt()
        return root.sqrt().mul_(root)  # s^−¼ · s^−½
    return s.pow(-beta)


def _window_sum(x: Tensor, size: int) -> Tensor:
    """Sum over `size` neighbouring channels, clipped at the ends: shifted additions, no copy of x."""
    total = x.clone()
    for shift in range(1, min(size // 2, x.shape[1] - 1) + 1):
        total[:, shift:] += x[:, :-shift]
        total[:, :-shift] += x[:, shift:]
    return total


def within_map_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Normalise (N, C, H, W) by the squares in a `size` × `size` neighbourhood of the same map, zero beyond its edge.

    The released net #145 has it after the second layer's normalisation (layers-145.cfg: cnorm2, of type rnorm); the
    paper does not mention it.
    """
    squares = F.avg_pool2d(x * x, size, stride=1, padding=size // 2) * size**2
    return x * (k + alpha * squares) ** -beta

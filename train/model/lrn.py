"""Local response normalization (section 3.3), across feature maps and within a feature map.

Across maps, for map i of one column:

    b_i = a_i · s_i^−β        s_i = k + α Σ a_j²   over j = i − n/2 … i + n/2, clipped to the column's maps

As in the paper, α is not divided by n. The authors' code (layer.py: scale / size) and torch.nn.LocalResponseNorm divide
α by n. For the same result, the `alpha` of torch.nn.LocalResponseNorm must be n times the α of this module.

For training and evaluation, the module has three implementations of the normalization across maps. Each of them can
apply a ReLU first, and saves only x for the backward pass:

    kernels.c       for float32 on a CPU with β = ¾ (two square roots give s^−¾); errors of at most 6 ulp
    gpu/            Triton kernels for a GPU, if Triton is installed and works (see gpu/fault.py)
    _LrnOperators   PyTorch operators, for all other cases; the tests compare the other implementations with this class

torch.export cannot trace C kernels, and converts in-place additions to scatter operations. A network that is exported
therefore uses a fourth implementation, `_traceable`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.recipe import Lrn
from train.model import kernels
from train.model.gpu.epilogue import Epilogue, apply_epilogue
from train.model.gpu.fault import normalization_fault


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool = False) -> Tensor:
    """Normalize x (N, C, H, W), or max(x, 0) if `relu`, across `size` neighboring maps.

    size   number of maps in a window, odd; windows are clipped at the first and last map
    alpha  factor of the sum of squares; the sum is not divided by `size`

    Values of float16 and bfloat16 are squared and summed in float32. The result can be differentiated only once. Raises
    ValueError unless `size` is odd and positive, and x has four dimensions.
    """
    check_window_size(size)
    if x.dim() != 4:
        raise ValueError(f"a tensor of shape {tuple(x.shape)}: expected (N, C, H, W)")
    result: Tensor
    if torch.compiler.is_compiling():
        result = _traceable(_activations(x, relu), (size, 1, 1), alpha, beta, k).to(x.dtype)
    elif can_use_kernels(x, beta):
        result = _LrnKernels.apply(channels_last(x), kernels.NormParams(x.shape[1], size, alpha, k, relu))  # type: ignore[no-untyped-call]  # torch does not annotate `apply`
    elif x.is_cuda and x.dtype != torch.float64 and x.numel() and normalization_fault(x.device, x.shape[1]) is None:
        epilogue = Epilogue("relu" if relu else "none", Lrn(size, alpha, beta, k))
        (result,) = apply_epilogue([x], [x.new_zeros(x.shape[1], dtype=torch.float32)], epilogue)
    else:
        result = _LrnOperators.apply(x, size, alpha, beta, k, relu)  # type: ignore[no-untyped-call]
    return result


def check_window_size(size: int) -> None:
    """Raise ValueError unless `size` is odd and positive."""
    if size % 2 == 0 or size < 1:
        raise ValueError(f"size {size}: expected an odd number")


def can_use_kernels(x: Tensor, beta: float) -> bool:
    """Return True if kernels.c is compiled, supports x and beta, and PyTorch is not tracing for an export."""
    if torch.compiler.is_compiling():
        return False
    float32_on_cpu = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    return kernels.native is not None and float32_on_cpu and beta == 0.75


def channels_last(x: Tensor) -> Tensor:
    """Return x in channels-last layout, which kernels.c needs. If x already has this layout, returns x itself."""
    return x.contiguous(memory_format=torch.channels_last)


class _LrnKernels(torch.autograd.Function):
    """Normalization across maps by kernels.c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: kernels.NormParams) -> Tensor:
        assert kernels.native
        ctx.save_for_backward(x)
        ctx.norm, ctx.kernels = norm, kernels.native
        return kernels.native.norm(x, norm)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.kernels.norm_backward(x, channels_last(grad), ctx.norm), None


class _LrnOperators(torch.autograd.Function):
    """Normalization across maps by PyTorch operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = size, alpha, beta, k, relu
        a = _activations(x, relu)
        s = _window_sum(a * a, size).mul_(alpha).add_(k)
        return a.mul(_negative_power(s, beta)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        # If i is in the window of j, db_j/da_i = s_j^−β [i = j] − 2αβ a_i a_j s_j^−(β+1); otherwise db_j/da_i = 0. i is
        # in the window of j exactly if j is in the window of i, so the sum over j is a sum over the window of i.
        (x,) = ctx.saved_tensors
        size, alpha, beta, k, relu = ctx.constants
        a = _activations(x, relu)
        s = _window_sum(a * a, size).mul_(alpha).add_(k)
        direct = grad.to(a.dtype) * _negative_power(s, beta)
        spread = _window_sum((direct * a).div_(s), size)
        x_grad = direct.sub_(spread.mul_(a), alpha=2 * alpha * beta)
        if relu:
            x_grad.masked_fill_(x <= 0, 0)
        return x_grad.to(x.dtype), None, None, None, None, None


def _activations(x: Tensor, relu: bool) -> Tensor:
    """Return the values `a` of the formula, in float32 or float64: x, or max(x, 0) if `relu`."""
    a = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return a.relu() if relu else a


def _negative_power(s: Tensor, beta: float) -> Tensor:
    """Return s^−β."""
    if beta == 0.75:
        root = s.rsqrt()
        return root.sqrt().mul_(root)  # this is s^−¼ · s^−½
    return s.pow(-beta)


def _traceable(a: Tensor, window: tuple[int, int, int], alpha: float, beta: float, k: float) -> Tensor:
    """Return a · (k + α Σ a²)^−β, computed by average pooling, for torch.export.

    window  numbers of maps, rows and columns over which the sum extends, all odd
    """
    squares = F.pad((a * a).unsqueeze(1), [side // 2 for side in reversed(window) for _ in range(2)])
    mean = F.avg_pool3d(squares, window, stride=1).squeeze(1)
    return a * (mean * (alpha * math.prod(window)) + k).pow(-beta)


def _window_sum(x: Tensor, size: int) -> Tensor:
    """Return the sum over a window of `size` neighboring channels, clipped at the first and last channel.

    The sum is computed by shifted additions, which need no padded copy of x.
    """
    total = x.clone()
    for shift in range(1, min(size // 2, x.shape[1] - 1) + 1):
        total[:, shift:] += x[:, :-shift]
        total[:, :-shift] += x[:, shift:]
    return total


def within_map_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Normalize x (N, C, H, W) by the squares in a `size` × `size` neighborhood within each map.

    Beyond the edge of a map, the squares are 0. The released net #145 has this normalization in layer 2, after the
    normalization across maps (layers-145.cfg: cnorm2, of type rnorm). The paper does not mention this normalization.
    Only x is saved for the backward pass. The result can be differentiated only once. Raises ValueError unless `size`
    is odd and positive.
    """
    check_window_size(size)
    if torch.compiler.is_compiling():
        return _traceable(_activations(x, False), (1, size, size), alpha, beta, k).to(x.dtype)
    result: Tensor = _LrnWithinMap.apply(x, size, alpha, beta, k)  # type: ignore[no-untyped-call]
    return result


class _LrnWithinMap(torch.autograd.Function):
    """Normalization within a map by PyTorch operators.

    If position p is in the window of position q, then q is in the window of p. The formula of the gradient is therefore
    the same as in _LrnOperators.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.constants = size, alpha, beta, k
        a = _activations(x, False)
        s = _area_sum(a * a, size).mul_(alpha).add_(k)
        return a.mul(_negative_power(s, beta)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        size, alpha, beta, k = ctx.constants
        a = _activations(x, False)
        s = _area_sum(a * a, size).mul_(alpha).add_(k)
        direct = grad.to(a.dtype) * _negative_power(s, beta)
        spread = _area_sum((direct * a).div_(s), size)
        return direct.sub_(spread.mul_(a), alpha=2 * alpha * beta).to(x.dtype), None, None, None, None


def _area_sum(x: Tensor, size: int) -> Tensor:
    """Return the sum over a window of `size` × `size` positions of a map.

    Values beyond the edge of the map count as zero.
    """
    down = F.avg_pool2d(x, (size, 1), stride=1, padding=(size // 2, 0), divisor_override=1)
    return F.avg_pool2d(down, (1, size), stride=1, padding=(0, size // 2), divisor_override=1)

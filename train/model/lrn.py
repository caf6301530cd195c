"""Local response normalization (section 3.3), across maps and within a map.

Across maps, for maps i of one column:

    b_i = a_i · s_i^−β        s_i = k + α Σ a_j²   over j = i − n/2 … i + n/2, clipped to the column's maps

α here multiplies the plain sum, as the paper writes it. The authors' code divides it by n (layer.py: scale / size),
and so does torch.nn.LocalResponseNorm: its `alpha` is n times ours.

Three ways, by where x is; each keeps x for the backward pass and nothing else, and can take the ReLU before it along:

    float32 on a CPU with β = ¾   kernels.c: s^−¾ is two square roots. Within 6 ulp of the formula.
    on a GPU                      lrn_triton.py, where Triton is installed and compiles: triton_fault
    all else                      PyTorch's operators, below: what the others are tested against

Under torch.export, which sees no C and would write out additions in place as scatters, it is `_traced`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prep.console import say
from train.model import kernels


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool = False) -> Tensor:
    """Normalize (N, C, H, W) across `size` neighboring maps (odd); alpha multiplies the sum of squares.

    With `relu`, of max(x, 0). Numbers of 16 bits are squared and summed in float32. Differentiable once.
    """
    check_size(size)
    if x.dim() != 4:
        raise ValueError(f"a tensor of shape {tuple(x.shape)}: expected (N, C, H, W)")
    result: Tensor
    if torch.compiler.is_compiling():
        result = _traced(_activations(x, relu), (size, 1, 1), alpha, beta, k).to(x.dtype)
    elif fits_kernel(x, beta):
        result = _Compiled.apply(channels_last(x), kernels.NormParams(x.shape[1], size, alpha, k, relu))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    elif x.is_cuda and x.dtype != torch.float64 and x.numel() and triton_fault(x.device) is None:
        from train.model import lrn_triton

        result = lrn_triton.local_response_norm(x, size, alpha, beta, k, relu)
    else:
        result = _Plain.apply(x, size, alpha, beta, k, relu)  # type: ignore[no-untyped-call]
    return result


def check_size(size: int) -> None:
    """Raises ValueError for an even one: a window has a middle."""
    if size % 2 == 0 or size < 1:
        raise ValueError(f"size {size}: expected an odd number of maps")


def fits_kernel(x: Tensor, beta: float) -> bool:
    """Whether kernels.c has x's kind of numbers, its place and this exponent."""
    if torch.compiler.is_compiling():
        return False
    cpu = x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0
    return kernels.native is not None and cpu and beta == 0.75


def channels_last(x: Tensor) -> Tensor:
    """x, or a copy of it, as kernels.c wants it."""
    return x.contiguous(memory_format=torch.channels_last)


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Why Triton's kernel is not used on a GPU; None where it is. It is tried once in a process, and waited for.

    Triton calls a C compiler for what launches a kernel, wants Python's headers for it and a folder to keep it in; an
    image made for running, not for building, may have none of these, and training goes on without.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from train.model import lrn_triton

        with torch.inference_mode(False), torch.enable_grad():  # the first to ask may be an evaluation
            x = torch.arange(-5.0, 7.0, device=device).view(1, 6, 1, 2).requires_grad_()
            ways = [of(x, 5, 0.1, 0.75, 2.0, True) for of in (lrn_triton.local_response_norm, _Plain.apply)]
            pairs = [ways, [torch.autograd.grad(way.square().sum(), x)[0] for way in ways]]
        alike = all(torch.allclose(found, wanted, rtol=1e-4, atol=1e-5) for found, wanted in pairs)
        fault = None if alike else "Triton computes something else"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of a compiler, a driver, a disk
        fault = f"Triton fails: {type(error).__name__}: {error}".splitlines()[0][:300]
    if fault is not None:
        say(f"{device}: {fault}. The normalization goes by PyTorch's operators, and takes longer.")
    return fault


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, how: kernels.NormParams) -> Tensor:
        assert kernels.native
        ctx.save_for_backward(x)
        ctx.how, ctx.kernel = how, kernels.native
        return kernels.native.norm(x, how)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.kernel.norm_backward(x, channels_last(grad), ctx.how), None


class _Plain(torch.autograd.Function):
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
        # db_j/da_i = s_j^−β [i = j] − 2αβ a_i a_j s_j^−(β+1) for i in the window of j, which is j in the window of i
        (x,) = ctx.saved_tensors
        size, alpha, beta, k, relu = ctx.constants
        a = _activations(x, relu)
        s = _window_sum(a * a, size).mul_(alpha).add_(k)
        direct = grad.to(a.dtype) * _negative_power(s, beta)
        spread = _window_sum((direct * a).div_(s), size)
        found = direct.sub_(spread.mul_(a), alpha=2 * alpha * beta)
        if relu:
            found.masked_fill_(x <= 0, 0)
        return found.to(x.dtype), None, None, None, None, None


def _activations(x: Tensor, relu: bool) -> Tensor:
    a = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return a.relu() if relu else a


def _negative_power(s: Tensor, beta: float) -> Tensor:
    if beta == 0.75:
        root = s.rsqrt()
        return root.sqrt().mul_(root)  # s^−¼ · s^−½
    return s.pow(-beta)


def _traced(a: Tensor, window: tuple[int, int, int], alpha: float, beta: float, k: float) -> Tensor:
    """a · (k + α Σ a²)^−β over `window` (odd: maps, rows, columns): a mean over volumes and a power."""
    squares = F.pad((a * a).unsqueeze(1), [side // 2 for side in reversed(window) for _ in range(2)])
    mean = F.avg_pool3d(squares, window, stride=1).squeeze(1)
    return a * (mean * (alpha * math.prod(window)) + k).pow(-beta)


def _window_sum(x: Tensor, size: int) -> Tensor:
    """Sum over `size` neighboring channels, clipped at the ends: shifted additions, no copy of x."""
    total = x.clone()
    for shift in range(1, min(size // 2, x.shape[1] - 1) + 1):
        total[:, shift:] += x[:, :-shift]
        total[:, :-shift] += x[:, shift:]
    return total


def within_map_norm(x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
    """Normalize (N, C, H, W) by the squares in a `size` × `size` neighborhood of the same map, zero beyond its edge.

    The released net #145 has it after the second layer's normalization (layers-145.cfg: cnorm2, of type rnorm); the
    paper does not mention it. Keeps x alone; differentiable once.
    """
    check_size(size)
    if torch.compiler.is_compiling():
        return _traced(_activations(x, False), (1, size, size), alpha, beta, k).to(x.dtype)
    result: Tensor = _WithinMap.apply(x, size, alpha, beta, k)  # type: ignore[no-untyped-call]
    return result


class _WithinMap(torch.autograd.Function):
    """The neighborhood is symmetric as across maps, and so the gradient has the same form."""

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
    """Sum over `size` × `size` neighboring positions of a map, zero beyond its edge."""
    down = F.avg_pool2d(x, (size, 1), stride=1, padding=(size // 2, 0), divisor_override=1)
    return F.avg_pool2d(down, (1, size), stride=1, padding=(0, size // 2), divisor_override=1)

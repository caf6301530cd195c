"""Local response normalization on a GPU, in Triton: one kernel forward, one backward, each a pass over memory.

lrn.py imports it for a tensor on a GPU where Triton is installed; PyTorch's wheels for CUDA bring it along. Maps lie
channels last or first, without gaps (others are copied). float16, bfloat16 and float32 are computed in float32.

A program has some positions of an image and up to 128 maps. Neighboring maps are read again from the first-level
cache, and the backward pass computes the sums anew from x, which costs less than keeping them would.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles its functions with their annotations, and knows none but its own.

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

_NUMBERS = 1024  # of a program


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _activation(pointer, offset, maps, j, stride, there, RELU: tl.constexpr):
    """Map j of each position, 0 where there is none."""
    a = tl.load(pointer + offset + j * stride, mask=there & (j >= 0) & (j < maps), other=0.0).to(tl.float32)
    if RELU:
        a = tl.where(a < 0, 0.0, a)  # NaN stays
    return a


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _sum(pointer, offset, maps, i, stride, there, alpha, k, REACH: tl.constexpr, RELU: tl.constexpr):
    """s of map i."""
    a = _activation(pointer, offset, maps, i - REACH, stride, there, RELU)
    total = a * a
    for t in tl.static_range(1, 2 * REACH + 1):
        a = _activation(pointer, offset, maps, i - REACH + t, stride, there, RELU)
        total += a * a
    return k + alpha * total


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _negative_power(s, beta, THREE_QUARTERS: tl.constexpr):
    if THREE_QUARTERS:
        root = 1.0 / tl.sqrt(s)
        power = root * tl.sqrt(root)
    else:
        power = tl.exp2(-beta * tl.log2(s))
    return power


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _places(maps, area, image_stride, position_stride, POSITIONS: tl.constexpr, MAPS: tl.constexpr):
    """Offsets of this program's positions (POSITIONS, 1), which of them are there, and its maps (1, MAPS)."""
    blocks = tl.cdiv(area, POSITIONS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    position = (tl.program_id(0) % blocks) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    i = tl.program_id(1) * MAPS + tl.arange(0, MAPS)[None, :]
    return image * image_stride + position * position_stride, position < area, i


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _forward(
    x,
    out,
    maps,
    area,
    image_stride,
    position_stride,
    stride,
    alpha,
    beta,
    k,
    REACH: tl.constexpr,
    RELU: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    POSITIONS: tl.constexpr,
    MAPS: tl.constexpr,
):
    offset, there, i = _places(maps, area, image_stride, position_stride, POSITIONS, MAPS)
    s = _sum(x, offset, maps, i, stride, there, alpha, k, REACH, RELU)
    b = _activation(x, offset, maps, i, stride, there, RELU) * _negative_power(s, beta, THREE_QUARTERS)
    tl.store(out + offset + i * stride, b.to(out.dtype.element_ty), mask=there & (i < maps))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _backward(
    x,
    grad,
    out,
    maps,
    area,
    image_stride,
    position_stride,
    stride,
    alpha,
    beta,
    k,
    REACH: tl.constexpr,
    RELU: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    POSITIONS: tl.constexpr,
    MAPS: tl.constexpr,
):
    offset, there, i = _places(maps, area, image_stride, position_stride, POSITIONS, MAPS)
    spread = tl.zeros([POSITIONS, MAPS], dtype=tl.float32)
    for t in tl.static_range(2 * REACH + 1):
        j = i + (t - REACH)
        s = _sum(x, offset, maps, j, stride, there, alpha, k, REACH, RELU)
        g = _activation(grad, offset, maps, j, stride, there, False)
        a = _activation(x, offset, maps, j, stride, there, RELU)
        inside = (j >= 0) & (j < maps)  # elsewhere s may be infinite and 0 / s no number, where k is 0
        spread += tl.where(inside, g * _negative_power(s, beta, THREE_QUARTERS) * a / s, 0.0)
    s = _sum(x, offset, maps, i, stride, there, alpha, k, REACH, RELU)
    g = _activation(grad, offset, maps, i, stride, there, False)
    a = _activation(x, offset, maps, i, stride, there, RELU)
    found = g * _negative_power(s, beta, THREE_QUARTERS) - 2 * alpha * beta * a * spread
    if RELU:
        raw = _activation(x, offset, maps, i, stride, there, False)
        found = tl.where(raw <= 0, 0.0, found)
    tl.store(out + offset + i * stride, found.to(out.dtype.element_ty), mask=there & (i < maps))


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """lrn.local_response_norm for float16, bfloat16 and float32 (N, C, H, W), not empty, `size` odd."""
    result: Tensor = _AcrossMaps.apply(x, size, alpha, beta, k, relu)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return result


class _AcrossMaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
        dense = x if x.is_contiguous() else x.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(dense)
        ctx.constants = size, alpha, beta, k, relu
        return _launch(_forward, [dense], *ctx.constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        given = grad.contiguous(memory_format=layout)
        return _launch(_backward, [x, given], *ctx.constants), None, None, None, None, None


def _launch(kernel: Any, given: list[Tensor], size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """`kernel` over all of x, the first of `given`, which have one layout."""
    x = given[0]
    images, maps, rows, columns = x.shape
    area = rows * columns
    image_stride = maps * area
    position_stride, stride = (1, area) if x.is_contiguous() else (maps, 1)
    block = min(128, triton.next_power_of_2(maps))
    positions = _NUMBERS // block
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device; column 1 may be on another
        kernel[images * triton.cdiv(area, positions), triton.cdiv(maps, block)](
            *given,
            out,
            maps,
            area,
            image_stride,
            position_stride,
            stride,
            alpha,
            beta,
            k,
            REACH=min(size // 2, maps - 1),
            RELU=relu,
            THREE_QUARTERS=beta == 0.75,
            POSITIONS=positions,
            MAPS=block,
        )
    return out

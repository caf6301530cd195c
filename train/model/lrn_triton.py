"""Triton kernels of local response normalization on a GPU: one for the forward pass, one for the backward pass.

lrn.py imports this module only if Triton is installed; PyTorch's CUDA wheels install Triton. Each kernel makes one pass
over memory. The kernels need contiguous tensors, channels first or channels last; other tensors are copied. Tensors are
float16, bfloat16 or float32; the arithmetic is float32.

A program instance computes up to 128 maps at several positions (row and column) of one image. Windows of neighboring
maps overlap; values in several windows are read again from the L1 cache. The backward pass computes the sums s (see
lrn.py) again from x, which is faster than storing the sums.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles the type annotations along with the functions, and accepts only its own types.

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]
from torch import Tensor

_BLOCK_VALUES = 1024  # number of values that a program instance computes


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _activation(pointer, offset, maps, j, stride, inside, RELU: tl.constexpr):
    """The value `a` (see lrn.py) of map j at each position; 0 if there is no such map or position."""
    a = tl.load(pointer + offset + j * stride, mask=inside & (j >= 0) & (j < maps), other=0.0).to(tl.float32)
    if RELU:
        a = tl.where(a < 0, 0.0, a)  # keeps NaN
    return a


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _sum(pointer, offset, maps, i, stride, inside, alpha, k, REACH: tl.constexpr, RELU: tl.constexpr):
    """The value `s` (see lrn.py) of map i at each position."""
    a = _activation(pointer, offset, maps, i - REACH, stride, inside, RELU)
    total = a * a
    for t in tl.static_range(1, 2 * REACH + 1):
        a = _activation(pointer, offset, maps, i - REACH + t, stride, inside, RELU)
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
def _block(maps, area, image_stride, position_stride, POSITIONS: tl.constexpr, MAPS: tl.constexpr):
    """Offsets (POSITIONS, 1) of the positions, a mask of the positions inside the image, and map numbers (1, MAPS)."""
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
    offset, inside, i = _block(maps, area, image_stride, position_stride, POSITIONS, MAPS)
    s = _sum(x, offset, maps, i, stride, inside, alpha, k, REACH, RELU)
    b = _activation(x, offset, maps, i, stride, inside, RELU) * _negative_power(s, beta, THREE_QUARTERS)
    tl.store(out + offset + i * stride, b.to(out.dtype.element_ty), mask=inside & (i < maps))


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
    offset, inside, i = _block(maps, area, image_stride, position_stride, POSITIONS, MAPS)
    spread = tl.zeros([POSITIONS, MAPS], dtype=tl.float32)
    for t in tl.static_range(2 * REACH + 1):
        j = i + (t - REACH)
        s = _sum(x, offset, maps, j, stride, inside, alpha, k, REACH, RELU)
        g = _activation(grad, offset, maps, j, stride, inside, False)
        a = _activation(x, offset, maps, j, stride, inside, RELU)
        in_maps = (j >= 0) & (j < maps)  # for other j, s can be 0 (if k = 0), and 0 / 0 is NaN
        spread += tl.where(in_maps, g * _negative_power(s, beta, THREE_QUARTERS) * a / s, 0.0)
    s = _sum(x, offset, maps, i, stride, inside, alpha, k, REACH, RELU)
    g = _activation(grad, offset, maps, i, stride, inside, False)
    a = _activation(x, offset, maps, i, stride, inside, RELU)
    x_grad = g * _negative_power(s, beta, THREE_QUARTERS) - 2 * alpha * beta * a * spread
    if RELU:
        raw = _activation(x, offset, maps, i, stride, inside, False)
        x_grad = tl.where(raw <= 0, 0.0, x_grad)
    tl.store(out + offset + i * stride, x_grad.to(out.dtype.element_ty), mask=inside & (i < maps))


def local_response_norm(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """Like lrn.local_response_norm, for a non-empty float16, bfloat16 or float32 tensor x and an odd `size`."""
    result: Tensor = _LrnTriton.apply(x, size, alpha, beta, k, relu)  # type: ignore[no-untyped-call]  # torch does not annotate `apply`
    return result


class _LrnTriton(torch.autograd.Function):
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
        return (
            _launch(_backward, [x, grad.contiguous(memory_format=layout)], *ctx.constants),
            None,
            None,
            None,
            None,
            None,
        )


def _launch(kernel: Any, inputs: list[Tensor], size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
    """Run `kernel` on `inputs`, which all have the same layout. The first input is x. Returns a tensor of x's shape."""
    x = inputs[0]
    images, maps, rows, columns = x.shape
    area = rows * columns
    image_stride = maps * area
    position_stride, stride = (1, area) if x.is_contiguous() else (maps, 1)
    block_maps = min(128, triton.next_power_of_2(maps))
    positions = _BLOCK_VALUES // block_maps
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches kernels on the current device, which can differ from x's device
        kernel[images * triton.cdiv(area, positions), triton.cdiv(maps, block_maps)](
            *inputs,
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
            MAPS=block_maps,
        )
    return out

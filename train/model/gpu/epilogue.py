"""Epilogue of a convolution on a GPU: bias, nonlinearity, normalization, max-pooling, nonlinearity in one operation.

    y = after(pool(norm(before(x + bias))))

x is the output of a convolution without bias. The columns of a layer are separate tensors, or one joined tensor in
which the maps of column 0 come first. The input can be joined and the result separate, or the input can be separate and
the result joined. No copy is therefore needed between a convolution of both columns and a convolution of one column.
Normalization is always within a column.

The operation keeps these tensors for the backward pass:

    x                          if there is a normalization, or pooling after a nonlinearity
    one byte per pooled value  if there is pooling
    y                          if there is neither normalization nor pooling, or if tanh or sigmoid follows pooling

Sums of bias gradients are computed in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.config.recipe import Lrn

_POSITIONS = 16  # number of positions in a tile (epilogue_triton.py); Triton's matrix product needs at least 16
_FORWARD_ROWS = 16  # largest number of rows of pooled values that a program computes
_BACKWARD_ROWS = 28  # largest number of rows of the convolution's output that a program computes
_BACKWARD_TILES = 8  # number of tiles that a program of the backward pass without pooling computes
_FLOAT32_TERMS = 3  # three bfloat16 values represent a float32 exactly


@dataclass(frozen=True)
class Epilogue:
    """The operations of an epilogue, in this order."""

    before: str = "none"  # nonlinearity before normalization and pooling: "none", "relu", "tanh" or "sigmoid"
    norm: Lrn | None = None
    pool_px: int = 0  # side of the pooling windows, which have stride 2: 0 (no pooling), 2 or 3
    after: str = "none"  # nonlinearity after pooling; only with pooling

    def __post_init__(self) -> None:
        """Raise ValueError if `pool_px` or `norm.size` is invalid, or if `after` is set without pooling."""
        if self.pool_px not in (0, 2, 3):
            raise ValueError(f"pool_px {self.pool_px}: expected 0, 2 or 3")
        if self.after != "none" and not self.pool_px:
            raise ValueError(f"after {self.after!r} without pooling: pass this nonlinearity as `before`")
        if self.norm is not None and (self.norm.size % 2 == 0 or self.norm.size < 1):
            raise ValueError(f"normalization across {self.norm.size} maps: expected an odd number")


def apply_epilogue(
    x: Sequence[Tensor],
    bias: Sequence[Tensor],
    epilogue: Epilogue,
    joined: bool = False,
    channels_first: bool = False,
) -> list[Tensor]:
    """Apply an epilogue to the output of a layer's convolutions, on one GPU. The result is differentiable only once.

    x               (N, maps, H, W), float16, bfloat16 or float32: one tensor per column, or one joined tensor
    bias            (maps,), float32: one tensor per column
    joined          True: the result is one joined tensor; False: the result is one tensor for each column
    channels_first  True: the result is contiguous (N, maps, H', W'), as fc6 needs it; False: the result is channels
                    last. Without pooling, only False is allowed

    With pooling, H' = (H − pool_px) // 2 + 1 and W' = (W − pool_px) // 2 + 1. Without pooling, H' = H and W' = W.
    """
    outputs = _Apply.apply(epilogue, len(bias), joined, channels_first, *x, *bias)  # type: ignore[no-untyped-call]  # torch has no types for it
    return list(outputs)


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, epilogue: Epilogue, columns: int, joined: bool, channels_first: bool, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = [x.contiguous(memory_format=torch.channels_last) for x in tensors[:-columns]]
        bias = tensors[-columns:]
        shape = _output_shape(inputs[0].shape, epilogue)
        maps = [len(b) for b in bias]
        layout = torch.contiguous_format if channels_first else torch.channels_last
        outputs = [
            _empty((shape[0], width, *shape[2:]), inputs[0], layout) for width in ([sum(maps)] if joined else maps)
        ]
        argmax = [
            torch.empty(shape[0], *shape[2:], width if epilogue.pool_px else 0, dtype=torch.uint8, device=b.device)
            for width, b in zip(maps, bias, strict=True)
        ]
        parts = zip(_by_column(inputs, maps), bias, _by_column(outputs, maps), argmax, strict=True)
        with torch.cuda.device_of(inputs[0]):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            for x, b, out, maximum in parts:
                _launch_forward(x, b, out, maximum, epilogue)
        ctx.epilogue, ctx.columns, ctx.input_shapes = epilogue, columns, [x.shape for x in inputs]
        keeps_x = epilogue.norm is not None or (epilogue.pool_px > 0 and epilogue.before != "none")
        keeps_out = epilogue.after in ("tanh", "sigmoid") or not (keeps_x or epilogue.pool_px)
        ctx.counts = len(inputs) if keeps_x else 0, len(outputs) if keeps_out else 0
        ctx.save_for_backward(*inputs[: ctx.counts[0]], *outputs[: ctx.counts[1]], *argmax, *bias)
        return tuple(outputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved, columns = list(ctx.saved_tensors), ctx.columns
        inputs, saved = saved[: ctx.counts[0]], saved[ctx.counts[0] :]
        outputs, saved = saved[: ctx.counts[1]], saved[ctx.counts[1] :]
        argmax, bias = saved[:columns], saved[columns:]
        maps = [len(b) for b in bias]
        x_grads = [_empty(shape, grads[0], torch.channels_last) for shape in ctx.input_shapes]
        # Every tensor argument of a kernel needs an address. The argument for a tensor that was not saved is therefore
        # another tensor, which the kernel does not read.
        if not ctx.epilogue.pool_px:
            grads = tuple(grad.contiguous(memory_format=torch.channels_last) for grad in grads)
        parts = zip(
            _by_column(inputs or x_grads, maps),
            bias,
            _by_column(grads, maps),
            _by_column(outputs or grads, maps),
            argmax,
            _by_column(x_grads, maps),
            strict=True,
        )
        with torch.cuda.device_of(grads[0]):  # type: ignore[no-untyped-call]
            bias_grads = [
                _launch_backward(x, b, grad, out, maximum, x_grad, ctx.epilogue)
                for x, b, grad, out, maximum, x_grad in parts
            ]
        return (None, None, None, None, *x_grads, *bias_grads)


def _output_shape(shape: torch.Size, epilogue: Epilogue) -> tuple[int, ...]:
    if not epilogue.pool_px:
        return tuple(shape)
    return (*shape[:2], *((side - epilogue.pool_px) // 2 + 1 for side in shape[2:]))


def _empty(shape: Sequence[int], like: Tensor, layout: torch.memory_format) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=layout)


def _by_column(tensors: Sequence[Tensor], maps: Sequence[int]) -> list[Tensor]:
    """Return one tensor for each column: views of the joined tensor, or the separate tensors unchanged."""
    return list(tensors) if len(tensors) == len(maps) else list(torch.split(tensors[0], list(maps), dim=1))


def kernel_constants(
    maps: int, is_float32: bool, epilogue: Epilogue
) -> tuple[tuple[float, float, float], dict[str, Any]]:
    """Return the arguments that all kernels have: (α, β, k), and the constants that Triton compiles into a kernel."""
    norm = epilogue.norm or Lrn(size=1, alpha=0.0, beta=0.75, k=1.0)
    return (norm.alpha, norm.beta, norm.k), {
        "BEFORE": epilogue.before,
        "NORM": epilogue.norm is not None,
        "REACH": min(norm.size // 2, maps - 1),
        "THREE_QUARTERS": norm.beta == 0.75,
        "TERMS": _FLOAT32_TERMS if is_float32 else 1,
        "POSITIONS": _POSITIONS,
        "MAPS": max(16, 1 << (maps - 1).bit_length()),
    }


def warps_for(maps: int, backward: bool) -> int:
    """Return the number of warps of a kernel.

    The result is the smallest number for which the values of a program fit into registers. With more warps, several
    warps would compute the same inputs of the matrix product.
    """
    return max(1, min(8, (1 << (maps - 1).bit_length()) // (16 if backward else 32)))


def stages_for(maps: int, float32: bool, slope_after: bool, shared_bytes: int) -> int:
    """Return the number of loop iterations for which pooled_backward loads data ahead.

    The result is 3, or 1 if the shared memory is too small for 3.

    slope_after   True if the nonlinearity after pooling is "tanh" or "sigmoid", whose gradient needs the pooled result
    shared_bytes  shared memory in bytes that a program can have: 227 KiB on an H100 or H200, 163 KiB on an A100
    """
    # Upper bound of the shared memory, in bytes per map of a tile, that Triton 3.6 and 3.9 allocate for 3 stages and
    # windows of 3 px.
    bytes_per_map = (1280 if float32 else 768) + slope_after * (768 if float32 else 384)
    return 3 if (1 << (maps - 1).bit_length()) * bytes_per_map <= shared_bytes else 1


@functools.cache
def shared_bytes_of(device: torch.device) -> int:
    """Return the shared memory in bytes that a program can have on a GPU; 0 for Triton's interpreter."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0))


def _launch_forward(x: Tensor, bias: Tensor, out: Tensor, argmax: Tensor, epilogue: Epilogue) -> None:
    from train.model.gpu import epilogue_triton as kernels

    images, maps, rows, columns = x.shape
    scalars, constants = kernel_constants(maps, x.dtype == torch.float32, epilogue)
    warps = warps_for(maps, backward=False)
    if not epilogue.pool_px:
        positions = images * rows * columns
        kernels.pointwise_forward[(_blocks(positions, _POSITIONS),)](
            x, bias, out, positions, maps, x.stride(3), out.stride(3), *scalars, **constants, num_warps=warps
        )
        return
    out_rows, out_columns = out.shape[2:]
    bands = _blocks(out_rows, _FORWARD_ROWS)
    blocks = _blocks(out_columns, _POSITIONS - (epilogue.pool_px == 3))
    kernels.pooled_forward[(images * bands * blocks,)](
        *(x, bias, out, argmax, maps, rows, columns, out_rows, out_columns, bands, blocks, _blocks(out_rows, bands)),
        *(*_strides(x), *_strides(out), out.stride(1), *scalars),
        **constants,
        POOL=epilogue.pool_px,
        AFTER=epilogue.after,
        num_warps=warps,
    )


def _launch_backward(
    x: Tensor, bias: Tensor, grad: Tensor, out: Tensor, argmax: Tensor, x_grad: Tensor, epilogue: Epilogue
) -> Tensor:
    """Write the gradient of x, and return the gradient of the bias."""
    from train.model.gpu import epilogue_triton as kernels

    images, maps, rows, columns = x_grad.shape
    scalars, constants = kernel_constants(maps, x_grad.dtype == torch.float32, epilogue)
    warps = warps_for(maps, backward=True)
    if not epilogue.pool_px:
        positions = images * rows * columns
        programs = _blocks(positions, _POSITIONS * _BACKWARD_TILES)
        bias_sums = bias.new_empty(programs, maps)
        kernels.pointwise_backward[(programs,)](
            *(x, bias, grad, out, x_grad, bias_sums, positions, maps),
            *(x.stride(3), grad.stride(3), out.stride(3), x_grad.stride(3), *scalars),
            **constants,
            TILES=_BACKWARD_TILES,
            num_warps=warps,
        )
        return bias_sums.sum(0)
    bands, blocks = _blocks(rows, _BACKWARD_ROWS), _blocks(columns, 2 * _POSITIONS)
    bias_sums = bias.new_empty(images * bands * blocks, maps)
    slope_after = epilogue.after in ("tanh", "sigmoid")
    stages = stages_for(maps, x_grad.dtype == torch.float32, slope_after, shared_bytes_of(x_grad.device))
    kernels.pooled_backward[(len(bias_sums),)](
        *(x, bias, grad, out, argmax, x_grad, bias_sums, maps, rows, columns, *grad.shape[2:], bands, blocks),
        *(_blocks(rows, bands), *_strides(x), *_strides(x_grad), *_strides(grad), grad.stride(1)),
        *(*_strides(out), out.stride(1), *scalars),
        **constants,
        POOL=epilogue.pool_px,
        AFTER=epilogue.after,
        num_warps=warps,
        num_stages=stages,
    )
    return bias_sums.sum(0)


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Return the strides of images, rows and columns."""
    return x.stride(0), x.stride(2), x.stride(3)


def _blocks(count: int, size: int) -> int:
    return -(-count // size)

"""Triton kernel that writes images as blocks of 4 × 4 pixels. conv1_blocks.py launches the kernel."""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles the type annotations along with the functions, and accepts only its own types.

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def write_blocks(
    images, blocks, positions, rows, columns, height, width, left, top, divisor,
    image_stride, channel_stride, row_stride, column_stride, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Write POSITIONS blocks of 48 values. Pixels outside of the image count as 0."""
    p = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    i = tl.arange(0, 64)[None, :]
    image, block = p // (rows * columns), (p % (rows * columns)).to(tl.int32)
    y = block // columns * 4 + i % 16 // 4 - top
    x = block % columns * 4 + i % 4 - left
    inside = (p < positions) & (i < 48)
    pixel = images + image * image_stride + i // 16 * channel_stride + y * row_stride + x * column_stride
    v = tl.load(pixel, mask=inside & (y >= 0) & (y < height) & (x >= 0) & (x < width), other=0.0).to(tl.float32)
    tl.store(blocks + p * 48 + i, (v / divisor).to(blocks.dtype.element_ty), mask=inside)

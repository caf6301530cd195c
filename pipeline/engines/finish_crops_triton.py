"""Triton kernel that flips and normalizes crops on a GPU; finish_crops.py launches it."""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles the type annotations along with the functions, and accepts only its own types.

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def finish_elements(
    squares, windows, shift, mean, out, scale, SQUARE: tl.constexpr, SIDE: tl.constexpr, VIEWS: tl.constexpr,
    MEAN_SIDE: tl.constexpr, CHANNELS_LAST: tl.constexpr, ELEMENTS: tl.constexpr,
):  # fmt: skip
    """Write ELEMENTS elements of one crop. MEAN_SIDE is 0 if no mean image is subtracted."""
    crop = tl.program_id(0).to(tl.int64)
    record, window = crop // VIEWS, windows + crop * 6
    i = tl.program_id(1) * ELEMENTS + tl.arange(0, ELEMENTS)
    inside = i < 3 * SIDE * SIDE
    if CHANNELS_LAST:
        channel, column, row = i % 3, i // 3 % SIDE, i // (3 * SIDE)
    else:
        channel, column, row = i // (SIDE * SIDE), i % SIDE, i // SIDE % SIDE
    mirrored = SIDE - 1 - column
    y = tl.load(window) + row
    x = tl.load(window + 1) + tl.where(tl.load(window + 2) != 0, mirrored, column)
    pixel = squares + record * (SQUARE * SQUARE * 3) + (y * SQUARE + x) * 3 + channel
    # The product is the last operation, so the compiler cannot fuse it with an addition. kernels.c gives the same bits.
    value = tl.load(pixel, mask=inside, other=0).to(tl.float32)
    value += tl.load(shift + record * 3 + channel, mask=inside, other=0.0)
    if MEAN_SIDE != 0:
        y = tl.load(window + 3) + row
        x = tl.load(window + 4) + tl.where(tl.load(window + 5) != 0, mirrored, column)
        value -= tl.load(mean + (y * MEAN_SIDE + x) * 3 + channel, mask=inside, other=0.0)
    value *= tl.load(scale + channel, mask=inside, other=0.0)
    tl.store(out + crop * (3 * SIDE * SIDE) + i, value.to(out.dtype.element_ty), mask=inside)

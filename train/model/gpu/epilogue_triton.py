"""Triton kernels of a convolution's epilogue: bias, nonlinearity, normalization, max-pooling in one pass.

epilogue.py describes the operation and launches the kernels. Tensors are float16, bfloat16 or float32 in channels-last
layout. A pooled result and its gradient may also be channels first. The arithmetic is float32.

    pooled_forward, pooled_backward          with pooling; a program computes some rows and columns of one image
    pointwise_forward, pointwise_backward    without pooling; a program computes some positions of all images

A program works on a tile: all maps of a column, padded to MAPS, at POSITIONS positions. tile_arithmetic_triton.py
computes with these tiles. The registers of a GPU limit the size of a tile. With 16 positions and the warps of
`warps_for`, ptxas spills at most 64 bytes per thread for the paper's layers in bfloat16 (tools/gpu/compile_report.py).
"""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles the type annotations along with the functions, and accepts only its own types.

from __future__ import annotations

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

from train.model.gpu.tile_arithmetic_triton import (
    activate,
    band_matrix,
    normalize,
    through_activation,
    through_normalization,
)

NO_MAXIMUM = tl.constexpr(255)  # argmax of a pooled value that has no gradient, because ReLU has set it to 0


# ---- With pooling


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _normalized_column(
    row,
    column,
    inside,
    i,
    maps,
    bias,
    band,
    alpha,
    beta,
    k,
    BEFORE: tl.constexpr,
    NORM: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    TERMS: tl.constexpr,
    column_stride,
):
    """Return the normalized values of one row of the convolution's output, at the pixel columns `column`.

    row     pointer to the row
    column  indices of the pixel columns, (POSITIONS, 1)
    """
    v = tl.load(row + column * column_stride + i, mask=inside & (i < maps), other=0.0).to(tl.float32)
    return normalize(activate(v + bias, BEFORE), band, alpha, beta, k, NORM, THREE_QUARTERS, TERMS)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _maximum(best, argmax, v, candidate):
    """Return the larger of `best` and v, and the index of the larger: `argmax` for `best`, or `candidate` for v.

    If `best` and v are equal, the index is `argmax`. NaN counts as larger than every number.
    """
    argmax = tl.where(v <= best, argmax, candidate)
    return tl.maximum(v, best, propagate_nan=tl.PropagateNan.ALL), argmax


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _row_maximum(
    row,
    inside_row,
    first_column,
    columns,
    i,
    maps,
    bias,
    band,
    alpha,
    beta,
    k,
    column_stride,
    POOL: tl.constexpr,
    BEFORE: tl.constexpr,
    NORM: tl.constexpr,
    THREE_QUARTERS: tl.constexpr,
    TERMS: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Return the maximum of each window within one row, and the column, 0 to 2, of this maximum within the window.

    The third column of a window of 3 px is the first column of the next window. The value of the third column is
    therefore taken from the next position of the tile. The last window of a tile has no next position, so its maximum
    is not valid.
    """
    p = tl.arange(0, POSITIONS)[:, None]
    even = first_column + 2 * p
    first = _normalized_column(
        row, even, inside_row & (even < columns), i, maps, bias, band, alpha, beta, k, BEFORE, NORM, THREE_QUARTERS,
        TERMS, column_stride,
    )  # fmt: skip
    second = _normalized_column(
        row, even + 1, inside_row & (even + 1 < columns), i, maps, bias, band, alpha, beta, k, BEFORE, NORM,
        THREE_QUARTERS, TERMS, column_stride,
    )  # fmt: skip
    best, argmax = _maximum(first, tl.zeros_like(first).to(tl.int32), second, 1)
    if POOL == 3:
        following = tl.broadcast_to(tl.minimum(p + 1, POSITIONS - 1), first.shape)
        best, argmax = _maximum(best, argmax, tl.gather(first, following, 0), 2)
    return best, argmax


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def pooled_forward(
    x, bias, out, argmax, maps, rows, columns, out_rows, out_columns, bands, blocks,
    rows_per_program, x_image, x_row, x_column, out_image, out_row, out_column, out_map, alpha, beta, k,
    POOL: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, NORM: tl.constexpr, REACH: tl.constexpr,
    THREE_QUARTERS: tl.constexpr, TERMS: tl.constexpr, POSITIONS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Write the pooled values `out`, and `argmax` (N, out_rows, out_columns, maps): 3 · row + column within the window.

    A program computes rows_per_program rows and POSITIONS columns of pooled values; for windows of 3 px, one column
    less.
    """
    program = tl.program_id(0)
    image = (program // (bands * blocks)).to(tl.int64)
    first_row = (program // blocks % bands) * rows_per_program
    VALID: tl.constexpr = POSITIONS - 1 if POOL == 3 else POSITIONS
    first_column = (program % blocks) * VALID
    p, i = tl.arange(0, POSITIONS)[:, None], tl.arange(0, MAPS)[None, :]
    biases = tl.load(bias + i, mask=i < maps, other=0.0)
    band = band_matrix(maps, REACH, MAPS)
    column = first_column + p
    valid = (p < VALID) & (column < out_columns) & (i < maps)
    x += image * x_image
    above, above_argmax = _row_maximum(
        x + 2 * first_row * x_row, p >= 0, 2 * first_column, columns, i, maps, biases, band, alpha, beta, k, x_column,
        POOL, BEFORE, NORM, THREE_QUARTERS, TERMS, POSITIONS,
    )  # fmt: skip
    for row in range(first_row, tl.minimum(first_row + rows_per_program, out_rows)):
        below, below_argmax = _row_maximum(
            x + (2 * row + 1) * x_row, p >= 0, 2 * first_column, columns, i, maps, biases, band, alpha, beta, k,
            x_column, POOL, BEFORE, NORM, THREE_QUARTERS, TERMS, POSITIONS,
        )  # fmt: skip
        best, best_argmax = _maximum(above, above_argmax, below, below_argmax + 3)
        # The next row is the third row of the current windows if POOL is 3, and the first row of the windows below.
        above, above_argmax = _row_maximum(
            x + (2 * row + 2) * x_row, 2 * row + 2 + 0 * p < rows, 2 * first_column, columns, i, maps, biases, band,
            alpha, beta, k, x_column, POOL, BEFORE, NORM, THREE_QUARTERS, TERMS, POSITIONS,
        )  # fmt: skip
        if POOL == 3:
            best, best_argmax = _maximum(best, best_argmax, above, above_argmax + 6)
        if AFTER == "relu":
            best_argmax = tl.where(best <= 0, NO_MAXIMUM, best_argmax)
        best = activate(best, AFTER)
        position = out + image * out_image + row * out_row + column * out_column
        tl.store(position + i * out_map, best.to(out.dtype.element_ty), mask=valid)
        position = argmax + ((image * out_rows + row) * out_columns + column) * maps
        tl.store(position + i, best_argmax.to(tl.uint8), mask=valid)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _window_gradient(
    grad, out, argmax, row, column, row_in_window, column_in_window, enabled, i, maps, out_rows, out_columns,
    grad_row, grad_column, grad_map, out_row, out_column, out_map, AFTER: tl.constexpr,
):  # fmt: skip
    """Return the gradient that the windows (row, column) send to their value at (row_in_window, column_in_window)."""
    row = row + 0 * column  # of shape (POSITIONS, 1), because Triton's interpreter accepts no scalar mask
    inside = enabled & (row >= 0) & (row < out_rows) & (column >= 0) & (column < out_columns) & (i < maps)
    maximum = tl.load(argmax + (row * out_columns + column) * maps + i, mask=inside, other=NO_MAXIMUM)
    g = tl.load(grad + row * grad_row + column * grad_column + i * grad_map, mask=inside, other=0.0).to(tl.float32)
    if AFTER == "tanh" or AFTER == "sigmoid":
        y = tl.load(out + row * out_row + column * out_column + i * out_map, mask=inside, other=0.0).to(tl.float32)
        g = through_activation(g, y, AFTER)
    return tl.where(maximum == 3 * row_in_window + column_in_window, g, 0.0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def pooled_backward(
    x, bias, grad, out, argmax, x_grad, bias_sums, maps, rows, columns, out_rows, out_columns, bands, blocks,
    rows_per_program, x_image, x_row, x_column, x_grad_image, x_grad_row, x_grad_column, grad_image,
    grad_row, grad_column, grad_map, out_image, out_row, out_column, out_map, alpha, beta, k,
    POOL: tl.constexpr, BEFORE: tl.constexpr, AFTER: tl.constexpr, NORM: tl.constexpr, REACH: tl.constexpr,
    THREE_QUARTERS: tl.constexpr, TERMS: tl.constexpr, POSITIONS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, the convolution's output. Also write the sums of this gradient for the bias.

    Row `program` of `bias_sums` (programs, maps) is the sum of the gradient over the positions of this program.

    A program computes rows_per_program rows of 2 · POSITIONS columns. In each row, a program computes the even columns
    first, then the odd columns. With windows of 3 px, an even row or column belongs to two windows, and an odd row or
    column belongs to one window.
    """
    program = tl.program_id(0)
    image = (program // (bands * blocks)).to(tl.int64)
    first_row = (program // blocks % bands) * rows_per_program
    p = (program % blocks) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    i = tl.arange(0, MAPS)[None, :]
    biases = tl.load(bias + i, mask=i < maps, other=0.0)
    band = band_matrix(maps, REACH, MAPS)
    x += image * x_image
    x_grad += image * x_grad_image
    grad += image * grad_image
    out += image * out_image
    argmax += image * out_rows * out_columns * maps
    total = tl.zeros([POSITIONS, MAPS], dtype=tl.float32)
    for row in range(first_row, tl.minimum(first_row + rows_per_program, rows)):
        even_row = (row + 0 * p) % 2 == 0
        for odd in tl.static_range(2):
            column = 2 * p + odd
            inside = (column < columns) & (i < maps)
            g = _window_gradient(
                grad, out, argmax, row // 2, p, row % 2, odd, p >= 0, i, maps, out_rows, out_columns, grad_row,
                grad_column, grad_map, out_row, out_column, out_map, AFTER,
            )  # fmt: skip
            if POOL == 3:
                g += _window_gradient(
                    grad, out, argmax, row // 2 - 1, p, 2, odd, even_row, i, maps, out_rows, out_columns, grad_row,
                    grad_column, grad_map, out_row, out_column, out_map, AFTER,
                )  # fmt: skip
                if odd == 0:
                    g += _window_gradient(
                        grad, out, argmax, row // 2, p - 1, row % 2, 2, p >= 0, i, maps, out_rows, out_columns,
                        grad_row, grad_column, grad_map, out_row, out_column, out_map, AFTER,
                    )  # fmt: skip
                    g += _window_gradient(
                        grad, out, argmax, row // 2 - 1, p - 1, 2, 2, even_row, i, maps, out_rows, out_columns,
                        grad_row, grad_column, grad_map, out_row, out_column, out_map, AFTER,
                    )  # fmt: skip
            if NORM or BEFORE != "none":
                v = tl.load(x + row * x_row + column * x_column + i, mask=inside, other=0.0).to(tl.float32)
                a = activate(v + biases, BEFORE)
                g = through_normalization(g, a, band, alpha, beta, k, NORM, THREE_QUARTERS, TERMS)
                g = through_activation(g, a, BEFORE)
            position = x_grad + row * x_grad_row + column * x_grad_column
            tl.store(position + i, g.to(x_grad.dtype.element_ty), mask=inside)
            total += tl.where(inside, g, 0.0)
    i = tl.arange(0, MAPS)
    tl.store(bias_sums + program * maps + i, tl.sum(total, 0), mask=i < maps)


# ---- Without pooling


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def pointwise_forward(
    x, bias, out, positions, maps, x_position, out_position, alpha, beta, k,
    BEFORE: tl.constexpr, NORM: tl.constexpr, REACH: tl.constexpr, THREE_QUARTERS: tl.constexpr, TERMS: tl.constexpr,
    POSITIONS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Write the activated, normalized values `out` at POSITIONS positions. Positions are numbered across all images."""
    p = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    i = tl.arange(0, MAPS)[None, :]
    inside = (p < positions) & (i < maps)
    biases = tl.load(bias + i, mask=i < maps, other=0.0)
    v = tl.load(x + p * x_position + i, mask=inside, other=0.0).to(tl.float32)
    y = activate(v + biases, BEFORE)
    if NORM:
        y = normalize(y, band_matrix(maps, REACH, MAPS), alpha, beta, k, NORM, THREE_QUARTERS, TERMS)
    tl.store(out + p * out_position + i, y.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def pointwise_backward(
    x, bias, grad, out, x_grad, bias_sums, positions, maps, x_position, grad_position, out_position, x_grad_position,
    alpha, beta, k,
    BEFORE: tl.constexpr, NORM: tl.constexpr, REACH: tl.constexpr, THREE_QUARTERS: tl.constexpr, TERMS: tl.constexpr,
    TILES: tl.constexpr, POSITIONS: tl.constexpr, MAPS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of the input x. Each program writes TILES tiles of POSITIONS positions of the feature maps.

    `bias_sums` (programs, maps) gets each program's sum of the gradient. Without a normalization, the gradient of
    the nonlinearity is computed from `out`, and x is not read.
    """
    program = tl.program_id(0)
    i = tl.arange(0, MAPS)[None, :]
    total = tl.zeros([POSITIONS, MAPS], dtype=tl.float32)
    if NORM:
        biases = tl.load(bias + i, mask=i < maps, other=0.0)
        band = band_matrix(maps, REACH, MAPS)
    for tile in range(TILES):
        p = (program * TILES + tile).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
        inside = (p < positions) & (i < maps)
        g = tl.load(grad + p * grad_position + i, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            v = tl.load(x + p * x_position + i, mask=inside, other=0.0).to(tl.float32)
            a = activate(v + biases, BEFORE)
            g = through_normalization(g, a, band, alpha, beta, k, NORM, THREE_QUARTERS, TERMS)
            g = through_activation(g, a, BEFORE)
        elif BEFORE != "none":
            y = tl.load(out + p * out_position + i, mask=inside, other=0.0).to(tl.float32)
            g = through_activation(g, y, BEFORE)
        tl.store(x_grad + p * x_grad_position + i, g.to(x_grad.dtype.element_ty), mask=inside)
        total += tl.where(inside, g, 0.0)
    i = tl.arange(0, MAPS)
    tl.store(bias_sums + program * maps + i, tl.sum(total, 0), mask=i < maps)

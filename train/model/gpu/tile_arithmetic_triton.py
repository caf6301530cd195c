"""Arithmetic of the Triton kernels in epilogue_triton.py: nonlinearities, and normalization across the maps of a tile.

A tile is all maps of a column at some positions (see epilogue_triton.py). To sum the values of each normalization
window, tensor cores multiply the tile by a band matrix of zeros and ones. Tensor cores multiply bfloat16 numbers, so
each value of the tile is split into a sum of TERMS bfloat16 numbers. With TERMS = 1, a value has 8 bits of precision,
which is enough for tensors of 16 bits. With TERMS = 3, a value has 24 bits of precision, as many as float32.

The product also multiplies values by the zeros of the band matrix, and 0 · ∞ and 0 · NaN are NaN. One infinite or NaN
value therefore makes all maps of the column NaN at the position of this value.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton compiles the type annotations along with the functions, and accepts only its own types.

from __future__ import annotations

import os

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

# Type of the factors of a matrix product. The factors are always bfloat16 numbers. Triton's interpreter multiplies
# tensors of type bfloat16 wrongly, so the interpreter gets the same numbers as float32.
FACTOR = tl.constexpr(tl.float32 if os.environ.get("TRITON_INTERPRET") == "1" else tl.bfloat16)


# ---- Functions of one value


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def activate(v, KIND: tl.constexpr):
    """Apply a nonlinearity to the values: "relu", "tanh", "sigmoid" or "none". All four nonlinearities keep NaN."""
    if KIND == "relu":
        v = tl.maximum(v, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif KIND == "tanh":
        square = v * v  # for |v| < 0.3 the series is exact to 1e-7, but the quotient would lose digits
        series = v * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        e = tl.exp(-2.0 * tl.abs(v))
        v = tl.where(tl.abs(v) < 0.3, series, tl.where(v < 0, e - 1.0, 1.0 - e) / (1.0 + e))
    elif KIND == "sigmoid":
        e = tl.exp(-tl.abs(v))
        v = tl.where(v < 0, e, 1.0) / (1.0 + e)
    return v


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def through_activation(g, y, KIND: tl.constexpr):
    """Return the gradient of the nonlinearity's input, from the gradient g of its output y."""
    if KIND == "relu":
        g = tl.where(y <= 0, 0.0, g)
    elif KIND == "tanh":
        g = g * (1.0 - y * y)
    elif KIND == "sigmoid":
        g = g * (y * (1.0 - y))
    return g


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def negative_power(s, beta, THREE_QUARTERS: tl.constexpr):
    """Return s^−β. For β = ¾ the power s^−β is computed with two square roots."""
    if THREE_QUARTERS:
        root = tl.rsqrt(s)
        power = root * tl.sqrt(root)
    else:
        power = tl.exp2(-beta * tl.log2(s))
    return power


# ---- Normalization across the maps of a tile (POSITIONS, MAPS)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def band_matrix(maps, REACH: tl.constexpr, MAPS: tl.constexpr):
    """Return the band matrix (MAPS, MAPS), which is 1 where two maps are at most REACH apart."""
    i, j = tl.arange(0, MAPS)[:, None], tl.arange(0, MAPS)[None, :]
    return tl.where((tl.abs(i - j) <= REACH) & (i < maps), 1.0, 0.0).to(FACTOR)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def window_sum(v, band, TERMS: tl.constexpr):
    """Return, for each map, the sum of v over the maps of its window."""
    term = v.to(tl.bfloat16)
    total = tl.dot(term.to(FACTOR), band)
    for _ in tl.static_range(1, TERMS):
        v = v - term.to(tl.float32)
        term = v.to(tl.bfloat16)
        total = tl.dot(term.to(FACTOR), band, total)
    return total


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def normalize(a, band, alpha, beta, k, NORM: tl.constexpr, THREE_QUARTERS: tl.constexpr, TERMS: tl.constexpr):
    """Return b = a · s^−β with s = k + α Σ a² (see lrn.py), or a itself without a normalization."""
    if NORM:
        s = k + alpha * window_sum(a * a, band, TERMS)
        a = a * negative_power(s, beta, THREE_QUARTERS)
    return a


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def through_normalization(
    g, a, band, alpha, beta, k, NORM: tl.constexpr, THREE_QUARTERS: tl.constexpr, TERMS: tl.constexpr
):
    """Return the gradient of a, from the gradient g of b = a · s^−β: g · s^−β − 2αβ · a · Σ (g · a · s^(−β−1))."""
    if NORM:
        s = k + alpha * window_sum(a * a, band, TERMS)
        direct = g * negative_power(s, beta, THREE_QUARTERS)
        g = direct - 2 * alpha * beta * a * window_sum(direct * a / s, band, TERMS)
    return g

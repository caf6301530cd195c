"""Rescaling: the shorter side to a given length, then the central square (the paper, section 2).

Both passes of a separable filter are products with banded matrices, done block by block in BLAS. Weights are integers
that sum to a power of two and every partial sum fits the float's mantissa, so floating point is exact here: the same
pixels come out whatever order, vector width or fused multiply-add a machine's BLAS uses. Only the rows and columns that
the square needs are computed.

`area` is the true area average: every source pixel counts by the share of it that lies under the output pixel, as
OpenCV's INTER_AREA, which made the authors' 2014 data set (cuda-convnet2, make-data/pyext/src/pyext.cpp). Pillow's BOX
is not this: it takes or leaves whole pixels, and on ILSVRC's sizes differs by 4 grey levels on average and by over
100 at edges. The other kernels are Pillow's (triangle, Keys' cubic with a = −0.5, Lanczos with three lobes, each
widened by the scale when shrinking) without its 8-bit rounding between the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

FILTERS = ("area", "bilinear", "bicubic", "lanczos")

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


def rescaled_size(width: int, height: int, side_px: int) -> tuple[int, int]:
    """(width, height) in px once the shorter side is `side_px`; the longer is rounded to the nearest, halves up."""
    short = min(width, height)
    return (width * side_px + short // 2) // short, (height * side_px + short // 2) // short


def rescale(
    pixels: npt.NDArray[np.uint8], side_px: int = 256, keep_aspect: bool = False, filter: str = "area"
) -> npt.NDArray[np.uint8]:
    """Rescale uint8 (H, W, 3) to `side_px` on the shorter side; the central square of it unless `keep_aspect`.

    Returns uint8 (side_px, side_px, 3), or with `keep_aspect` (H', W', 3) as rescaled_size says. The square begins at
    (longer − side_px) // 2. `filter` is one of FILTERS; `area` enlarges by `bicubic`, there being no area to average.
    Raises ValueError for another name.
    """
    if filter not in FILTERS:
        raise ValueError(f"filter {filter!r}: expected one of {', '.join(FILTERS)}")
    height, width = pixels.shape[:2]
    new_width, new_height = rescaled_size(width, height, side_px)
    rows, columns = (0, new_height), (0, new_width)
    if not keep_aspect:
        top, left = (new_height - side_px) // 2, (new_width - side_px) // 2
        rows, columns = (top, top + side_px), (left, left + side_px)
    if (new_width, new_height) == (width, height):
        return np.ascontiguousarray(pixels[rows[0] : rows[1], columns[0] : columns[1]])
    name = "bicubic" if filter == "area" and min(width, height) < side_px else filter
    down = _bands(height, new_height, *rows, name, 1)
    across = _bands(width, new_width, *columns, name, 3)
    return _two_passes(pixels, down, across, _ARITHMETIC[name])


@dataclass(frozen=True)
class _Arithmetic:
    """How many bits the weights of each pass and the numbers between the passes have, so that sums stay exact.

    For area, whose weights are not negative: 8 + 16 bits, then (8 + 4) + 12: both 24, the mantissa of float32. Kernels
    with negative lobes get float64 and more bits than anyone will see.
    """

    dtype: type[np.float32] | type[np.float64]
    first_bits: int
    between_bits: int
    second_bits: int


_EXACT32 = _Arithmetic(np.float32, 16, 4, 12)
_EXACT64 = _Arithmetic(np.float64, 22, 12, 22)
_ARITHMETIC = {"area": _EXACT32, "bilinear": _EXACT64, "bicubic": _EXACT64, "lanczos": _EXACT64}


@dataclass(frozen=True)
class _Band:
    """Outputs `out` come from inputs `taken` (both in units of pixels) through `weights`."""

    out: slice
    taken: slice
    weights: npt.NDArray[np.float32] | npt.NDArray[np.float64]


def _two_passes(
    pixels: npt.NDArray[np.uint8], down: tuple[_Band, ...], across: tuple[_Band, ...], how: _Arithmetic
) -> npt.NDArray[np.uint8]:
    left, right = across[0].taken.start, across[-1].taken.stop
    height, width = down[-1].out.stop, across[-1].out.stop
    strip = np.ascontiguousarray(pixels[:, left:right]).reshape(len(pixels), -1)  # (H, 3 w): RGB interleaved
    between = np.empty((height, strip.shape[1]), how.dtype)
    for band in down:
        np.matmul(band.weights, strip[band.taken].astype(how.dtype), out=between[band.out])
    between *= 2.0 ** (how.between_bits - how.first_bits)
    np.rint(between, out=between)
    result = np.empty((height, 3 * width), how.dtype)
    for band in across:
        taken = slice(3 * (band.taken.start - left), 3 * (band.taken.stop - left))
        np.matmul(between[:, taken], band.weights, out=result[:, 3 * band.out.start : 3 * band.out.stop])
    result *= 2.0 ** -(how.between_bits + how.second_bits)
    np.rint(result, out=result)
    if how is not _EXACT32:
        np.clip(result, 0, 255, out=result)
    return result.astype(np.uint8).reshape(height, width, 3)


_BLOCK = 16  # outputs to a band: small enough to waste little on zeros, large enough for BLAS


@lru_cache(maxsize=32)  # each 0.25 MB for ILSVRC's sizes, up to 2 MB for area at 12 megapixels
def _bands(n_in: int, n_out: int, first: int, last: int, name: str, channels: int) -> tuple[_Band, ...]:
    """The matrix of one pass, outputs `first` to `last` of `n_out`, cut into bands of _BLOCK outputs.

    For channels = 1 a band's weights are (outputs, inputs), to multiply from the left; for 3 they are the transpose
    with every weight spread over RGB, (3 inputs, 3 outputs), to multiply interleaved pixels from the right.
    """
    how = _ARITHMETIC[name]
    bits = how.first_bits if channels == 1 else how.second_bits
    outputs = np.arange(first, last)
    lows, weights = _area(n_in, n_out, outputs) if name == "area" else _kernel(n_in, n_out, outputs, name)
    # The running sum is rounded, not each weight: they sum to 2^bits, a flat picture stays flat, none turns negative.
    whole = np.diff(np.rint(np.cumsum(weights, axis=1) * 2.0**bits), axis=1, prepend=0.0)
    taps = whole.shape[1]
    starts = lows[::_BLOCK]  # one for each band
    ends = lows[np.minimum(np.arange(len(starts)) * _BLOCK + _BLOCK, len(lows)) - 1]
    length = min(n_in, int((ends - starts).max()) + taps)
    starts = np.minimum(starts, n_in - length)

    band, row = np.divmod(np.arange(len(outputs)), _BLOCK)
    dense = np.zeros((len(starts), _BLOCK, length + taps))  # taps beyond the picture's edge have weight zero
    dense[band[:, None], row[:, None], (lows - starts[band])[:, None] + np.arange(taps)] = whole
    dense = dense[:, :, :length]
    if channels > 1:
        spread = np.zeros((len(starts), length, channels, _BLOCK, channels))
        for channel in range(channels):
            spread[:, :, channel, :, channel] = dense.transpose(0, 2, 1)
        dense = spread.reshape(len(starts), length * channels, _BLOCK * channels)
    dense = dense.astype(how.dtype)
    bands = []
    for index, start in enumerate(starts.tolist()):
        out = slice(index * _BLOCK, min((index + 1) * _BLOCK, len(outputs)))
        used = out.stop - out.start
        matrix = dense[index, :used] if channels == 1 else dense[index, :, : used * channels]
        bands.append(_Band(out, slice(start, start + length), matrix))
    return tuple(bands)


def _area(n_in: int, n_out: int, outputs: Integers) -> tuple[Integers, Floats]:
    """Each output's first input, and weights (outputs, taps): the overlap of [i, i+1)·n_in/n_out with [j, j+1)."""
    low = outputs * n_in // n_out
    taken = low[:, None] + np.arange(-(-n_in // n_out) + 1)
    out = outputs[:, None]
    overlap = np.minimum((out + 1) * n_in, (taken + 1) * n_out) - np.maximum(out * n_in, taken * n_out)
    return low, np.maximum(overlap, 0) / n_in


def _kernel(n_in: int, n_out: int, outputs: Integers, name: str) -> tuple[Integers, Floats]:
    """Each output's first input, and weights (outputs, taps), of a kernel that is widened by the scale when
    shrinking.
    """
    reach, kernel = _KERNELS[name]
    scale = n_in / n_out
    width = max(scale, 1.0)
    centre = (outputs + 0.5) * scale
    low = np.maximum(0, (centre - reach * width).astype(np.int64))
    taken = low[:, None] + np.arange(int(2 * reach * width) + 2)
    weights = np.where(taken < n_in, kernel(np.abs(taken + 0.5 - centre[:, None]) / width), 0.0)
    return low, weights / weights.sum(axis=1, keepdims=True)


def _triangle(x: Floats) -> Floats:
    return np.maximum(1.0 - x, 0.0)


def _keys(x: Floats) -> Floats:
    near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos3(x: Floats) -> Floats:
    return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


_KERNELS: dict[str, tuple[float, Callable[[Floats], Floats]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _keys),
    "lanczos": (3.0, _lanczos3),
}

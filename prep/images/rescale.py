"""Rescaling: the shorter side to a given length, then the central square (the paper, section 2).

Weights are integers that sum to a power of two and every partial sum fits the float's mantissa, so floating point is
exact here: the same pixels come out whatever order, vector width or fused multiply-add is used. That is done by a
compiled kernel (kernels.c), and where it could not be compiled by products with banded matrices, block by block in BLAS.
Only the rows and columns that the square needs are computed.

`area` is the true area average: every source pixel counts by the share of it that lies under the output pixel, as
OpenCV's INTER_AREA, which made the authors' 2014 data set (cuda-convnet2, make-data/pyext/src/pyext.cpp). Pillow's BOX
is not this: it takes or leaves whole pixels, and on ILSVRC's sizes differs by 4 grey levels on average and by over
100 at edges. The other kernels are Pillow's (triangle, Keys' cubic with a = −0.5, Lanczos with three lobes, each
widened by the scale when shrinking) without its 8-bit rounding between the passes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from prep.images import kernels
from prep.images.central_square import central_offset
from prep.store.manifest import FILTERS

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
        top, left = central_offset(new_height, side_px), central_offset(new_width, side_px)
        rows, columns = (top, top + side_px), (left, left + side_px)
    if (new_width, new_height) == (width, height):
        return np.ascontiguousarray(pixels[rows[0] : rows[1], columns[0] : columns[1]])
    name = "bicubic" if filter == "area" and min(width, height) < side_px else filter
    down, across = _Lines(height, new_height, *rows, name, 1), _Lines(width, new_width, *columns, name, 3)
    if kernels.native:
        return kernels.native.rescale(pixels, _remembered(_native_pass, down), _remembered(_native_pass, across))
    return _two_passes(pixels, _remembered(_pass, down), _remembered(_pass, across), _ARITHMETIC[name])


@dataclass(frozen=True)
class _Arithmetic:
    """How many bits the weights of each pass and the numbers between the passes have, so that sums stay exact.

    For area, whose weights are not negative: 8 + 16 bits, then (8 + 4) + 12: both 24, the mantissa of float32. Kernels
    with negative lobes get float64 and more bits than anyone will see. A weight is a whole number of 2^-bits; those of
    the first pass are given times 2^between_bits, so that rounding its sums to whole numbers is all that is left.
    """

    dtype: type[np.float32] | type[np.float64]
    first_bits: int
    between_bits: int
    second_bits: int


_EXACT32 = _Arithmetic(np.float32, 16, 4, 12)
_EXACT64 = _Arithmetic(np.float64, 22, 12, 22)
_ARITHMETIC = {"area": _EXACT32, "bilinear": _EXACT64, "bicubic": _EXACT64, "lanczos": _EXACT64}


class _Lines(NamedTuple):
    """What a pass does: lines of `n_in` pixels to `n_out`, of which outputs `first` to `last` are wanted.

    The first pass, down, has `channels` = 1, for a column is one number wide; the second, across, has 3.
    """

    n_in: int
    n_out: int
    first: int
    last: int
    name: str
    channels: int


class _Pass(NamedTuple):
    """One pass of a filter: the inputs that it needs, how many numbers it gives, and its matrix cut into bands.

    A band is (inputs, outputs, weights): slices of the numbers of one line, the inputs counted from `taken.start`.
    """

    taken: slice  # of pixels
    length: int  # of a line of outputs, in numbers
    bands: tuple[tuple[slice, slice, npt.NDArray[Any]], ...]
    size: int  # bytes of all weights


Made = TypeVar("Made", _Pass, kernels.Pass)


def _two_passes(pixels: npt.NDArray[np.uint8], down: _Pass, across: _Pass, how: _Arithmetic) -> npt.NDArray[np.uint8]:
    strip = np.ascontiguousarray(pixels[down.taken, across.taken])
    strip = strip.reshape(len(strip), -1)  # (rows, 3 columns): RGB interleaved
    between = np.empty((down.length, strip.shape[1]), how.dtype)
    for taken, out, weights in down.bands:
        np.matmul(weights, strip[taken].astype(how.dtype), out=between[out])
    np.rint(between, out=between)
    result = np.empty((down.length, across.length), how.dtype)
    for taken, out, weights in across.bands:
        np.matmul(between[:, taken], weights, out=result[:, out])
    np.rint(result, out=result)
    if how is not _EXACT32:
        np.clip(result, 0, 255, out=result)
    return result.astype(np.uint8).reshape(down.length, -1, 3)


_BLOCK = {1: 16, 3: 4}  # outputs to a band, by channels: small wastes little on zeros, large keeps BLAS busy


_CACHE_BYTES = 64_000_000  # of weights: 40 KB down and 0.1 MB across for ILSVRC's sizes, hundreds of them
_cache: OrderedDict[tuple[Callable[[_Lines], Any], _Lines], Any] = OrderedDict()
_cached_bytes = 0


def _remembered(make: Callable[[_Lines], Made], lines: _Lines) -> Made:
    """make(lines), kept for the sizes that were used last."""
    global _cached_bytes
    key = make, lines
    if key in _cache:
        _cache.move_to_end(key)
    else:
        _cache[key] = make(lines)
        _cached_bytes += _cache[key].size
        while _cached_bytes > _CACHE_BYTES and len(_cache) > 2:  # two are in use
            _cached_bytes -= _cache.popitem(last=False)[1].size
    made: Made = _cache[key]
    return made


def _taps(lines: _Lines) -> tuple[Integers, npt.NDArray[Any]]:
    """Each output's first input, (outputs,), and its weights, (outputs, taps): see _Arithmetic."""
    n_in, n_out, first, last, name, channels = lines
    how = _ARITHMETIC[name]
    bits = how.first_bits if channels == 1 else how.second_bits
    outputs = np.arange(first, last)
    lows, weights = _area(n_in, n_out, outputs) if name == "area" else _kernel(n_in, n_out, outputs, name)
    # The running sum is rounded, not each weight: they sum to 2^bits, a flat picture stays flat, none turns negative.
    sums = np.rint(np.cumsum(weights, axis=1) * 2.0**bits)
    sums[:, 1:] -= sums[:, :-1].copy()
    whole = sums * 2.0 ** ((how.between_bits if channels == 1 else -how.between_bits) - bits)
    return lows, whole.astype(how.dtype)


def _native_pass(lines: _Lines) -> kernels.Pass:
    return kernels.Pass(*_taps(lines))


def _pass(lines: _Lines) -> _Pass:
    """The matrix of one pass, cut into bands of _BLOCK outputs.

    For channels = 1 a band's weights are (outputs, inputs), to multiply from the left; for 3 they are the transpose
    with every weight spread over RGB, (3 inputs, 3 outputs), to multiply interleaved pixels from the right.
    """
    n_in, channels, block = lines.n_in, lines.channels, _BLOCK[lines.channels]
    lows, whole = _taps(lines)
    outputs, taps = whole.shape
    starts = lows[::block]  # one for each band
    ends = lows[np.minimum(np.arange(len(starts)) * block + block, len(lows)) - 1]
    length = min(n_in, int((ends - starts).max()) + taps)
    starts = np.minimum(starts, n_in - length)

    band, row = np.divmod(np.arange(outputs), block)
    column = (lows - starts[band])[:, None] + np.arange(taps)  # beyond `length` only for taps of weight zero
    if channels == 1:
        dense = np.zeros((len(starts), block, length + taps), whole.dtype)
        dense[band[:, None], row[:, None], column] = whole
        dense = dense[:, :, :length]
    else:
        dense = np.zeros((len(starts), length + taps, channels, block, channels), whole.dtype)
        for channel in range(channels):
            dense[band[:, None], column, channel, row[:, None], channel] = whole
        dense = dense[:, :length].reshape(len(starts), length * channels, block * channels)
    first_in = int(starts[0])
    bands = [
        (slice(start, start + length * channels), slice(index * block * channels, (index + 1) * block * channels), band)
        for index, (start, band) in enumerate(zip(((starts - first_in) * channels).tolist(), dense, strict=True))
    ]
    partial = outputs % block
    if partial:
        taken, out, weights = bands[-1]
        end = partial * channels
        bands[-1] = (taken, slice(out.start, out.start + end), weights[:end] if channels == 1 else weights[:, :end])
    return _Pass(slice(first_in, int(starts[-1]) + length), outputs * channels, tuple(bands), dense.nbytes)


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

"""Rescales the shorter side of an image to a given length and crops to the central square (the paper, section 2).

The result is the same, bit for bit, on every machine. Filter weights are fixed-point numbers that sum to a power of
two. Every partial sum fits the mantissa of the float type. The floating-point sums are therefore exact for any order of
additions and any vector width, with or without fused multiply-add. A compiled kernel (kernels.c) computes the sums.
Without the kernel, BLAS multiplies the pixels by banded matrices, block by block. Pixels outside the central square are
computed only if `keep_aspect` is set.

The filter `area` computes the true area average: the weight of a source pixel is proportional to the area that the
source pixel shares with the output pixel. OpenCV's INTER_AREA uses the same weights. The authors made their data set of
2014 with INTER_AREA (cuda-convnet2, make-data/pyext/src/pyext.cpp). Pillow's filter BOX counts a source pixel either
fully or not at all. For images of ILSVRC's sizes, BOX differs from `area` by 4 grey levels on average and by over 100
at edges. The filters except `area` are Pillow's: the triangle (`bilinear`), Keys' cubic with a = −0.5, and Lanczos with
three lobes. When an image is made smaller, Pillow's filters are widened by the scale factor. Unlike Pillow, this module
does not round to 8 bits between the passes.
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
    """Return the size (width, height) in px that an image has after its shorter side is rescaled to `side_px`.

    The longer side is rounded, with halves rounded up.
    """
    short = min(width, height)
    return (width * side_px + short // 2) // short, (height * side_px + short // 2) // short


def rescale(
    pixels: npt.NDArray[np.uint8], side_px: int = 256, keep_aspect: bool = False, filter: str = "area"
) -> npt.NDArray[np.uint8]:
    """Rescale uint8 (H, W, 3) to `side_px` on the shorter side, and cut out the central square unless `keep_aspect`.

    Returns uint8 (side_px, side_px, 3), or (H', W', 3) with `keep_aspect` (see rescaled_size). The central square
    begins at (longer rescaled side − side_px) // 2. If the image is enlarged, `area` uses the bicubic filter, because
    an output pixel then covers less than one source pixel. Raises ValueError if `filter` is not one of FILTERS.
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
    down = _PassSpec(height, new_height, *rows, name, 1)
    across = _PassSpec(width, new_width, *columns, name, 3)
    if kernels.native:
        return kernels.native.rescale(pixels, _cached(_native_pass, down), _cached(_native_pass, across))
    return _matmul_passes(pixels, _cached(_banded_matrix, down), _cached(_banded_matrix, across), _ARITHMETIC[name])


@dataclass(frozen=True)
class _Arithmetic:
    """Numbers of bits of the weights and of the values between the passes.

    The numbers are so small that all sums are exact. The weights of `area` are not negative. A sum of the first pass
    needs 24 bits: 8 for the pixels and 16 for the weights. A sum of the second pass also needs 24 bits: 8 + 4 for the
    values between the passes and 12 for the weights. float32's mantissa has 24 bits. All filters except `area` use
    float64, and so many bits that further bits would rarely change an 8-bit pixel.

    The weights of the first pass are multiples of 2^-first_bits. They are stored multiplied by 2^between_bits, so that
    the sums of the first pass only need to be rounded to integers. The weights of the second pass are multiples of
    2^-second_bits. They are stored multiplied by 2^-between_bits.
    """

    dtype: type[np.float32] | type[np.float64]
    first_bits: int  # fractional bits of the first pass's weights
    between_bits: int  # fractional bits of the values between the passes
    second_bits: int  # fractional bits of the second pass's weights


_EXACT32 = _Arithmetic(np.float32, 16, 4, 12)
_EXACT64 = _Arithmetic(np.float64, 22, 12, 22)
_ARITHMETIC = {"area": _EXACT32, "bilinear": _EXACT64, "bicubic": _EXACT64, "lanczos": _EXACT64}


class _PassSpec(NamedTuple):
    """One pass of a separable filter: rescales lines of `n_in` pixels to `n_out` pixels.

    Only the output pixels first..last − 1 are computed. `channels` is 1 for the first pass, which filters columns of
    single numbers, and 3 for the second pass, which filters rows of RGB pixels.
    """

    n_in: int
    n_out: int
    first: int
    last: int
    filter: str
    channels: int


class _BandedMatrix(NamedTuple):
    """The matrix of one pass for BLAS, divided into bands along its diagonal.

    A band is (inputs, outputs, weights): a slice of the elements of an input line, a slice of the elements of an output
    line, and a matrix. The slices of input elements count from the first element of pixel `source.start`.
    """

    source: slice  # pixels that the pass reads from each line
    length: int  # number of elements of an output line
    bands: tuple[tuple[slice, slice, npt.NDArray[Any]], ...]
    size: int  # number of bytes of all weights


Pass = TypeVar("Pass", _BandedMatrix, kernels.FilterPass)


def _matmul_passes(
    pixels: npt.NDArray[np.uint8], down: _BandedMatrix, across: _BandedMatrix, arithmetic: _Arithmetic
) -> npt.NDArray[np.uint8]:
    strip = np.ascontiguousarray(pixels[down.source, across.source])
    strip = strip.reshape(len(strip), -1)  # (rows, 3 · columns): RGB interleaved
    between = np.empty((down.length, strip.shape[1]), arithmetic.dtype)
    for inputs, outputs, weights in down.bands:
        np.matmul(weights, strip[inputs].astype(arithmetic.dtype), out=between[outputs])
    np.rint(between, out=between)
    result = np.empty((down.length, across.length), arithmetic.dtype)
    for inputs, outputs, weights in across.bands:
        np.matmul(between[:, inputs], weights, out=result[:, outputs])
    np.rint(result, out=result)
    if arithmetic is not _EXACT32:
        np.clip(result, 0, 255, out=result)
    return result.astype(np.uint8).reshape(down.length, -1, 3)


_CACHE_BYTES = 64_000_000  # limit for cached weights; the two passes of an ILSVRC image need 10 KB (0.1 MB with BLAS)
_cache: OrderedDict[tuple[Callable[[_PassSpec], Any], _PassSpec], Any] = OrderedDict()
_cached_bytes = 0


def _cached(make: Callable[[_PassSpec], Pass], spec: _PassSpec) -> Pass:
    """Return make(spec), cached.

    If the cache has more than _CACHE_BYTES, the least recently used results are dropped.
    """
    global _cached_bytes
    key = make, spec
    if key in _cache:
        _cache.move_to_end(key)
    else:
        _cache[key] = make(spec)
        _cached_bytes += _cache[key].size
        while _cached_bytes > _CACHE_BYTES and len(_cache) > 2:  # the two newest entries are in use
            _cached_bytes -= _cache.popitem(last=False)[1].size
    result: Pass = _cache[key]
    return result


def _filter_taps(spec: _PassSpec) -> tuple[Integers, npt.NDArray[Any]]:
    """Return the first input index (outputs,) and the weights (outputs, taps), scaled as in _Arithmetic."""
    n_in, n_out, first, last, name, channels = spec
    arithmetic = _ARITHMETIC[name]
    bits = arithmetic.first_bits if channels == 1 else arithmetic.second_bits
    outputs = np.arange(first, last)
    if name == "area":
        first_inputs, weights = _area_weights(n_in, n_out, outputs)
    else:
        first_inputs, weights = _kernel_weights(n_in, n_out, outputs, name)
    # Round the running sums of the weights, not each weight. The weights of an output then sum to exactly 2^bits. An
    # image of one colour therefore keeps its colour, and rounding makes no weight negative.
    sums = np.rint(np.cumsum(weights, axis=1) * 2.0**bits)
    sums[:, 1:] -= sums[:, :-1].copy()
    scaled = sums * 2.0 ** ((arithmetic.between_bits if channels == 1 else -arithmetic.between_bits) - bits)
    return first_inputs, scaled.astype(arithmetic.dtype)


def _native_pass(spec: _PassSpec) -> kernels.FilterPass:
    return kernels.FilterPass(*_filter_taps(spec))


# Channels -> number of outputs in a band; larger bands multiply more zeros, smaller bands are slow.
_BAND_OUTPUTS = {1: 16, 3: 4}


def _banded_matrix(spec: _PassSpec) -> _BandedMatrix:
    """Return the matrix of one pass, divided into bands of _BAND_OUTPUTS outputs.

    For channels = 1 the weights of a band are a matrix (outputs, inputs) that multiplies pixels from the left. For
    channels = 3 the weights are a matrix (3 · inputs, 3 · outputs) that multiplies interleaved pixels from the right.
    The matrix for channels = 3 contains every weight three times, for R, G and B.
    """
    n_in, channels, block = spec.n_in, spec.channels, _BAND_OUTPUTS[spec.channels]
    first_inputs, tap_weights = _filter_taps(spec)
    outputs, taps = tap_weights.shape
    starts = first_inputs[::block]  # first input of each band
    ends = first_inputs[np.minimum(np.arange(len(starts)) * block + block, len(first_inputs)) - 1]
    length = min(n_in, int((ends - starts).max()) + taps)
    starts = np.minimum(starts, n_in - length)

    band, row = np.divmod(np.arange(outputs), block)
    column = (first_inputs - starts[band])[:, None] + np.arange(taps)  # taps beyond `length` have the weight zero
    if channels == 1:
        dense = np.zeros((len(starts), block, length + taps), tap_weights.dtype)
        dense[band[:, None], row[:, None], column] = tap_weights
        dense = dense[:, :, :length]
    else:
        dense = np.zeros((len(starts), length + taps, channels, block, channels), tap_weights.dtype)
        for channel in range(channels):
            dense[band[:, None], column, channel, row[:, None], channel] = tap_weights
        dense = dense[:, :length].reshape(len(starts), length * channels, block * channels)
    source_start = int(starts[0])
    bands = [
        (slice(start, start + length * channels), slice(index * block * channels, (index + 1) * block * channels), band)
        for index, (start, band) in enumerate(zip(((starts - source_start) * channels).tolist(), dense, strict=True))
    ]
    partial = outputs % block  # number of outputs in the last band, if this band is not full
    if partial:
        inputs, out, weights = bands[-1]
        end = partial * channels
        bands[-1] = (inputs, slice(out.start, out.start + end), weights[:end] if channels == 1 else weights[:, :end])
    source = slice(source_start, int(starts[-1]) + length)
    return _BandedMatrix(source, outputs * channels, tuple(bands), dense.nbytes)


def _area_weights(n_in: int, n_out: int, outputs: Integers) -> tuple[Integers, Floats]:
    """Return the first input index (outputs,) and the weights (outputs, taps) of each output for the area filter.

    Output pixel i covers the interval [i, i + 1)·n_in/n_out, and input pixel j covers the interval [j, j + 1). The
    weight of input j for output i is the length of the overlap of their intervals, divided by n_in/n_out.
    """
    first_inputs = outputs * n_in // n_out
    inputs = first_inputs[:, None] + np.arange(-(-n_in // n_out) + 1)
    out = outputs[:, None]
    overlap = np.minimum((out + 1) * n_in, (inputs + 1) * n_out) - np.maximum(out * n_in, inputs * n_out)
    return first_inputs, np.maximum(overlap, 0) / n_in


def _kernel_weights(n_in: int, n_out: int, outputs: Integers, name: str) -> tuple[Integers, Floats]:
    """Return the first input index (outputs,) and the weights (outputs, taps) of each output for a filter in _KERNELS.

    If the line becomes shorter, the kernel is widened by the factor n_in/n_out.
    """
    radius, kernel = _KERNELS[name]
    scale = n_in / n_out
    width = max(scale, 1.0)
    centre = (outputs + 0.5) * scale
    first_inputs = np.maximum(0, (centre - radius * width).astype(np.int64))
    inputs = first_inputs[:, None] + np.arange(int(2 * radius * width) + 2)
    weights = np.where(inputs < n_in, kernel(np.abs(inputs + 0.5 - centre[:, None]) / width), 0.0)
    return first_inputs, weights / weights.sum(axis=1, keepdims=True)


def _triangle(x: Floats) -> Floats:
    return np.maximum(1.0 - x, 0.0)


def _keys_cubic(x: Floats) -> Floats:
    near, far = (1.5 * x - 2.5) * x * x + 1.0, ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos3(x: Floats) -> Floats:
    return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


# Name of the filter -> (radius of the kernel in source pixels, before widening; kernel)
_KERNELS: dict[str, tuple[float, Callable[[Floats], Floats]]] = {
    "bilinear": (1.0, _triangle),
    "bicubic": (2.0, _keys_cubic),
    "lanczos": (3.0, _lanczos3),
}

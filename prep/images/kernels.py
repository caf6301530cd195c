"""Compiled loops for rescaling and colour sums (kernels.c). `native` is None if the loops cannot be used.

The docstring of prep.compiled lists the cases in which compiled loops cannot be used. Without compiled loops,
rescale.py and color_stats.py compute the same results, bit for bit, with NumPy.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep import compiled

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

SOURCE = Path(__file__).with_name("kernels.c")


class FilterPass(ctypes.Structure):
    """One pass of a separable filter: output k is the sum over t < taps of weights[k, t] · input[first_inputs[k] + t].

    `first_inputs` is int64 (outputs,). `weights` is float32 or float64 (outputs, taps) with at least two taps. The
    weight of an input beyond the image is zero.
    """

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("_first_inputs", ctypes.c_void_p),
        ("_weights", ctypes.c_void_p),
    )

    def __init__(self, first_inputs: npt.NDArray[np.int64], weights: npt.NDArray[Any]) -> None:
        self.first_inputs = np.ascontiguousarray(first_inputs)  # these attributes keep both arrays alive for the C code
        self.weights = np.ascontiguousarray(weights)
        self.size = self.first_inputs.nbytes + self.weights.nbytes  # bytes
        super().__init__(*weights.shape, self.first_inputs.ctypes.data, self.weights.ctypes.data)


class NativeKernels:
    """The functions of the compiled kernels.c. The constructor raises AttributeError if a function is missing."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._rescale = {"f": library.rescale_float, "d": library.rescale_double}
        self._moments = library.add_moments
        self._moments.argtypes = [pointer, number, pointer]
        self._lines = library.add_lines
        self._lines.argtypes = [pointer, number, number, number, pointer]
        for function in self._rescale.values():
            function.argtypes = [pointer, number, FilterPass, FilterPass, pointer, pointer]
        for function in (*self._rescale.values(), self._moments, self._lines):
            function.restype = None

    def rescale(self, pixels: npt.NDArray[np.uint8], down: FilterPass, across: FilterPass) -> npt.NDArray[np.uint8]:
        """Filter an image, uint8 (H, W, 3), down the columns, then across the rows.

        Returns uint8 (down.outputs, across.outputs, 3). Each pass rounds its sums to the nearest integer, with halves
        rounded to even numbers. Results are clipped to 0..255. The weights of both passes have the same type, float32
        or float64. The result is exact if all sums fit the mantissa of this type, and if the values between the passes
        are at least two bits shorter than the mantissa.
        """
        pixels = np.ascontiguousarray(pixels)
        width = pixels.shape[1]
        out = np.empty((down.outputs, across.outputs, 3), np.uint8)
        scratch = np.empty(3 * (width + across.taps + across.outputs) + 8, across.weights.dtype)
        self._rescale[scratch.dtype.char](pixels.ctypes.data, width, down, across, out.ctypes.data, scratch.ctypes.data)
        return out

    def add_moments(self, pixels: npt.NDArray[np.uint8], sums: npt.NDArray[np.int64]) -> None:
        """Add the sums of R, G, B, RR, RG, RB, GG, GB, BB over `pixels`, uint8 (H, W, 3), to `sums`, int64 (9,)."""
        pixels = np.ascontiguousarray(pixels)
        self._moments(pixels.ctypes.data, pixels.size // 3, sums.ctypes.data)

    def add_square(self, square: npt.NDArray[np.uint8], sums: npt.NDArray[np.uint16]) -> None:
        """Add `square`, uint8 (side, side, 3), to `sums`, uint16 (side, side, 3). `square` may be a view."""
        if square.strides[1:] != (3, 1):
            square = np.ascontiguousarray(square)
        side = len(sums)
        self._lines(square.ctypes.data, square.strides[0], side, 3 * side, sums.ctypes.data)


def is_correct(kernels: NativeKernels) -> bool:
    """Self-test: compare the compiled loops with NumPy on a small image.

    Both floating-point types are tested, with five taps for each output row and three or four taps for each output
    column. Some of the weights are zero.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)

    def random_pass(n_in: int, n_out: int, taps: int, denominator: int) -> tuple[Integers, Floats, Floats]:
        """Return first inputs, weights and the dense matrix of the weights.

        The weights are multiples of 1/denominator and have both signs.
        """
        first_inputs, columns = np.arange(n_out) * n_in // n_out, np.arange(taps)
        weights = (
            4 * rng.multinomial(denominator, np.ones(taps) / taps, n_out) - 3 * denominator // taps
        ) / denominator
        weights[columns >= rng.integers(1, taps + 1, n_out)[:, None]] = 0
        weights[first_inputs[:, None] + columns >= n_in] = 0
        dense = np.zeros((n_out, n_in + taps))
        dense[np.arange(n_out)[:, None], first_inputs[:, None] + columns] = weights
        return first_inputs, weights, dense[:, :n_in]

    for dtype, taps_across in itertools.product((np.float32, np.float64), (3, 4)):
        first_rows, row_weights, down = random_pass(61, 27, 5, 2**11)
        first_columns, column_weights, across = random_pass(83, 35, taps_across, 2**7)
        between = np.rint(np.einsum("oi,ijc->ojc", down, pixels))
        expected = np.clip(np.rint(np.einsum("pj,ojc->opc", across, between)), 0, 255)
        passes = (
            FilterPass(first_rows, row_weights.astype(dtype)),
            FilterPass(first_columns, column_weights.astype(dtype)),
        )
        if not np.array_equal(kernels.rescale(pixels, *passes), expected):
            return False
    moments, square = np.zeros(9, np.int64), np.full((13, 13, 3), 7, np.uint16)
    kernels.add_moments(pixels, moments)
    kernels.add_square(pixels[5:18, 11:24], square)
    flat = pixels.reshape(-1, 3).astype(np.int64)
    outer = (flat.T @ flat)[np.triu_indices(3)]
    moments_are_right = np.array_equal(moments, [*flat.sum(axis=0), *outer])
    return moments_are_right and np.array_equal(square, pixels[5:18, 11:24].astype(np.uint16) + 7)


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)

"""The inner loops of a build in C (kernels.c); `native` is None where they could not be compiled (compiled.py).

rescale.py and colour.py do the same in NumPy, with the same bits.
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


class Pass(ctypes.Structure):
    """One pass of a separable filter: output k is the sum over t of weights[k, t] · input[lows[k] + t].

    lows: int64 (outputs,). weights: float32 or float64 (outputs, taps), two taps at the least; zero where there is no
    such input.
    """

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("_lows", ctypes.c_void_p),
        ("_weights", ctypes.c_void_p),
    )

    def __init__(self, lows: npt.NDArray[np.int64], weights: npt.NDArray[Any]) -> None:
        self.lows, self.weights = np.ascontiguousarray(lows), np.ascontiguousarray(weights)  # kept while C points there
        self.size = self.lows.nbytes + self.weights.nbytes
        super().__init__(*weights.shape, self.lows.ctypes.data, self.weights.ctypes.data)


class NativeKernels:
    """The library's functions. Raises AttributeError where it lacks one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._rescale = {"f": library.rescale_float, "d": library.rescale_double}
        self._moments = library.add_moments
        self._moments.argtypes = [pointer, number, pointer]
        self._lines = library.add_lines
        self._lines.argtypes = [pointer, number, number, number, pointer]
        for function in self._rescale.values():
            function.argtypes = [pointer, number, Pass, Pass, pointer, pointer]
        for function in (*self._rescale.values(), self._moments, self._lines):
            function.restype = None

    def rescale(self, pixels: npt.NDArray[np.uint8], down: Pass, across: Pass) -> npt.NDArray[np.uint8]:
        """uint8 (H, W, 3) to uint8 (down.outputs, across.outputs, 3): rows first, rounded, then columns, rounded.

        Results are clipped to 0..255; halves go to the even number. Both passes' weights are of one type; exact where
        all sums fit its mantissa, and the numbers between the passes have two bits less.
        """
        pixels = np.ascontiguousarray(pixels)
        width = pixels.shape[1]
        out = np.empty((down.outputs, across.outputs, 3), np.uint8)
        scratch = np.empty(3 * (width + across.taps + across.outputs) + 8, across.weights.dtype)
        self._rescale[scratch.dtype.char](pixels.ctypes.data, width, down, across, out.ctypes.data, scratch.ctypes.data)
        return out

    def add_moments(self, pixels: npt.NDArray[np.uint8], sums: npt.NDArray[np.int64]) -> None:
        """Add R, G, B, RR, RG, RB, GG, GB, BB over all pixels of uint8 (H, W, 3) to `sums`, int64 (9,)."""
        pixels = np.ascontiguousarray(pixels)
        self._moments(pixels.ctypes.data, pixels.size // 3, sums.ctypes.data)

    def add_square(self, square: npt.NDArray[np.uint8], sums: npt.NDArray[np.uint16]) -> None:
        """Add uint8 (side, side, 3), whose rows may lie apart, to `sums`, uint16 (side, side, 3)."""
        if square.strides[1:] != (3, 1):
            square = np.ascontiguousarray(square)
        side = len(sums)
        self._lines(square.ctypes.data, square.strides[0], side, 3 * side, sums.ctypes.data)


def is_correct(kernel: NativeKernels) -> bool:
    """Whether it computes what it should on a small picture, with one to five rows and three or four columns to each
    output, in both kinds of numbers.
    """
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (61, 83, 3), dtype=np.uint8)

    def draw(n_in: int, n_out: int, taps: int, whole: int) -> tuple[Integers, Floats, Floats]:
        lows, columns = np.arange(n_out) * n_in // n_out, np.arange(taps)
        weights = (4 * rng.multinomial(whole, np.ones(taps) / taps, n_out) - 3 * whole // taps) / whole  # of both signs
        weights[columns >= rng.integers(1, taps + 1, n_out)[:, None]] = 0
        weights[lows[:, None] + columns >= n_in] = 0
        dense = np.zeros((n_out, n_in + taps))
        dense[np.arange(n_out)[:, None], lows[:, None] + columns] = weights
        return lows, weights, dense[:, :n_in]

    for dtype, columns in itertools.product((np.float32, np.float64), (3, 4)):
        (low_rows, row_weights, down), (low_columns, weights, across) = (
            draw(61, 27, 5, 2**11),
            draw(83, 35, columns, 2**7),
        )
        between = np.rint(np.einsum("oi,ijc->ojc", down, pixels))
        expected = np.clip(np.rint(np.einsum("pj,ojc->opc", across, between)), 0, 255)
        passes = Pass(low_rows, row_weights.astype(dtype)), Pass(low_columns, weights.astype(dtype))
        if not np.array_equal(kernel.rescale(pixels, *passes), expected):
            return False
    moments, square = np.zeros(9, np.int64), np.full((13, 13, 3), 7, np.uint16)
    kernel.add_moments(pixels, moments)
    kernel.add_square(pixels[5:18, 11:24], square)
    flat = pixels.reshape(-1, 3).astype(np.int64)
    outer = (flat.T @ flat)[np.triu_indices(3)]
    right = np.array_equal(moments, [*flat.sum(axis=0), *outer])
    return right and np.array_equal(square, pixels[5:18, 11:24].astype(np.uint16) + 7)


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)

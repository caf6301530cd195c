"""Python interface of kernels.c, the C kernel that crops, flips and normalizes images on a CPU.

`native` is None if the library is not compiled, fails its self-test or is switched off (prep/compiled.py). Streams on a
CPU then use DALI's crop_mirror_normalize, which takes two to three times as long as the kernel.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep import compiled

SOURCE = Path(__file__).with_name("kernels.c")
CROP_DTYPE = np.dtype(  # struct crop in kernels.c
    [("pixels", np.uint64), ("stride", np.int64), ("mean", np.uint64), ("shift", np.float32, 3), ("flip", np.int32)]
)


class NativeKernels:
    """Functions of the compiled library. Raises AttributeError if the library lacks a function."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._crop = {"NCHW": library.crop_nchw, "NHWC": library.crop_nhwc}
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in self._crop.values():
            function.argtypes = [pointer, number, number, number, ctypes.c_float, pointer]
            function.restype = None

    def crop(
        self,
        crops: npt.NDArray[np.void],
        layout: str,
        mean_side_px: int,
        scale: float,
        out: npt.NDArray[np.float32],
    ) -> None:
        """Write (pixel + shift − mean) · scale for the pixels of each crop to `out`.

        crops         (N,) of CROP_DTYPE, contiguous. The addresses in this array are not checked: each must point to
                      memory that is large enough. Only `mean` can be 0, which means that no mean is subtracted
        layout        layout of `out` and of the mean image: "NCHW" or "NHWC"
        mean_side_px  side of the square mean image; the field `mean` of a crop is an address in this image
        out           (N, 3, side, side) or (N, side, side, 3)
        """
        side = out.shape[2]
        self._crop[layout](crops.ctypes.data, len(crops), side, mean_side_px, scale, out.ctypes.data)


def is_correct(kernel: NativeKernels) -> bool:
    """True if the library computes a few small crops correctly."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (47, 53, 3), dtype=np.uint8)
    side, mean = 37, (255 * rng.random((41, 41, 3))).astype(np.float32)
    for layout, (flip, with_mean) in product(("NCHW", "NHWC"), product((0, 1), (0, 1))):
        mean_in_layout = np.ascontiguousarray(mean.transpose(2, 0, 1) if layout == "NCHW" else mean)
        crops = np.zeros(2, CROP_DTYPE)
        positions, shifts = ((3, 5), (10, 16)), rng.normal(0, 9, (2, 3)).astype(np.float32)
        crops["pixels"] = [image[position].ctypes.data for position in positions]
        crops["stride"], crops["shift"], crops["flip"] = 53 * 3, shifts, flip
        crops["mean"] = with_mean * (mean_in_layout.ctypes.data + (4 * 41 + 2) * (4 if layout == "NCHW" else 12))
        out = np.full((2, 3, side, side) if layout == "NCHW" else (2, side, side, 3), np.nan, np.float32)
        kernel.crop(crops, layout, 41, 0.5, out)
        for (y, x), shift, result in zip(positions, shifts, out, strict=True):
            pixels = image[y : y + side, x : x + side][:, :: -1 if flip else 1]
            expected = (pixels + shift - with_mean * mean[4 : 4 + side, 2 : 2 + side]) * np.float32(0.5)
            if not np.array_equal(result.transpose(1, 2, 0) if layout == "NCHW" else result, expected):
                return False
    return True


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)

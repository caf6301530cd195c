"""Windows cut out of pictures in C (kernels.c); `native` is None where it could not be compiled (prep/compiled.py).

The CPU's streams are then finished by DALI's crop_mirror_normalize, which takes two to three times as long.
"""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep import compiled

SOURCE = Path(__file__).with_name("kernels.c")
CROP_DTYPE = np.dtype(  # kernels.c's struct window
    [("pixels", np.uint64), ("stride", np.int64), ("mean", np.uint64), ("shift", np.float32, 3), ("flip", np.int32)]
)


class NativeKernels:
    """The library's functions. Raises AttributeError where it lacks one."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._crop = {"NCHW": library.crop_nchw, "NHWC": library.crop_nhwc}
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        for function in self._crop.values():
            function.argtypes = [pointer, number, number, number, ctypes.c_float, pointer]
            function.restype = None

    def crop(
        self,
        windows: npt.NDArray[np.void],
        layout: str,
        mean_side: int,
        scale: float,
        out: npt.NDArray[np.float32],
    ) -> None:
        """Write (pixel + shift − mean) · scale of each window to `out`, (N, 3, side, side) or (N, side, side, 3).

        `windows` are N of dtype CROP_DTYPE, both arrays contiguous. Addresses are taken at their word: what they point to
        must be there. `mean_side` is the side of the square that `mean` points into.
        """
        side = out.shape[2]
        self._crop[layout](windows.ctypes.data, len(windows), side, mean_side, scale, out.ctypes.data)


def is_correct(kernel: NativeKernels) -> bool:
    """Whether it computes what it should for a few small windows."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (47, 53, 3), dtype=np.uint8)
    side, mean = 37, (255 * rng.random((41, 41, 3))).astype(np.float32)
    for layout, (flip, with_mean) in product(("NCHW", "NHWC"), product((0, 1), (0, 1))):
        laid = np.ascontiguousarray(mean.transpose(2, 0, 1) if layout == "NCHW" else mean)
        windows = np.zeros(2, CROP_DTYPE)
        places, shifts = ((3, 5), (10, 16)), rng.normal(0, 9, (2, 3)).astype(np.float32)
        windows["pixels"] = [picture[place].ctypes.data for place in places]
        windows["stride"], windows["shift"], windows["flip"] = 53 * 3, shifts, flip
        windows["mean"] = with_mean * (laid.ctypes.data + (4 * 41 + 2) * (4 if layout == "NCHW" else 12))
        out = np.full((2, 3, side, side) if layout == "NCHW" else (2, side, side, 3), np.nan, np.float32)
        kernel.crop(windows, layout, 41, 0.5, out)
        for (y, x), shift, found in zip(places, shifts, out, strict=True):
            window = picture[y : y + side, x : x + side][:, :: -1 if flip else 1]
            expected = (window + shift - with_mean * mean[4 : 4 + side, 2 : 2 + side]) * np.float32(0.5)
            if not np.array_equal(found.transpose(1, 2, 0) if layout == "NCHW" else found, expected):
                return False
    return True


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)

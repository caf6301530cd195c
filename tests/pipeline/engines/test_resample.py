"""Resizing in C (pipeline/engines/resample.h), with and without AVX2: comparison with Pillow, and no access after the
end of the pixels.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.engines import kernels
from prep import compiled
from tests.conftest import compile_changed

Pixels = npt.NDArray[np.uint8]


@pytest.fixture(scope="module", params=["avx2", "any CPU"])
def kernel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> kernels.NativeKernels:
    """A test that uses this fixture runs with the compiled kernel, and with the kernel compiled without AVX2."""
    if kernels.native is None:
        pytest.skip("no C compiler")
    if request.param == "avx2":
        return kernels.native
    changes = ("#ifdef __x86_64__\n#include <immintrin.h>", "#ifdef WITHOUT_AVX2")
    library = compile_changed(kernels.SOURCE, tmp_path_factory.mktemp("kernel"), *changes)
    loaded = compiled.load(library, kernels.NativeKernels, kernels.is_correct)
    assert loaded is not None
    return loaded


def windows(kernel: kernels.NativeKernels, image: Pixels, boxes: Sequence[Sequence[int]], out: Pixels) -> None:
    """Resize the boxes (row, column, height, width) of an image to `out` (N, side, side, 3)."""
    count = len(boxes)
    corner, extent = np.split(np.array(boxes, np.int32)[:, None], 2, axis=2)
    sizes, addresses = np.full((count, 2), image.shape[:2], np.int32), np.full(count, kernels.address(image), np.uint64)
    files = (addresses, np.full(count, image.nbytes))
    kernel.copy_squares(kernels.BatchJob.of_squares(None, *files, sizes, corner, out[:, None], extent))


@pytest.mark.parametrize("side", [33, 64])
def test_every_ratio_of_lengths_has_the_bits_of_pillow(kernel: kernels.NativeKernels, side: int) -> None:
    """The boxes are 1/16 to 9 times as long as the side, so a pixel has 2 to 18 weights.

    All pixels are black or white, so that an error in a single weight changes the result.
    """
    rng = np.random.default_rng(side)
    image = np.ascontiguousarray(rng.integers(0, 2, (9 * side, 9 * side, 3)) * 255, np.uint8)
    lengths = [side // 16, side // 2 + 1, side - 1, side, side + 1, 3 * side // 2, 2 * side + 1, 3 * side, 9 * side]
    boxes = [(9 * side - h, 9 * side - w, h, w) for h in lengths for w in lengths]
    out = np.zeros((len(boxes), side, side, 3), np.uint8)
    windows(kernel, image, boxes, out)
    for window, (y, x, height, width) in zip(out, boxes, strict=True):
        assert np.array_equal(window, kernels.resized(image[y : y + height, x : x + width], side)), (height, width)


@pytest.mark.parametrize("side", [40, 224])
def test_every_enlargement_has_the_bits_of_pillow(kernel: kernels.NativeKernels, side: int) -> None:
    """Pixels of all levels are blended with the weights of every length up to the side."""
    image = np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)
    boxes = [(side - length, length - 1, length, side + 1 - length) for length in range(1, side + 1)]
    out = np.zeros((len(boxes), side, side, 3), np.uint8)
    windows(kernel, image, boxes, out)
    for window, (y, x, height, width) in zip(out, boxes, strict=True):
        assert np.array_equal(window, kernels.resized(image[y : y + height, x : x + width], side)), (height, width)


def test_no_byte_after_the_pixels_is_read_or_written(kernel: kernels.NativeKernels) -> None:
    """The pixels and the windows end directly before a protected page of memory.

    An access to this page would end the child process with SIGSEGV.
    """
    page, height, width, protect = mmap.PAGESIZE, 11, 17, ctypes.CDLL(None).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    pages = np.frombuffer(mmap.mmap(-1, 20 * page), np.uint8)
    image = pages[page - 3 * height * width : page].reshape(height, width, 3)
    image[:] = np.random.default_rng(0).integers(0, 256, image.shape)
    boxes = [(0, 0, height, width), (height - 1, width - 1, 1, 1), (height - 5, 0, 5, width), (2, 9, 9, 8)]
    child = os.fork()
    if child == 0:
        failed = [protect(kernels.address(pages) + number * page, page, 0) for number in (1, 19)]
        for side in (1, 5, 9, 32):
            windows(kernel, image, boxes, pages[19 * page - 12 * side**2 : 19 * page].reshape(4, side, side, 3))
        os._exit(3 if any(failed) else 0)
    assert os.waitpid(child, 0)[1] == 0

"""Normalization in C (pipeline/engines/normalize.h): comparison with NumPy, with and without writes past the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.engines import kernels
from prep import compiled
from tests.conftest import compile_changed
from tests.pipeline.streaming import needs_kernel

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
needs_avx2 = pytest.mark.skipif("avx2" not in CPU.split(), reason="this CPU does not have AVX2")
needs_amd = pytest.mark.skipif("AuthenticAMD" not in CPU, reason="only CPUs of AMD write past the cache")
Floats = npt.NDArray[np.float32]


def normalized(layout: str, flip: int, image: npt.NDArray[np.uint8], mean: Floats | None, out: Floats) -> None:
    """Write a crop of the image, and the crop one pixel below and to the right of it, to `out`."""
    crops = np.zeros(2, kernels.CROP_DTYPE)
    crops["pixels"], crops["stride"] = [kernels.address(image[0]), kernels.address(image[1, 1:])], image.strides[0]
    crops["shift"], crops["flip"] = SHIFT, flip
    crops["mean"] = 0 if mean is None else kernels.address(mean)
    assert kernels.native
    kernels.native.crop(crops, layout, 230, SCALE, out)


SHIFT, SCALE = np.array([(1.7, -20.3, 0.1), (-0.6, 4.4, -31)], np.float32), np.array([0.5, 1 / 3, 1.7], np.float32)


@needs_kernel
@pytest.mark.parametrize("offset_floats", [0, 1, 8])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_images_of_any_side_and_address_equal_the_formula(layout: str, offset_floats: int) -> None:
    """Images whose side is a multiple of 8 px, at multiples of 32 bytes, are written past the cache on CPUs of AMD."""
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (230, 230, 3), np.uint8)
    mean = rng.normal(110, 40, (3, 230, 230) if layout == "NCHW" else (230, 230, 3)).astype(np.float32)
    means = mean.transpose(1, 2, 0) if layout == "NCHW" else mean
    for side in (1, 7, 8, 9, 15, 16, 24, 40, 57, 128, 224, 227):
        shape = (2, 3, side, side) if layout == "NCHW" else (2, side, side, 3)
        block = kernels.aligned_floats(np.full(6 * side**2 + 64, np.nan, np.float32))
        out = block[16 + offset_floats : 16 + offset_floats + 6 * side**2].reshape(shape)
        for flip, used_mean in ((0, None), (1, None), (0, mean), (1, mean)):
            normalized(layout, flip, image, used_mean, out)
            for k in range(2):
                pixels = image[k : k + side, k : k + side][:, :: -1 if flip else 1]
                subtracted = 0 if used_mean is None else means[:side, :side]
                expected = (pixels + SHIFT[k] - subtracted) * SCALE
                found = out[k].transpose(1, 2, 0) if layout == "NCHW" else out[k]
                assert np.array_equal(found, expected), (side, flip, k)
            out[:] = np.nan
        assert np.isnan(block).all()  # nothing is written outside of `out`


PAST_CACHE = (  # lines of normalize.h
    ("(PIXELS - 1 - value / 3) + channel", "(PIXELS - 1 - value / 3) + v"),
    ("source[k] - vector->start[half]", "source[k]"),
    ("->shift[i] = cur->shift[channel]", "->shift[i] = cur->shift[0]"),
    ("->scale[i] = scales[channel]", "->scale[i] = scales[0]"),
    ("_mm256_sub_ps(value, _mm256_loadu_ps(mean))", "value"),
    ("at = 3 * j + 8 * v", "at = 3 * j + 8"),
    ("(v * mean_side + i) * mean_side", "(v * side + i) * mean_side"),
    ("cur->flip ? -3 : 3", "3"),
)
BLENDING = (  # lines of resample_avx2.h
    ("(int16_t)(-smaller >> 6)", "(int16_t)(-smaller >> 7)"),
    ("second : first, *far_row", "first : first, *far_row"),
    ("_mm256_set1_epi16(INT16_MIN)", "_mm256_set1_epi16(0)"),
    ("first + 3 * weight.is_second", "first + 3"),
    ("j - 3 * i - table.first[j / 8]", "j + 3 - 3 * i - table.first[j / 8]"),
)


@needs_avx2
@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize(
    ("right", "wrong"), [*(pytest.param(*line, marks=needs_amd) for line in PAST_CACHE), *BLENDING]
)
def test_a_library_with_wrong_vectors_is_not_used(tmp_path: Path, right: str, wrong: str) -> None:
    library = compile_changed(kernels.SOURCE, tmp_path, right, wrong)
    assert compiled.load(library, kernels.NativeKernels, kernels.is_correct) is None

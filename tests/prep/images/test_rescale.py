"""prep.images.rescale is compared with float64 overlap matrices, block means, and Pillow's resize in floating point.

The reference of `area` is a dense matrix: entry (i, j) is the share of output pixel i that source pixel j covers. The
reference of the other filters is Pillow on each channel in mode "F", which neither rounds nor clips between the passes.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits

from prep.images.rescale import FILTERS, rescale, rescaled_size

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

PILLOW = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@pytest.fixture(autouse=True)
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS to one thread, as in a worker.

    On a busy machine, small matrix products are slower with more threads.
    """
    with threadpool_limits(1, "blas"):
        yield


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    """Return uniform noise. In the upper half, each value is 0 or 255, which is the hardest case for a filter."""
    pixels = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    upper = pixels[: height // 2]
    upper[:] = np.where(upper < 128, 0, 255)
    return pixels


def new_size(height: int, width: int, side: int) -> tuple[int, int]:
    """Return (height, width) after the shorter side is rescaled to `side`.

    The longer side is rounded to the nearest integer, with 0.5 rounded up.
    """
    scale, half = Fraction(side, min(height, width)), Fraction(1, 2)
    return math.floor(height * scale + half), math.floor(width * scale + half)


def central_square(whole: npt.NDArray[np.generic], side: int) -> npt.NDArray[np.generic]:
    """Return the central square with `side` px. If a margin is odd, the extra pixel is below or to the right."""
    top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
    return whole[top : top + side, left : left + side]


def overlap_matrix(n_in: int, n_out: int) -> Floats:
    """Return (n_out, n_in): entry (i, j) is the share of output pixel i that source pixel j covers."""
    scale = n_in / n_out
    i, j = np.arange(n_out)[:, None], np.arange(n_in)[None, :]
    covered = np.minimum((i + 1) * scale, j + 1) - np.maximum(i * scale, j)
    return np.clip(covered, 0, None) / scale


def area_average(pixels: Pixels, height: int, width: int) -> Floats:
    down, across = overlap_matrix(pixels.shape[0], height), overlap_matrix(pixels.shape[1], width)
    return np.stack([down @ pixels[..., c].astype(np.float64) @ across.T for c in range(3)], axis=2)


def pillow_resize(pixels: Pixels, height: int, width: int, name: str) -> Floats:
    planes = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    assert planes[0].mode == "F"
    return np.stack([np.asarray(p.resize((width, height), PILLOW[name]), np.float64) for p in planes], axis=2)


def expected_and_got(
    pixels: Pixels, side: int, keep_aspect: bool, name: str
) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    height, width = new_size(*pixels.shape[:2], side)
    reference = area_average(pixels, height, width) if name == "area" else pillow_resize(pixels, height, width, name)
    expected = np.clip(reference, 0, 255)
    return expected if keep_aspect else central_square(expected, side), rescale(pixels, side, keep_aspect, name)


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize(
    ("height", "width", "side"),
    [
        (375, 500, 256),
        (500, 333, 256),
        (301, 257, 256),
        (257, 257, 256),
        (97, 641, 61),
        (700, 997, 100),
        (640, 481, 37),
    ],
)
def test_area_is_the_area_average(height: int, width: int, side: int, keep_aspect: bool) -> None:
    expected, got = expected_and_got(noise(height, width), side, keep_aspect, "area")
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 0.6


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_area_is_the_block_mean_exactly_for_powers_of_two(factor: int) -> None:
    pixels = noise(32 * factor, 48 * factor)
    means = pixels.reshape(32, factor, 48, factor, 3).mean(axis=(1, 3), dtype=np.float64)
    assert np.array_equal(rescale(pixels, 32, True), np.rint(means))


@pytest.mark.parametrize("factor", [3, 5, 6, 7, 12])
def test_area_is_the_block_mean_for_integer_factors(factor: int) -> None:
    pixels = noise(48 * factor, 33 * factor)
    means = pixels.reshape(48, factor, 33, factor, 3).mean(axis=(1, 3), dtype=np.float64)
    assert np.abs(rescale(pixels, 33, True) - means).max() <= 0.6


def test_area_is_exact_for_noise_shrunk_by_62() -> None:
    expected, got = expected_and_got(noise(2000, 2000), 32, False, "area")
    assert np.abs(got - expected).max() <= 0.6


def test_area_counts_one_dark_column_in_130() -> None:
    """An image of 4160 px is reduced to 32 px.

    Each 130×130 block has one black column, so the mean of the block is 253.
    """
    pixels = np.full((4160, 4160, 3), 255, np.uint8)
    pixels[:, ::130] = 0
    got = rescale(pixels, 32).astype(np.float64)
    assert np.abs(got - 255 * 129 / 130).max() <= 0.6


@pytest.mark.parametrize("keep_aspect", [False, True])
@pytest.mark.parametrize("name", list(PILLOW))
@pytest.mark.parametrize(
    ("height", "width", "side"),
    [(375, 500, 256), (333, 500, 64), (640, 97, 96), (31, 47, 64), (61, 40, 101), (1, 3, 32), (700, 997, 50)],
)
def test_other_filters_match_pillow_in_floating_point(
    height: int, width: int, side: int, name: str, keep_aspect: bool
) -> None:
    expected, got = expected_and_got(noise(height, width), side, keep_aspect, name)
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 0.51


@pytest.mark.parametrize(("height", "width", "side"), [(31, 47, 64), (200, 100, 128), (50, 51, 52), (7, 300, 33)])
def test_area_enlarges_by_bicubic(height: int, width: int, side: int) -> None:
    pixels = noise(height, width)
    for keep_aspect in (False, True):
        result = rescale(pixels, side, keep_aspect, "area")
        assert np.array_equal(result, rescale(pixels, side, keep_aspect, "bicubic"))


@pytest.mark.parametrize("name", FILTERS)
def test_a_flat_image_stays_flat(name: str) -> None:
    rng = np.random.default_rng(5)
    colours = [(0, 1, 255), (254, 127, 128), *rng.integers(0, 256, (28, 3)).tolist()]
    for colour in colours:
        height, width, side = rng.integers(1, 400), rng.integers(1, 400), rng.integers(32, 150)
        keep_aspect = max(height, width) < 20 * min(height, width)
        pixels = np.empty((height, width, 3), np.uint8)
        pixels[:] = colour
        got = rescale(pixels, int(side), bool(keep_aspect), name)
        assert np.array_equal(got, np.broadcast_to(np.array(colour, np.uint8), got.shape)), (height, width, side)


@pytest.mark.parametrize("name", FILTERS)
@pytest.mark.parametrize(("height", "width"), [(1, 5000), (5000, 1), (1, 1), (3, 257)])
def test_extreme_shapes_take_little_memory(height: int, width: int, name: str) -> None:
    pixels = noise(height, width)
    tracemalloc.start()
    try:
        got = rescale(pixels, 256, False, name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert got.shape == (256, 256, 3)
    assert peak < 32e6


@pytest.mark.parametrize(("height", "width"), [(1, 300), (300, 1), (1, 1), (3, 257)])
def test_extreme_shapes_are_rescaled_whole(height: int, width: int) -> None:
    for name in FILTERS:
        assert rescale(noise(height, width), 32, True, name).shape == (*new_size(height, width, 32), 3)


def test_rescaled_size_rounds_halves_up() -> None:
    assert rescaled_size(3, 2, 33) == (50, 33)  # 49.5
    assert rescaled_size(2, 5, 33) == (33, 83)  # 82.5
    rng = np.random.default_rng(1)
    for width, height, side in rng.integers(1, 3000, (2000, 3)).tolist():
        expected_height, expected_width = new_size(height, width, side)
        assert rescaled_size(width, height, side) == (expected_width, expected_height)


@pytest.mark.parametrize("name", FILTERS)
def test_the_square_is_the_middle_of_the_whole_image(name: str) -> None:
    """The square has exactly the pixels of the middle of the complete rescaled image."""
    for height, width in ((375, 500), (500, 375), (130, 77), (91, 264)):
        pixels = noise(height, width)
        whole = rescale(pixels, 91, True, name)
        assert np.array_equal(rescale(pixels, 91, False, name), central_square(whole, 91))


@pytest.mark.parametrize("name", FILTERS)
def test_strides_do_not_matter(name: str) -> None:
    # The images are made smaller, made larger, or keep their size.
    for height, width in ((211, 307), (40, 60), (64, 80)):
        pixels = noise(height, width)
        turned = np.ascontiguousarray(pixels.transpose(1, 0, 2)).transpose(1, 0, 2)
        mirrored = np.ascontiguousarray(pixels[::-1, ::-1, ::-1])[::-1, ::-1, ::-1]
        within = np.zeros((2 * height, 3 * width, 4), np.uint8)[::2, ::3, 1:]
        within[:] = pixels
        expected = rescale(pixels, 64, True, name)
        for view in (turned, mirrored, within):
            assert not view.flags.c_contiguous
            assert np.array_equal(view, pixels)
            assert np.array_equal(rescale(view, 64, True, name), expected)


@pytest.mark.parametrize("name", FILTERS)
def test_an_image_of_the_right_size_is_unchanged(name: str) -> None:
    pixels = noise(64, 91)
    assert np.array_equal(rescale(pixels, 64, True, name), pixels)
    assert np.array_equal(rescale(pixels, 64, False, name), pixels[:, 13:77])


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'box'.*area, bilinear, bicubic, lanczos"):
        rescale(noise(10, 10), 32, False, "box")

"""prep.images.central_square: position and content of the central square for even and odd margins."""

from __future__ import annotations

import numpy as np
import pytest

from prep.images.central_square import central_offset, central_square


@pytest.mark.parametrize(
    ("length", "side_px", "offset"), [(256, 256, 0), (257, 256, 0), (258, 256, 1), (500, 256, 122)]
)
def test_an_odd_margin_is_smaller_above_and_left(length: int, side_px: int, offset: int) -> None:
    assert central_offset(length, side_px) == offset


def test_offsets_of_an_array_of_sizes() -> None:
    sizes = np.array([[256, 341], [300, 256]], np.int32)
    offsets = central_offset(sizes, 256)
    assert offsets.dtype == np.int32 and offsets.tolist() == [[0, 42], [22, 0]]


@pytest.mark.parametrize("size", [(8, 8), (8, 13), (12, 8), (9, 11)])
def test_the_square_is_a_view_with_equal_margins(size: tuple[int, int]) -> None:
    height, width = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    square = central_square(pixels, 8)
    assert square.shape == (8, 8, 3) and np.shares_memory(square, pixels)
    top, left = (height - 8) // 2, (width - 8) // 2
    assert np.array_equal(square, pixels[top : top + 8, left : left + 8])

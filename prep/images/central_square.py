"""Position of the central square in an image: the crop that the paper (section 2) makes after rescaling.

If the margin around the square is odd, the top and left sides get the smaller half. Builds, colour statistics, streams
and inference on single images all use this position.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import numpy.typing as npt

Length = TypeVar("Length", int, npt.NDArray[np.int32])
Number = TypeVar("Number", bound=np.generic)


def central_offset(length: Length, side_px: int) -> Length:
    """Return the index of the first row (column) of the central square in an image of `length` rows (columns).

    The square has `side_px` rows and columns.
    """
    return (length - side_px) // 2


def central_square(pixels: npt.NDArray[Number], side_px: int) -> npt.NDArray[Number]:
    """Return a view (side_px, side_px, ...) of the central square of `pixels` (H, W, ...).

    H and W are at least `side_px`.
    """
    height, width = pixels.shape[:2]
    top, left = central_offset(height, side_px), central_offset(width, side_px)
    return pixels[top : top + side_px, left : left + side_px]

"""Evaluation preprocessing of single images in NumPy: load a photograph or a record, crop it, subtract the mean.

The results equal the images of an EvalLoader on a CPU, bit for bit. Photographs are rescaled like the images of a
store. If the store has JPEG records, photographs are also encoded as JPEG and decoded again. Cropping and normalization
follow the formula of pipeline.augment. EvalTransform needs only the settings and the mean of a store.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from pipeline.augment import CROP_PX, eval_offsets
from pipeline.records import Records
from prep.console import UserError
from prep.images.central_square import central_offset, central_square
from prep.images.codec import BadImage
from prep.images.limits import MAX_PIXELS
from prep.images.photograph import Photograph, prepare_photograph, prepare_photographs
from prep.store.manifest import Settings, Store

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


def read_photograph(path: Path, settings: Settings) -> Photograph:
    """Prepare an image file in the same way as `alexprep build-lmdb` with `settings`.

    Raises UserError, with the path in the message, if the file cannot be read, is too large, or is not an image.
    """
    try:
        return prepare_photograph(path, settings)
    except BadImage as error:
        raise bad_photograph(path, error) from None


def read_photographs(
    paths: Sequence[Path], settings: Settings, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Path, Photograph | UserError]]:
    """Prepare image files like read_photograph, but in a separate process.

    Yields (path, photograph) for each file, or (path, error) for a bad file. A bad file does not end the loop, even if
    the decoder crashes or hangs at this file.
    """
    for path, photograph in prepare_photographs(paths, settings, max_pixels):
        yield path, bad_photograph(path, photograph) if isinstance(photograph, BadImage) else photograph


def bad_photograph(path: Path, reason: BadImage) -> UserError:
    """Return the error for a photograph that cannot be used."""
    return UserError(f"{path}: {reason}. Choose an image file that can be read, for example a JPEG or PNG file.")


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation preprocessing of a network: the settings of the network's training store, and the mean to subtract."""

    settings: Settings
    mean: str  # one of pipeline.augment.MEANS
    mean_rgb: tuple[float, ...]  # (3,), in grey levels; used if `mean` is "channel"
    mean_image: npt.NDArray[np.float32] | None = None  # (side_px, side_px, 3); used if `mean` is "image" or "aligned"
    divisor: float = 1.0  # pipeline.augment.Augmentation.divisor_in_evaluation

    def crops(self, square: Pixels, views: int = 1) -> npt.NDArray[np.float32]:
        """Return the views of an image, float32 (views, 3, 224, 224).

        The views are the centre crop, or the ten views in the order that pipeline.augment defines. `square` is the
        central square of an image, (side_px, side_px, 3). `views` is 1 or 10.
        """
        offsets, flips = eval_offsets(views, len(square) - CROP_PX)
        positions = zip(offsets.tolist(), flips.tolist(), strict=True)
        return np.stack([self._crop(square, y, x, flip) for (y, x), flip in positions])

    def _crop(self, square: Pixels, y: int, x: int, flip: int) -> npt.NDArray[np.float32]:
        """Return the crop at row y and column x, float32 (3, 224, 224).

        The crop is mirrored if `flip` is 1. The mean is subtracted, and the result is divided by `divisor`.
        """
        crop = _crop_at(square, y, x).astype(np.float32)
        if self.mean == "aligned":
            crop -= _crop_at(self._mean_image, y, x)
        if flip:
            crop = crop[:, ::-1]
        if self.mean == "channel":
            crop = crop - np.array(self.mean_rgb, np.float32)
        elif self.mean == "image":
            middle = central_offset(len(square), CROP_PX)
            crop = crop - _crop_at(self._mean_image, middle, middle)
        if self.divisor != 1:
            crop = crop * np.float32(1 / self.divisor)  # kernels.c multiplies by the same number
        return np.ascontiguousarray(crop.transpose(2, 0, 1))

    @property
    def _mean_image(self) -> npt.NDArray[np.float32]:
        assert self.mean_image is not None
        return self.mean_image


def _crop_at(square: npt.NDArray[Any], y: int, x: int) -> npt.NDArray[Any]:
    return square[y : y + CROP_PX, x : x + CROP_PX]


class StoredImages:
    """Decoded images of a split, accessed by record number."""

    def __init__(self, store: Store, split: str) -> None:
        """Raises StoreError if the store has no such split."""
        self.records, self._side_px = Records(store, split), store.settings.side_px

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Pixels:
        """Return the central square of a record, uint8 (side_px, side_px, 3).

        Raises StoreError for a damaged record.
        """
        square: Pixels = central_square(self.records.pixels(number), self._side_px)
        return square.copy()

    def label(self, number: int) -> int:
        """Return the class index of a record."""
        return self.records.label(number)

    def close(self) -> None:
        """Unmap the files. Images that were read before stay valid."""
        self.records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

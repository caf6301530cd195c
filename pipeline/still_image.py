"""Evaluation preprocessing of single images in NumPy: load a photograph or a record, crop it, subtract the mean.

The results equal the images of an EvalLoader on a CPU, bit for bit. Photographs are rescaled like the images of a
store; if the store has JPEG records, photographs are also encoded and decoded. The formula of pipeline.augment then
gives the result. EvalTransform needs only the settings and the mean of a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from pipeline.augment import CROP_PX, eval_offsets
from pipeline.records import Records
from prep.console import UserError
from prep.images.central_square import central_offset, central_square
from prep.images.codec import MAX_FILE_BYTES, BadImage, check_rescaled_size, decode_image, encode_image
from prep.images.jpeg import decode_jpeg
from prep.images.rescale import rescale
from prep.store.manifest import Settings, Store, StoreError

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


class Photograph(NamedTuple):
    """A photograph, prepared like a record of a store."""

    square: Pixels  # (side_px, side_px, 3): rescaled central square; for JPEG stores also encoded and decoded
    orientation: int  # EXIF orientation, 1 if the file has none; not applied, as in alexprep


def read_photograph(path: Path, settings: Settings) -> Photograph:
    """Prepare an image file in the same way as `alexprep build-lmdb` with these settings.

    Raises UserError with the path if the file cannot be read, is too large, or is not an image.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{path}: {size:,} bytes, expected at most {MAX_FILE_BYTES:,}. Choose a smaller file.")
        image = decode_image(path.read_bytes())
        check_rescaled_size(image.pixels, settings.side_px, settings.keep_aspect)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. Choose an image file that can be read.") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}. Choose a JPEG, PNG, GIF, BMP, WebP, TIFF or PNM file.") from None
    pixels = rescale(image.pixels, settings.side_px, settings.keep_aspect, settings.filter)
    if settings.format == "jpeg":
        pixels = decode_jpeg(encode_image(pixels, "jpeg", settings.quality))
    return Photograph(central_square(pixels, settings.side_px), image.orientation)


@dataclass(frozen=True)
class EvalTransform:
    """Evaluation preprocessing of a network: settings of its training store, and the mean to subtract."""

    settings: Settings
    mean: str  # one of pipeline.augment.MEANS
    mean_rgb: tuple[float, ...]  # (3,), grey levels; used if `mean` is "channel"
    mean_image: npt.NDArray[np.float32] | None = None  # (side_px, side_px, 3); used if `mean` is "image" or "aligned"
    divisor: float = 1.0  # pipeline.augment.Augmentation.divisor_in_evaluation

    def crops(self, square: Pixels, views: int = 1) -> npt.NDArray[np.float32]:
        """float32 (views, 3, 224, 224): the centre crop, or the ten views. pipeline.augment defines their order.

        `square` is (side_px, side_px, 3), the central square of an image; `views` is 1 or 10.
        """
        offsets, flips = eval_offsets(views, len(square) - CROP_PX)
        positions = zip(offsets.tolist(), flips.tolist(), strict=True)
        return np.stack([self._crop(square, y, x, flip) for (y, x), flip in positions])

    def _crop(self, square: Pixels, y: int, x: int, flip: int) -> npt.NDArray[np.float32]:
        """float32 (3, 224, 224): the crop at row y and column x, mirrored if `flip`, minus the mean, divided."""
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
            crop = crop * np.float32(1 / self.divisor)  # as kernels.c
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
        """The central square of a record, uint8 (side_px, side_px, 3); raises StoreError if the record is damaged."""
        pixels = self.records[number].payload
        if pixels.ndim == 1:
            try:
                pixels = decode_jpeg(pixels.tobytes())
            except ValueError as error:
                location = self.records.location(number)
                raise StoreError(f"{location}: cannot be decoded: {error}. {self.records.advice}") from None
        return central_square(pixels, self._side_px).copy()

    def label(self, number: int) -> int:
        """The class index of a record."""
        return self.records[number].label

    def close(self) -> None:
        """Unmap the files. Images already read stay valid."""
        self.records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Single pictures outside of the stream: a photograph as a store would hold it, a record's pixels, and their windows.

What is made of them is to the bit what an EvalLoader on a CPU serves: the same rescaling, encoding and decoding, then
the formula of pipeline.augment, here in NumPy. It needs of a store no more than its settings and its mean.
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
from prep.images.central_square import central_square
from prep.images.codec import MAX_FILE_BYTES, BadImage, check_rescaled_size, decode_image, encode_image
from prep.images.jpeg import decode_jpeg
from prep.images.rescale import rescale
from prep.store.manifest import Settings, Store, StoreError

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


class Photograph(NamedTuple):
    """A photograph as a record would hold it."""

    square: Pixels  # (side_px, side_px, 3): its central square, rescaled, encoded and decoded again
    orientation: int  # EXIF orientation, 1 where there is none; not applied, as in no store


def read_photograph(path: Path, settings: Settings) -> Photograph:
    """Prepare a file as `alexprep build-lmdb` would for a store of these settings.

    Raises UserError naming the file where it cannot be read or is no picture.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"{path}: larger than {MAX_FILE_BYTES:,} bytes. Name a photograph.")
        picture = decode_image(path.read_bytes())
        check_rescaled_size(picture.pixels, settings.side_px, settings.keep_aspect)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}. Name a photograph.") from None
    except BadImage as error:
        raise UserError(f"{path}: {error}. Name a JPEG, PNG, GIF, BMP, WebP, TIFF or PNM file.") from None
    pixels = rescale(picture.pixels, settings.side_px, settings.keep_aspect, settings.filter)
    if settings.format == "jpeg":
        pixels = decode_jpeg(encode_image(pixels, "jpeg", settings.quality))
    return Photograph(central_square(pixels, settings.side_px), picture.orientation)


@dataclass(frozen=True)
class EvalTransform:
    """How a network is shown still pictures: the settings of its training store, and the mean to subtract."""

    settings: Settings
    mean: str  # one of pipeline.augment.MEANS
    mean_rgb: tuple[float, ...]  # (3,), grey levels; of the mean "channel"
    mean_image: npt.NDArray[np.float32] | None = None  # (side_px, side_px, 3); of the means "image" and "aligned"

    def crops(self, square: Pixels, views: int = 1) -> npt.NDArray[np.float32]:
        """float32 (views, 3, 224, 224): the centre window, or the ten views in the order of pipeline.augment."""
        offsets, flips = eval_offsets(views, len(square) - CROP_PX)
        places = zip(offsets.tolist(), flips.tolist(), strict=True)
        return np.stack([self._window(square, y, x, flip) for (y, x), flip in places])

    def _window(self, square: Pixels, y: int, x: int, flip: int) -> npt.NDArray[np.float32]:
        window = _part(square, y, x).astype(np.float32)
        if self.mean == "aligned":
            window -= _part(self._mean_image, y, x)
        if flip:
            window = window[:, ::-1]
        if self.mean == "channel":
            window = window - np.array(self.mean_rgb, np.float32)
        elif self.mean == "image":
            middle = (len(square) - CROP_PX) // 2
            window = window - _part(self._mean_image, middle, middle)
        return np.ascontiguousarray(window.transpose(2, 0, 1))

    @property
    def _mean_image(self) -> npt.NDArray[np.float32]:
        assert self.mean_image is not None
        return self.mean_image


def _part(square: npt.NDArray[Any], y: int, x: int) -> npt.NDArray[Any]:
    return square[y : y + CROP_PX, x : x + CROP_PX]


class StoredImages:
    """The records of a split by number, as pixels."""

    def __init__(self, store: Store, split: str) -> None:
        """Raises StoreError for a split that is not there."""
        self.records, self._side_px = Records(store, split), store.settings.side_px

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Pixels:
        """The central square of a record, uint8 (side_px, side_px, 3); raises StoreError where it is damaged."""
        picture = self.records[number].payload
        if picture.ndim == 1:
            try:
                picture = decode_jpeg(picture.tobytes())
            except ValueError as error:
                where = self.records.location(number)
                raise StoreError(f"{where}: cannot be decoded: {error}. {self.records.advice}") from None
        return central_square(picture, self._side_px).copy()

    def label(self, number: int) -> int:
        """The class of a record."""
        return self.records[number].label

    def close(self) -> None:
        """Unmap the files; pictures that were given stay."""
        self.records.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Colour statistics: exact sums over pixels, and from them the mean and the principal components of RGB.

Sums of 8-bit pixels and of their products are integers and are kept as integers. The sums are therefore the same for
any number of workers, any order of the images and any machine. To get the sums of a union of two sets of images, add
the sums of both sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.console import Progress
from prep.images import kernels
from prep.images.central_square import central_square
from prep.images.codec import BadImage, decode_image
from prep.store import lmdb_shard
from prep.store.agreement import mean_and_covariance
from prep.store.datum import Datum, DatumError
from prep.store.manifest import ColorStats, Store, StoreError
from prep.store.models import MomentsJson
from prep.workers import Runner, TaskProgress, WorkerDied

PIXEL_SCALE = 255
# Number of products that float32 sums exactly: 256 · 255² is less than 2^24, the limit for exact integers.
_EXACT_ROWS = 256
_MAX_PENDING = 257  # number of 8-bit images that uint16 sums without overflow: 257 · 255 is less than 2^16


@dataclass(frozen=True)
class Moments:
    """Pixel count and sums over pixels, as Python integers, which cannot overflow. Two Moments can be added with +."""

    pixels: int = 0
    total: tuple[int, ...] = (0, 0, 0)  # sum of the RGB vectors of all pixels
    outer: tuple[tuple[int, ...], ...] = ((0, 0, 0), (0, 0, 0), (0, 0, 0))  # sum of RGB·RGBᵀ over all pixels

    @staticmethod
    def of(image: npt.NDArray[np.uint8]) -> Moments:
        """Return the moments of one image, uint8 (H, W, 3), with at most 2^37 pixels."""
        sums = PixelSums(0)
        sums.add(image)
        return sums.moments

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.pixels + other.pixels,
            tuple(a + b for a, b in zip(self.total, other.total, strict=True)),
            tuple(
                tuple(a + b for a, b in zip(row, other_row, strict=True))
                for row, other_row in zip(self.outer, other.outer, strict=True)
            ),
        )

    def to_json(self) -> MomentsJson:
        """Return the moments as a JSON object of integers."""
        return {"pixels": self.pixels, "total": list(self.total), "outer": [list(row) for row in self.outer]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Moments:
        """Return the moments that to_json has written as a JSON object."""
        return Moments(int(data["pixels"]), tuple(data["total"]), tuple(tuple(row) for row in data["outer"]))


class PixelSums:
    """Running sums over images: the moments of all pixels, and the sum of the central squares."""

    def __init__(self, side_px: int) -> None:
        self.side_px = side_px
        self._pixels = 0
        self._sums = np.zeros(9, np.int64)  # sums of R, G, B, RR, RG, RB, GG, GB, BB
        # Sum of the central squares, at most _MAX_PENDING, that have not yet been added to `_squares`.
        self._pending_squares = np.zeros((side_px, side_px, 3), np.uint16)
        self._squares = np.zeros((side_px, side_px, 3), np.int64)
        self._pending = 0

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """Add one image, uint8 (H, W, 3), with at most 2^37 pixels. H and W must be at least `side_px`."""
        height, width = image.shape[:2]
        square = central_square(image, self.side_px)
        if kernels.native:
            kernels.native.add_moments(image, self._sums)
            kernels.native.add_square(square, self._pending_squares)
        else:
            _add_moments(image, self._sums)
            self._pending_squares += square
        self._pixels += height * width
        self._pending += 1
        if self._pending == _MAX_PENDING:
            self.square_sum()

    @property
    def moments(self) -> Moments:
        """Moments of all pixels that were added so far. The moments are exact for fewer than 2^47 pixels."""
        r, g, b, rr, rg, rb, gg, gb, bb = self._sums.tolist()
        return Moments(self._pixels, (r, g, b), ((rr, rg, rb), (rg, gg, gb), (rb, gb, bb)))

    def square_sum(self) -> npt.NDArray[np.int64]:
        """Return the sum of all central squares added so far, int64 (side_px, side_px, 3)."""
        self._squares += self._pending_squares
        self._pending_squares[:] = 0
        self._pending = 0
        return self._squares


def _add_moments(image: npt.NDArray[np.uint8], sums: npt.NDArray[np.int64]) -> None:
    """Add the sums over `image` to `sums` with NumPy. The result equals the result of add_moments in kernels.c.

    A sum of 256 products of 8-bit numbers is less than 2^24. The sum over 256 rows is therefore exact in float32, the
    fastest type. The sums over blocks of 256 rows are added in float64, which is exact up to 2^53. In each row, the
    three channels stay interleaved. The elementwise product of a row and the same row shifted by one element contains
    R·G and G·B. If the row is shifted by two elements, the product contains R·B.
    """
    height, width = image.shape[:2]
    rows = image.reshape(height, 3 * width)
    column_sums = np.zeros((4, 3 * width))  # sums of x[k], x[k]², x[k]·x[k + 1] and x[k]·x[k + 2] over rows x
    for start in range(0, height, _EXACT_ROWS):
        block = rows[start : start + _EXACT_ROWS].astype(np.float32)
        column_sums[0] += np.ones(len(block), np.float32) @ block
        for shift in range(3):
            end = 3 * width - shift
            column_sums[1 + shift, :end] += np.einsum("ij,ij->j", block[:, :end], block[:, shift:])
    total, (rr, gg, bb), (rg, gb, _), (rb, _, _) = column_sums.reshape(4, width, 3).sum(axis=1).astype(np.int64)
    sums += (*total, rr, rg, rb, gg, gb, bb)


def compute_color_stats(records: int, moments: Moments) -> ColorStats:
    """Return mean, covariance (divisor pixels − 1, like numpy.cov) and principal components of RGB in 0..255.

    Eigenvalues are in descending order. The first nonzero component of each eigenvector, normally red, is positive. In
    natural images the red components of all three eigenvectors are far from zero, so different sets of natural images
    give the same signs. Each covariance is an exact quotient of integers, rounded once to float64. Raises StoreError
    for fewer than two pixels.
    """
    n = moments.pixels
    if n < 2:
        raise StoreError(f"colour statistics need at least two pixels, the store has {n}")
    mean, covariance = mean_and_covariance(n, moments.total, moments.outer)
    values, vectors = np.linalg.eigh(np.array(covariance))
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1].copy()
    for column in vectors.T:
        column *= np.sign(column[np.flatnonzero(np.abs(column) > 1e-12)[0]])
    return ColorStats(
        records=records,
        pixels=n,
        mean_rgb=tuple(mean),
        covariance=tuple(map(tuple, covariance)),
        eigenvalues=tuple(values.tolist()),
        stdevs=tuple(np.sqrt(values).tolist()),
        eigenvectors=tuple(tuple(row) for row in vectors.tolist()),
        pixel_scale=PIXEL_SCALE,
    )


def recompute_color_stats(store: Store, split: str, runner: Runner, progress: Progress) -> ColorStats:
    """Compute the colour statistics again from the records of a split. `runner` runs one task for each shard.

    For a ppm store the result equals the statistics of the build, bit for bit. For a jpeg store the last digits differ,
    because the build sums the pixels before compression. Raises StoreError for a damaged record. The message names the
    shard and the key of the record.
    """
    moments, records = Moments(), 0
    paths = store.shard_paths(split)
    for path, result in runner.map(_shard_moments, paths, lambda counts: progress.update(counts.done)):
        if isinstance(result, WorkerDied):
            raise StoreError(
                f"{path}: the process that read this shard {result.describe()}. Check the store with: alexprep verify"
            )
        moments, records = moments + result[0], records + result[1]
    return compute_color_stats(records, moments)


def _shard_moments(path: str, task_progress: TaskProgress) -> tuple[Moments, int]:
    moments, records = Moments(), 0
    for key, value in lmdb_shard.read(Path(path)):
        try:
            moments += Moments.of(decode_image(Datum.decode(value).data).pixels)
        except (DatumError, BadImage) as error:
            raise StoreError(
                f"{path}, key {key.decode(errors='replace')}: {error}. Check the store with: alexprep verify"
            ) from None
        records += 1
        task_progress.count()
    return moments, records

"""Exact colour moments, and the principal components of RGB that come from them.

Sums of 8-bit pixels and of their products are integers, so they are gathered as integers: the answer is the same bits
for any number of workers, any order and any machine, and the moments of two sets of pictures simply add up.
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
from prep.store.datum import Datum, DatumError
from prep.store.manifest import ColorStats, Store, StoreError
from prep.workers import Runner, TaskProgress, WorkerDied

PIXEL_SCALE = 255
_EXACT_LINES = 256  # 256 · 255² < 2^24, the mantissa of float32
_MOST_PENDING = 257  # pictures whose 8-bit numbers add up to less than 2^16


@dataclass(frozen=True)
class Moments:
    """Pixel count, sum of RGB, sum of RGB·RGBᵀ: Python integers, which do not overflow."""

    pixels: int = 0
    total: tuple[int, ...] = (0, 0, 0)
    outer: tuple[tuple[int, ...], ...] = ((0, 0, 0), (0, 0, 0), (0, 0, 0))

    @staticmethod
    def of(picture: npt.NDArray[np.uint8]) -> Moments:
        """Moments of one uint8 (H, W, 3) picture of at most 2^37 pixels."""
        sums = PixelSums(0)
        sums.add(picture)
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

    def to_json(self) -> dict[str, Any]:
        """As plain integers."""
        return {"pixels": self.pixels, "total": list(self.total), "outer": [list(row) for row in self.outer]}

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Moments:
        """The inverse of to_json."""
        return Moments(int(data["pixels"]), tuple(data["total"]), tuple(tuple(row) for row in data["outer"]))


class PixelSums:
    """Adds up pictures: the moments of all their pixels, and the sum of their central squares of `side_px`."""

    def __init__(self, side_px: int) -> None:
        self.side_px = side_px
        self._pixels = 0
        self._sums = np.zeros(9, np.int64)  # R, G, B, RR, RG, RB, GG, GB, BB
        self._square = np.zeros((side_px, side_px, 3), np.uint16)  # of at most _MOST_PENDING pictures
        self._squares = np.zeros((side_px, side_px, 3), np.int64)
        self._pending = 0

    def add(self, picture: npt.NDArray[np.uint8]) -> None:
        """One uint8 (H, W, 3) picture of at most 2^37 pixels; where there are squares, no side below `side_px`."""
        height, width = picture.shape[:2]
        square = central_square(picture, self.side_px)
        if kernels.native:
            kernels.native.add_moments(picture, self._sums)
            kernels.native.add_square(square, self._square)
        else:
            _add_moments(picture, self._sums)
            self._square += square
        self._pixels += height * width
        self._pending += 1
        if self._pending == _MOST_PENDING:
            self.square_sum()

    @property
    def moments(self) -> Moments:
        """Of all pixels so far: fewer than 2^47 of them."""
        r, g, b, rr, rg, rb, gg, gb, bb = self._sums.tolist()
        return Moments(self._pixels, (r, g, b), ((rr, rg, rb), (rg, gg, gb), (rb, gb, bb)))

    def square_sum(self) -> npt.NDArray[np.int64]:
        """int64 (side_px, side_px, 3): the sum of all central squares so far."""
        self._squares += self._square
        self._square[:] = 0
        self._pending = 0
        return self._squares


def _add_moments(picture: npt.NDArray[np.uint8], sums: npt.NDArray[np.int64]) -> None:
    """What kernels.c's add_moments does.

    Columns of 256 products of 8-bit numbers add up to less than 2^24, so float32, the fastest, is exact; what they
    give is added in float64, exact up to 2^53. RGB stays interleaved: a line times itself shifted by one number holds
    R·G and G·B, shifted by two R·B.
    """
    height, width = picture.shape[:2]
    lines = picture.reshape(height, 3 * width)
    found = np.zeros((4, 3 * width))  # of x, x², x·next, x·next but one
    for start in range(0, height, _EXACT_LINES):
        block = lines[start : start + _EXACT_LINES].astype(np.float32)
        found[0] += np.ones(len(block), np.float32) @ block
        for shift in range(3):
            end = 3 * width - shift
            found[1 + shift, :end] += np.einsum("ij,ij->j", block[:, :end], block[:, shift:])
    total, (rr, gg, bb), (rg, gb, _), (rb, _, _) = found.reshape(4, width, 3).sum(axis=1).astype(np.int64)
    sums += (*total, rr, rg, rb, gg, gb, bb)


def compute_color_stats(records: int, moments: Moments) -> ColorStats:
    """Mean, covariance (divisor pixels − 1, as numpy.cov's) and principal components of RGB, on the scale 0..255.

    Eigenvalues descend. Of the two signs of each eigenvector the one with a positive red component is given (where red
    is zero, the first component that is not): natural pictures have a red component well away from zero in all three,
    so the sign does not flip from one data set to the next. The covariance is formed in integers, then divided once.
    Raises StoreError for fewer than two pixels.
    """
    n = moments.pixels
    if n < 2:
        raise StoreError(f"colour statistics need two pixels at the least, the store has {n}")
    covariance = np.array(
        [
            [(n * moments.outer[i][j] - moments.total[i] * moments.total[j]) / (n * (n - 1)) for j in range(3)]
            for i in range(3)
        ]
    )
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1].copy()
    for column in vectors.T:
        column *= np.sign(column[np.flatnonzero(np.abs(column) > 1e-12)[0]])
    return ColorStats(
        records=records,
        pixels=n,
        mean_rgb=tuple(total / n for total in moments.total),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        eigenvalues=tuple(values.tolist()),
        stdevs=tuple(np.sqrt(values).tolist()),
        eigenvectors=tuple(tuple(row) for row in vectors.tolist()),
        pixel_scale=PIXEL_SCALE,
    )


def recompute_color_stats(store: Store, split: str, runner: Runner, report: Progress) -> ColorStats:
    """Statistics of the stored pictures themselves, decoded again by all workers.

    For ppm the same to the bit as the build's; for jpeg the pixels after compression, so the last digits differ.
    Raises StoreError naming shard, key and source of a record that is damaged.
    """
    moments, records = Moments(), 0
    paths = store.shard_paths(split)
    for path, result in runner.map(_shard_moments, paths, lambda counts: report.update(counts.done)):
        if isinstance(result, WorkerDied):
            raise StoreError(f"{path}: the process that read it {result.describe()}. Check the store with: alexprep verify")
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

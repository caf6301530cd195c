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

from prep import shard
from prep.console import Progress
from prep.datum import Datum, DatumError
from prep.manifest import ColourStats, Store, StoreError
from prep.picture import BadPicture, read_picture

PIXEL_SCALE = 255


@dataclass(frozen=True)
class Moments:
    """Pixel count, sum of RGB, sum of RGB·RGBᵀ: Python integers, which do not overflow."""

    pixels: int = 0
    total: tuple[int, ...] = (0, 0, 0)
    outer: tuple[tuple[int, ...], ...] = ((0, 0, 0), (0, 0, 0), (0, 0, 0))

    @staticmethod
    def of(picture: npt.NDArray[np.uint8]) -> Moments:
        """Moments of one uint8 (H, W, 3) picture of at most 2^37 pixels.

        A float64 sum of products stays below 2^53 and so is exact; planes let BLAS do the sums.
        """
        planes = np.empty((3, picture.shape[0] * picture.shape[1]), np.float64)
        for channel in range(3):
            planes[channel] = picture[..., channel].ravel()
        outer = [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
        for i in range(3):
            for j in range(i, 3):
                outer[i][j] = outer[j][i] = int(planes[i] @ planes[j])
        total = tuple(int(plane.sum()) for plane in planes)
        return Moments(planes.shape[1], total, tuple(tuple(row) for row in outer))

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


def colour_stats(records: int, moments: Moments) -> ColourStats:
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
    return ColourStats(
        records=records,
        pixels=n,
        mean_rgb=tuple(total / n for total in moments.total),
        covariance=tuple(tuple(row) for row in covariance.tolist()),
        eigenvalues=tuple(values.tolist()),
        stdevs=tuple(np.sqrt(values).tolist()),
        eigenvectors=tuple(tuple(row) for row in vectors.tolist()),
        pixel_scale=PIXEL_SCALE,
    )


def moments_of_records(store: Store, split: str, report: Progress) -> ColourStats:
    """Statistics of the stored pictures themselves, decoded again.

    For ppm the same to the bit as the build's; for jpeg the pixels after compression, so the last digits differ.
    Raises StoreError naming shard, key and source of a record that is damaged.
    """
    moments, records = Moments(), 0
    for path in store.shard_paths(split):
        for key, value in shard.read(Path(path)):
            try:
                moments += Moments.of(read_picture(Datum.decode(value).data).pixels)
            except (DatumError, BadPicture) as error:
                raise StoreError(
                    f"{path}, key {key.decode(errors='replace')}: {error}. Build the store again."
                ) from None
            records += 1
            report.advance()
    return colour_stats(records, moments)

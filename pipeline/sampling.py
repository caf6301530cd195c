"""Which records a batch holds, and what chance decides for each: pure functions of seed, epoch and step.

Nothing here remembers anything. A stream that stands at (epoch, step) therefore continues anywhere with those two
numbers, and `world_size` loaders of batch B serve together what one loader of batch world_size · B would: rank r has
places r·B to (r + 1)·B of each step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

BLOCK_RECORDS = 64  # records in a row that stay together on their way to a window: 2 MB of JPEG to read at a time
WINDOW_RECORDS = (
    16_384  # records that are mixed with one another: half a gigabyte of JPEG, which the page cache should hold
)
_ORDER, _DRAWS = 0, 1  # what a random generator is for

Integers = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """What chance decided for each image."""

    offset: npt.NDArray[np.int32]  # (N, 2): y, x of the window in the central square, 0..room inclusive
    flip: npt.NDArray[np.int32]  # (N,): 0 or 1
    normal: npt.NDArray[np.float64]  # (N, 3): z of the colour noise, for the three principal components

    def select(self, images: slice) -> Draws:
        """Those of some of the images."""
        return Draws(self.offset[images], self.flip[images], self.normal[images])


def epoch_permutation(records: int, seed: int, epoch: int) -> Integers:
    """int64 (records,): a permutation, in which neighbors of the store come in blocks and blocks are mixed.

    Blocks of BLOCK_RECORDS records are put in random order, then records within each WINDOW_RECORDS of that. The store's own order is
    a random permutation (alexprep build-lmdb), so that classes are as mixed as if records were drawn one by one, while
    a disk reads megabytes in a row.
    """
    rng = _generator(_ORDER, seed, epoch)
    starts = rng.permutation(np.arange(0, records, BLOCK_RECORDS))
    order = (starts[:, None] + np.arange(BLOCK_RECORDS)).ravel()
    order = order[order < records]
    for first in range(0, records, WINDOW_RECORDS):
        rng.shuffle(order[first : first + WINDOW_RECORDS])
    return order


def draw_params(seed: int, epoch: int, step: int, images: int, max_offset_px: int, shared_by: int = 1) -> Draws:
    """The draws for all `images` of a step, those of every rank.

    Windows are uniform over 0..max_offset_px in each direction, flips have probability one half; both are one for each
    `shared_by` images in a row, as the authors' code has it for 32 (convdata_jpeg.py, crop_chunk).
    """
    rng = _generator(_DRAWS, seed, epoch, step)
    leaders = -(-images // shared_by)
    offset = rng.integers(0, max_offset_px, (leaders, 2), np.int32, endpoint=True)
    flip = rng.integers(0, 1, leaders, np.int32, endpoint=True)
    normal = rng.standard_normal((images, 3))
    whose = np.arange(images) // shared_by
    return Draws(offset[whose], flip[whose], normal)


def _generator(purpose: int, seed: int, epoch: int, step: int = 0) -> np.random.Generator:
    words = np.array([seed, epoch, step], np.uint64).view(np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([purpose, *words.tolist()])))

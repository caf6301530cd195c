"""Epoch permutation and random augmentation parameters, as pure functions of seed, epoch and step.

The functions keep no state, so a stream can resume from its position: the epoch, and the step within the epoch, both
counted from 0. Together, `world_size` loaders with batch size B serve the same records as one loader with batch size
world_size · B. Rank r serves records r·B to (r + 1)·B − 1 of each step.
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Number of consecutive records that are moved as one block: 1.5 MB of JPEG, which a disk reads in sequence.
BLOCK_RECORDS = 64
WINDOW_RECORDS = 16_384  # number of records in a shuffle window: 0.5 GB of JPEG, which should fit in the page cache
_PERMUTATION, _DRAWS = 0, 1  # the purpose of a random generator, which is the first integer of the generator's seed

Integers = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """Random augmentation parameters of N images."""

    offset: npt.NDArray[np.int32]  # (N, 2): y and x of the crop in the central square, 0..max_offset_px inclusive
    flip: npt.NDArray[np.int32]  # (N,): 0 or 1
    normal: npt.NDArray[np.float64]  # (N, 3): standard normal, for the three principal components of the colour noise

    def select(self, images: slice) -> Draws:
        """Return the parameters of the images in a slice."""
        return Draws(self.offset[images], self.flip[images], self.normal[images])


def epoch_permutation(records: int, seed: int, epoch: int) -> Integers:
    """Return the order in which an epoch serves the records, as record numbers: int64 (records,).

    The order is a block shuffle: blocks of BLOCK_RECORDS consecutive records are put in random order. In a second
    stage, the records within each window of WINDOW_RECORDS records are shuffled. The order of the store is itself a
    random permutation (alexprep build-lmdb). A block shuffle therefore mixes the classes as well as a full shuffle
    does. The records of a block are next to each other on the disk.
    """
    rng = _generator(_PERMUTATION, seed, epoch)
    starts = rng.permutation(np.arange(0, records, BLOCK_RECORDS))
    order = (starts[:, None] + np.arange(BLOCK_RECORDS)).ravel()
    order = order[order < records]
    for first in range(0, records, WINDOW_RECORDS):
        rng.shuffle(order[first : first + WINDOW_RECORDS])
    return order


class EpochPermutations:
    """The permutations of a split for one seed.

    Caches the permutations of two epochs. Several threads can use the same object.
    """

    def __init__(self, records: int, seed: int) -> None:
        self._records, self._seed = records, seed
        self._kept: dict[int, Integers] = {}
        self._lock = threading.Lock()

    def __getitem__(self, epoch: int) -> Integers:
        """Return the permutation of an epoch, counted from 0.

        If several threads ask for the permutation, the permutation is computed only once.
        """
        with self._lock:
            if epoch not in self._kept:
                permutation = epoch_permutation(self._records, self._seed, epoch)
                self._kept = dict([*self._kept.items(), (epoch, permutation)][-2:])
            return self._kept[epoch]


def draw_params(seed: int, epoch: int, step: int, images: int, max_offset_px: int, shared_by: int = 1) -> Draws:
    """Return random augmentation parameters for one step, in which all ranks together serve `images` images.

    Crop offsets are drawn uniformly from 0..max_offset_px in each direction. Flips have probability one half.
    `shared_by` consecutive images have the same offset and flip. The authors' code uses 32 (convdata_jpeg.py,
    crop_chunk).
    """
    rng = _generator(_DRAWS, seed, epoch, step)
    groups = -(-images // shared_by)
    offset = rng.integers(0, max_offset_px, (groups, 2), np.int32, endpoint=True)
    flip = rng.integers(0, 1, groups, np.int32, endpoint=True)
    normal = rng.standard_normal((images, 3))
    group = np.arange(images) // shared_by
    return Draws(offset[group], flip[group], normal)


def _generator(purpose: int, seed: int, epoch: int, step: int = 0) -> np.random.Generator:
    """Return a separate Philox generator for each purpose, seed, epoch and step."""
    words = np.array([seed, epoch, step], np.uint64).view(np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([purpose, *words.tolist()])))

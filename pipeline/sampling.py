"""Epoch permutation and random augmentation parameters, as pure functions of seed, epoch and step.

The functions keep no state, so a stream can resume from its position: the epoch, and the step within the epoch, both
counted from 0. Together, `world_size` loaders with batch size B serve the same records as one loader with batch size
world_size · B. Rank r serves records r·B to (r + 1)·B − 1 of each step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.settings.augmentation import Augmentation

# Number of consecutive records in a block of the block shuffle (epoch_permutation). A block is 1.5 MB of JPEG files,
# which a disk reads in sequence.
BLOCK_RECORDS = 64
EFFECT_NUMBERS = 32  # number of random numbers for the effects of one image
# Number of records in a window of the block shuffle: 0.5 GB of JPEG files, which should fit in the page cache.
WINDOW_RECORDS = 16_384
# Purposes of random generators. The purpose is the first integer of the seed of a generator, so that generators with
# different purposes draw different numbers.
_PERMUTATION, _DRAWS, _REGIONS, _FLIPS, _EFFECTS = 0, 1, 2, 3, 5
_WEIGHTED_DRAWS, _MIXTURE = 12, 13
_TRIES = 10  # number of random regions that are tried for an image, as in torchvision's RandomResizedCrop

Integers = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """Random augmentation parameters of N images."""

    offset: npt.NDArray[np.int32]  # (N, 2): y and x of the crop in the central square, 0..max_offset_px inclusive
    flip: npt.NDArray[np.int32]  # (N,): 0 or 1
    normal: npt.NDArray[np.float64]  # (N, 3): standard normal numbers, for the principal components of the colour noise

    def select(self, images: slice) -> Draws:
        """Return the parameters of the images in a slice."""
        return Draws(self.offset[images], self.flip[images], self.normal[images])


def epoch_permutation(records: int, seed: int, epoch: int, store: int = 0) -> Integers:
    """Return the order in which an epoch serves the records, as record numbers: int64 (records,).

    The order is a block shuffle: blocks of BLOCK_RECORDS consecutive records are put in random order. Then the new
    order is divided into windows of WINDOW_RECORDS records, and the records within each window are shuffled. The
    records in the store are already in random order (alexprep build-lmdb), so a block shuffle mixes the classes as well
    as a full shuffle does. A disk reads a block fast, because the records of a block are next to each other.

    `store` is the index of the store if the epoch mixes several stores (mixed_order). Each store gets different orders.
    """
    rng = _generator(_PERMUTATION, seed, epoch, store)
    starts = rng.permutation(np.arange(0, records, BLOCK_RECORDS))
    order = (starts[:, None] + np.arange(BLOCK_RECORDS)).ravel()
    order = order[order < records]
    for first in range(0, records, WINDOW_RECORDS):
        rng.shuffle(order[first : first + WINDOW_RECORDS])
    return order


def epoch_order(
    records: int,
    seed: int,
    epoch: int,
    subset: Integers | None = None,
    weights: npt.NDArray[np.float64] | None = None,
) -> Integers:
    """Return the order in which an epoch serves the records of a subset, as record numbers: int64 (records,).

    `records` is the number of records in the subset. `subset` has their record numbers in ascending order; None: all
    records of the split.
    Without `weights`, the order is that of epoch_permutation. With `weights`, one weight for each record of the subset,
    the order is that of weighted_draws.
    """
    if weights is None:
        order = epoch_permutation(records, seed, epoch)
    else:
        order = weighted_draws(weights, seed, epoch)
    return order if subset is None else subset[order]


def weighted_draws(weights: npt.NDArray[np.float64], seed: int, epoch: int) -> Integers:
    """Return n draws with replacement from n weighted items: int64 (n,), indices into `weights` (n,).

    Let c[i] = weights[0] + … + weights[i], summed in this order in float64, and u[k] a float64 uniform in [0, 1) from
    the Philox generator of the epoch. Draw k is the smallest i with c[i] > u[k] · c[n − 1]: the inverse of the
    cumulative distribution. Item i is therefore drawn with probability weights[i] / c[n − 1], and an item of weight 0
    is never drawn. The draws are independent of each other. The largest weight must be 1.
    """
    sums = np.cumsum(weights)
    uniform = _generator(_WEIGHTED_DRAWS, seed, epoch).random(len(weights))
    draws: Integers = np.searchsorted(sums, uniform * sums[-1], side="right")
    return draws


def mixed_order(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> Integers:
    """Return the order in which an epoch mixes the records of several stores: int64 (sum of `counts`,).

    Store s has `sizes[s]` records, and the epoch takes `counts[s]` of them. The records of all stores are numbered in
    the order of the stores. A random permutation decides which positions of the epoch belong to which store. Each store
    has an endless sequence of records: its shuffled passes 0, 1, 2 and so on (epoch_permutation), one after another.
    Epoch e takes records e·counts[s] to (e + 1)·counts[s] − 1 of the sequence of store s. Over all epochs, a store
    therefore serves each of its records equally often.
    """
    stores = np.repeat(np.arange(len(sizes)), counts)
    stores = _generator(_MIXTURE, seed, epoch).permutation(stores)
    order = np.empty(len(stores), np.int64)
    for store, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        passes = range(epoch * count // size, -(-(epoch + 1) * count // size))
        sequence = np.concatenate([epoch_permutation(size, seed, number, store) for number in passes])
        first = epoch * count % size
        order[stores == store] = sum(sizes[:store]) + sequence[first : first + count]
    return order


class EpochOrders:
    """The order of the records in each epoch.

    Caches the two orders that were computed last. Several threads can use the same object.
    """

    def __init__(self, compute: Callable[[int], Integers]) -> None:
        """`compute(epoch)` returns the record numbers of an epoch in their order."""
        self._compute = compute
        self._kept: dict[int, Integers] = {}
        self._lock = threading.Lock()

    def __getitem__(self, epoch: int) -> Integers:
        """Return the order of an epoch, counted from 0.

        If several threads ask for the order, the order is computed only once.
        """
        with self._lock:
            if epoch not in self._kept:
                order = self._compute(epoch)
                self._kept = dict([*self._kept.items(), (epoch, order)][-2:])
            return self._kept[epoch]


def draw_params(seed: int, epoch: int, step: int, images: int, max_offset_px: int, shared_by: int = 1) -> Draws:
    """Return random augmentation parameters for one step, in which all ranks together serve `images` images.

    Crop offsets are drawn uniformly from 0..max_offset_px in each direction. Flips have probability one half.
    `shared_by` consecutive images have the same offset and flip. In the authors' code, 32 images share them
    (convdata_jpeg.py, crop_chunk).
    """
    rng = _generator(_DRAWS, seed, epoch, step)
    groups = -(-images // shared_by)
    offset = rng.integers(0, max_offset_px, (groups, 2), np.int32, endpoint=True)
    flip = rng.integers(0, 1, groups, np.int32, endpoint=True)
    normal = rng.standard_normal((images, 3))
    group = np.arange(images) // shared_by
    return Draws(offset[group], flip[group], normal)


def draw_effects(seed: int, epoch: int, step: int, images: int) -> npt.NDArray[np.float64]:
    """Return the random numbers of the effects of one step's images, uniform in [0, 1): (images, EFFECT_NUMBERS).

    pipeline.effects.parameters turns these numbers into parameters. The numbers do not depend on the settings, so a
    change of one effect leaves the random parameters of the other effects unchanged.
    """
    return _generator(_EFFECTS, seed, epoch, step).random((images, EFFECT_NUMBERS))


class StepDraws(NamedTuple):
    """All random numbers of the N images of a step."""

    draws: Draws
    regions: npt.NDArray[np.float64] | None  # (N, 11, 2), from draw_regions; None if no regions are resized
    effects: npt.NDArray[np.float64] | None  # (N, EFFECT_NUMBERS), from draw_effects; None if no image has effects

    def by_name(self, views: int) -> dict[str, npt.NDArray[Any]]:
        """Return the arrays that are not None, by name. With several views, their shape is (N / views, views, …)."""
        arrays = self.draws._asdict() | {"regions": self.regions, "effects": self.effects}
        drawn = {name: array for name, array in arrays.items() if array is not None}
        return {name: a if views == 1 else a.reshape(-1, views, *a.shape[1:]) for name, a in drawn.items()}

    def select(self, images: slice) -> StepDraws:
        """Return the random numbers of the images in a slice."""
        regions, effects = (None if array is None else array[images] for array in self[1:])
        return StepDraws(self.draws.select(images), regions, effects)


def draw_step(settings: Augmentation, seed: int, epoch: int, step: int, images: int, max_offset_px: int) -> StepDraws:
    """Return the random numbers of one step, in which all ranks together serve `images` images."""
    position, shared_by = (seed, epoch, step, images), settings.shared_by
    draws = draw_params(*position, max_offset_px, shared_by)
    if settings.window == "centre":
        draws = draws._replace(offset=np.full_like(draws.offset, max_offset_px // 2))
    if settings.flip != 0.5:
        draws = draws._replace(flip=draw_flips(*position, settings.flip, shared_by))
    effects = draw_effects(*position) if settings.has_effects else None
    if settings.window != "resized":
        return StepDraws(draws, None, effects)
    return StepDraws(draws, draw_regions(*position, settings.scale, settings.ratio, shared_by), effects)


def draw_flips(seed: int, epoch: int, step: int, images: int, share: float, shared_by: int) -> npt.NDArray[np.int32]:
    """Return the flips of a step's images, (images,): 1 with probability `share`, otherwise 0.

    `shared_by` consecutive images have the same flip.
    """
    groups = _generator(_FLIPS, seed, epoch, step).random(-(-images // shared_by)) < share
    return groups.astype(np.int32)[np.arange(images) // shared_by]


def draw_regions(
    seed: int,
    epoch: int,
    step: int,
    images: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    shared_by: int = 1,
) -> npt.NDArray[np.float64]:
    """Return the random numbers of a step's resized regions: float64 (images, 11, 2), for choose_regions.

    Each of the rows 0 to 9 is one try, with two numbers: the share of the record's area that the region has, and the
    width / height of the region. The share is drawn uniformly from `scale`. The logarithm of width / height is drawn
    uniformly between the logarithms of `ratio`. Row 10 is the position of the region: two numbers that are drawn
    uniformly from 0..1. `shared_by` consecutive images have the same numbers.
    """
    numbers = _generator(_REGIONS, seed, epoch, step).random((-(-images // shared_by), _TRIES + 1, 2))
    area, aspect = numbers[:, :_TRIES, 0], numbers[:, :_TRIES, 1]
    low, high = np.log(ratio)
    area[:], aspect[:] = scale[0] + (scale[1] - scale[0]) * area, np.exp(low + (high - low) * aspect)
    return numbers[np.arange(images) // shared_by]


def choose_regions(
    numbers: npt.NDArray[np.float64], sizes: npt.NDArray[np.int32], ratio: tuple[float, float]
) -> npt.NDArray[np.int32]:
    """Return the region of each record: int32 (N, 4), top, left, height and width.

    numbers  (N, 11, 2), from draw_regions
    sizes    (N, 2): heights and widths of the records
    ratio    smallest and largest width / height

    The formula is that of torchvision's RandomResizedCrop.get_params. A try has the width √(area · ratio) and the
    height √(area / ratio), rounded to integers, with halves rounded to even numbers. The first try that fits into the
    record is the region, and its position is uniform. If no try fits, the region is the largest rectangle at the centre
    of the record whose width / height is within `ratio`.
    """
    height, width = sizes[:, 0].astype(np.int64), sizes[:, 1].astype(np.int64)
    area, aspect = (height * width)[:, None] * numbers[:, :_TRIES, 0], numbers[:, :_TRIES, 1]
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (widths > 0) & (widths <= width[:, None]) & (heights > 0) & (heights <= height[:, None])
    first = np.arange(len(sizes)), fits.argmax(axis=1)
    extent = np.stack([heights[first], widths[first]], axis=1)
    offset = np.floor(numbers[:, _TRIES] * (sizes - extent + 1))

    whole = sizes.astype(np.float64)
    whole[:, 0] = np.where(width / height < ratio[0], np.rint(width / ratio[0]), height)
    whole[:, 1] = np.where(width / height > ratio[1], np.rint(height * ratio[1]), width)
    any_fits = fits.any(axis=1, keepdims=True)
    extent, offset = np.where(any_fits, extent, whole), np.where(any_fits, offset, (sizes - whole) // 2)
    return np.concatenate([offset, extent], axis=1).astype(np.int32)


def _generator(purpose: int, seed: int, epoch: int, step: int = 0) -> np.random.Generator:
    """Return a separate Philox generator for each purpose, seed, epoch and step."""
    words = np.array([seed, epoch, step], np.uint64).view(np.uint32)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([purpose, *words.tolist()])))

"""Shuffle quality of an epoch: number of distinct classes in a batch, and this number for a perfect shuffle."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln

from pipeline.records import Records
from pipeline.sampling import epoch_permutation
from prep.console import Progress
from prep.store.manifest import Store

LEAST_SHARE = 0.95  # `alexstream inspect` warns if `share_of_ideal` is below this value


@dataclass(frozen=True)
class ShuffleQuality:
    """Number of distinct classes in a batch of one epoch: the measured mean, and the mean for a perfect shuffle."""

    batches: int  # number of batches in which classes were counted
    distinct_classes: float  # mean number of distinct classes in these batches
    ideal_distinct_classes: float  # expected number of distinct classes if a batch were drawn at random
    share_of_ideal: float


def ideal_distinct(label_counts: npt.NDArray[np.int64], batch: int) -> float:
    """Return the expected number of classes among `batch` records that are drawn without replacement.

    Class k has label_counts[k] records. Let N be the number of all records.

    If a class has n of the N records, a batch lacks this class with probability C(N − n, batch) / C(N, batch).
    """
    total = int(label_counts.sum())
    counts = label_counts[label_counts > 0]
    others = total - counts
    others = others[others >= batch]  # if fewer than `batch` records have other classes, every batch has this class
    log_missing = gammaln(others + 1) - gammaln(others - batch + 1) - gammaln(total + 1) + gammaln(total - batch + 1)
    return float(len(counts) - np.exp(log_missing).sum())


def measure_shuffle_quality(
    store: Store, split: str, batch: int, seed: int, epoch: int, max_batches: int, progress: Progress
) -> ShuffleQuality:
    """Count the distinct classes in up to `max_batches` batches. These batches are spread evenly over the epoch.

    Raises StoreError for a damaged store.
    """
    counts = store.split(split)
    permutation = epoch_permutation(counts.records, seed, epoch)
    steps = counts.records // batch
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, max_batches)).astype(np.int64))
    distinct = []
    with closing(Records(store, split)) as records:
        for step in chosen.tolist():
            numbers = permutation[step * batch : (step + 1) * batch].tolist()
            distinct.append(len({records.label(number) for number in numbers}))
            progress.advance()
    ideal, mean = ideal_distinct(np.array(counts.label_counts), batch), float(np.mean(distinct))
    return ShuffleQuality(len(distinct), mean, ideal, mean / ideal)

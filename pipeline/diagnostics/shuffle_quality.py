"""How well an epoch mixes the classes: distinct classes in a batch, beside what a perfect shuffle would give."""

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

LEAST_SHARE = 0.95  # of the ideal: below it, a network sees too little of the data set at a time


@dataclass(frozen=True)
class ShuffleQuality:
    """Batches of one epoch, looked at."""

    batches: int
    distinct_classes: float  # in a batch, the mean over the batches
    ideal_distinct_classes: float  # expected of records drawn from the split without putting back
    share_of_ideal: float


def ideal_distinct(label_counts: npt.NDArray[np.int64], batch: int) -> float:
    """Expected number of classes among `batch` records drawn from sum(label_counts) without putting back.

    A class of n among N records is missing with probability C(N − n, batch) / C(N, batch).
    """
    total = int(label_counts.sum())
    counts = label_counts[label_counts > 0]
    others = total - counts
    possible = others >= batch  # a batch without the class
    others = others[possible]
    log_missing = gammaln(others + 1) - gammaln(others - batch + 1) - gammaln(total + 1) + gammaln(total - batch + 1)
    return float(len(counts) - np.exp(log_missing).sum())


def measure_shuffle_quality(
    store: Store, split: str, batch: int, seed: int, epoch: int, most_batches: int, report: Progress
) -> ShuffleQuality:
    """Look at up to `most_batches` batches, spread over the epoch; raises StoreError for a damaged store."""
    told = store.split(split)
    order = epoch_permutation(told.records, seed, epoch)
    steps = told.records // batch
    chosen = np.unique(np.linspace(0, steps - 1, min(steps, most_batches)).astype(np.int64))
    found = []
    with closing(Records(store, split)) as records:
        for step in chosen.tolist():
            numbers = order[step * batch : (step + 1) * batch].tolist()
            found.append(len({records[number].label for number in numbers}))
            report.advance()
    ideal = ideal_distinct(np.array(told.label_counts), batch)
    return ShuffleQuality(len(found), float(np.mean(found)), ideal, float(np.mean(found)) / ideal)

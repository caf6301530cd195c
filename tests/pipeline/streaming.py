"""Helpers of the tests of streams.

In the store of the fixture `numbered_store`, the images of a split have different labels, so the labels of a batch tell
which records it has.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from pipeline.engines import kernels
from pipeline.loader import Batch, EvalLoader, TrainLoader
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store

needs_kernel = pytest.mark.skipif(kernels.native is None, reason="no C compiler was there at installation")


def labels_by_batch(loader: TrainLoader | EvalLoader) -> list[list[int]]:
    return [batch.labels.tolist() for batch in loader]


def stored_labels(store: Path, split: str) -> list[int]:
    paths = Store.open(store).shard_paths(split)
    return [Datum.decode(value).label for path in paths for _, value in lmdb_shard.read(Path(path))]


def take_batches(loader: TrainLoader, batches: int) -> list[Batch]:
    """Take the next `batches` batches, over as many epochs as needed."""
    endless = (batch for _ in itertools.count() for batch in loader)
    return list(itertools.islice(endless, batches))


def batches_equal(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(first, second, strict=True)
    )


def concatenate_ranks(ranks: list[list[Batch]]) -> list[Batch]:
    """Return the batches of all ranks, concatenated step by step in the order of the ranks."""
    steps = zip(*ranks, strict=True)
    return [Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True))) for batches in steps]

"""What the tests of the loaders share: batches taken, compared and joined, and the labels that a store holds.

Each picture of the fixture `numbered` has its own number in its label, so a batch's labels say which records it holds.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from pipeline.loader import Batch, EvalLoader, TrainLoader
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store


def labels_of(loader: TrainLoader | EvalLoader) -> list[list[int]]:
    return [batch.labels.tolist() for batch in loader]


def labels_in_store(store: Path, split: str) -> list[int]:
    paths = Store.open(store).shard_paths(split)
    return [Datum.decode(value).label for path in paths for _, value in lmdb_shard.read(Path(path))]


def take(loader: TrainLoader, batches: int) -> list[Batch]:
    """So many batches, through as many epochs as it takes."""
    endless = (batch for _ in itertools.count() for batch in loader)
    return list(itertools.islice(endless, batches))


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(some, others, strict=True)
    )


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """What the loaders of a world serve, step by step, in the order of their ranks."""
    steps = zip(*ranks, strict=True)
    return [Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True))) for batches in steps]

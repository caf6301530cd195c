"""Several stores as one stream: the share of each store in an epoch, and one numbering of the records of all stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.records import RecordBatch, Records
from pipeline.sampling import mixed_order
from prep.console import WrongArgument
from prep.store.extra import Column, joined
from prep.store.manifest import ExtraField, Store

Stores = Sequence[tuple[str | Path, float]]


@dataclass(frozen=True)
class Mixture:
    """Stores with the same side, format and classes, and the number of records that an epoch takes from each store."""

    stores: tuple[Store, ...]
    counts: tuple[int, ...]  # number of records that an epoch takes from each store

    @staticmethod
    def open(stores: Stores, split: str) -> Mixture:
        """Open the stores.

        Let n be the number of records that the split has in all stores together. An epoch takes n records. From a store
        with a given share, it takes n · share / (sum of all shares) records, rounded by the method of the largest
        remainder.

        Raises WrongArgument for a share that is not a finite number of more than 0, for a share that gives a store no
        record, and for stores that differ in side, format or classes. Raises StoreError as Store.open does.
        """
        pairs = list(stores)
        if not pairs:
            raise WrongArgument("stores []: expected at least one pair (path, share).")
        for path, share in pairs:
            if not (share > 0 and math.isfinite(share)):
                raise WrongArgument(f"share {share} of store {path}: expected a finite number of more than 0.")
        opened = tuple(Store.open(path) for path, _ in pairs)
        for other in opened[1:]:
            compare_stores(opened[0], other)
        records, total = sum(store.split(split).records for store in opened), math.fsum(share for _, share in pairs)
        exact = [records * share / total for _, share in pairs]
        counts = [int(number) for number in exact]
        by_remainder = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])
        for k in by_remainder[: records - sum(counts)]:
            counts[k] += 1
        for (path, share), count in zip(pairs, counts, strict=True):
            if not count:
                raise WrongArgument(
                    f"share {share} of store {path}: an epoch of {records:,} records takes no record of this store."
                )
        return Mixture(opened, tuple(counts))

    def records(self, split: str, check: bool | None) -> MixedRecords:
        """Return the records of all stores. `check` is the argument of Records."""
        return MixedRecords(self.stores, split, check)

    def order(self, split: str, seed: int) -> Callable[[int], npt.NDArray[np.int64]]:
        """Return the function that computes the order of an epoch (pipeline.sampling.mixed_order)."""
        sizes = tuple(store.split(split).records for store in self.stores)
        return partial(mixed_order, sizes, self.counts, seed)

    def identity(self, split: str) -> list[list[str | int]]:
        """Return the fingerprint and the count of each store, for the state of a stream."""
        return [[store.split(split).fingerprint, n] for store, n in zip(self.stores, self.counts, strict=True)]


class MixedRecords:
    """The records of one split in several stores. They are numbered store after store.

    The methods do the same as the methods of Records.
    """

    advice = "Check each store with: alexprep verify --store STORE"

    def __init__(self, stores: Sequence[Store], split: str, check: bool | None) -> None:
        """Raises StoreError if a store has no such split."""
        self.store, self.split = stores[0], split
        self._parts = [Records(store, split, check) for store in stores]
        self.sizes = tuple(map(len, self._parts))
        self._starts = np.cumsum([0, *self.sizes])

    def __len__(self) -> int:
        return sum(self.sizes)

    def places(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return (N, 2): the index of the store, and the number of the record in this store."""
        store = np.searchsorted(self._starts[1:], numbers, side="right")
        return np.stack([store, numbers - self._starts[store]], axis=1)

    def batch(self, numbers: npt.NDArray[np.int64]) -> RecordBatch:
        """Return the records `numbers` (N,), in this order. Raises StoreError for a damaged record."""
        store, local = self.places(numbers).T
        order = np.argsort(store, kind="stable")
        batches = [self._parts[k].batch(np.ascontiguousarray(local[store == k])) for k in np.unique(store).tolist()]
        names = ("labels", "sizes", "addresses", "payload_bytes")
        arrays: dict[str, Any] = {}
        for name in names:
            joined = np.concatenate([getattr(batch, name) for batch in batches])
            arrays[name] = np.empty_like(joined)
            arrays[name][order] = joined
        return RecordBatch(numbers, **arrays, is_raw=batches[0].is_raw, memory=[batch.memory for batch in batches])

    @property
    def extra_fields(self) -> Mapping[str, ExtraField]:
        """The extra fields of the records, by name. Raises WrongArgument if the stores have different fields."""
        first, *others = self._parts
        for other in others:
            ours, theirs = (
                ", ".join(f"{name} ({field.type}, width {field.width})" for name, field in sorted(fields.items()))
                for fields in (first.extra_fields, other.extra_fields)
            )
            if ours != theirs:
                raise WrongArgument(
                    f"stores: {first.store.root} has the extra fields {ours or 'none'}, {other.store.root} has "
                    f"{theirs or 'none'}. Leave the field extra out, or mix stores with the same extra fields."
                )
        return first.extra_fields

    def extra(self, numbers: npt.NDArray[np.int64]) -> dict[str, Column]:
        """Return the values of the extra fields of the records `numbers` (N,), as Records.extra does."""
        store, local = self.places(numbers).T
        order = np.argsort(store, kind="stable")
        row_of = np.empty_like(order)
        row_of[order] = np.arange(len(order))
        parts = [self._parts[k].extra(local[store == k]) for k in np.unique(store).tolist()]
        return {name: joined([part[name] for part in parts]).take(row_of) for name in parts[0]}

    def source(self, number: int) -> str:
        """Return the source path of record `number`, as Records.source does."""
        part, local = self._part(number)
        return part.source(local)

    def location(self, number: int) -> str:
        """Return the shard folder, key and source file of record `number`, for messages."""
        part, local = self._part(number)
        return part.location(local)

    def find_damage(self, number: int) -> str:
        """Return a description of the damage of record `number`; empty if the record is intact."""
        part, local = self._part(number)
        return part.find_damage(local)

    def check_maps(self) -> None:
        """Raise ShardBroken if a mapped file of a store was truncated or one of its pages cannot be read."""
        for part in self._parts:
            part.check_maps()

    def close(self) -> None:
        """Unmap all files."""
        for part in self._parts:
            part.close()

    def _part(self, number: int) -> tuple[Records, int]:
        ((store, local),) = self.places(np.array([number])).tolist()
        return self._parts[store], local


def open_stores(
    store: str | Path | None, stores: Stores | None, split: str, **others: object
) -> tuple[Store, Mixture | None]:
    """Return the store whose settings and colour statistics a loader uses, and the mixture if there is one.

    Raises WrongArgument if both or neither of `store` and `stores` are given, or if an argument in `others` is given
    together with `stores`. Also raises the errors of Mixture.open.
    """
    if stores is None:
        if store is None:
            raise WrongArgument("no store: expected the folder of a store, or pairs (path, share) in stores.")
        return Store.open(store), None
    for name, value in ({"store": store} | others).items():
        if value is not None:
            raise WrongArgument(
                f"stores with {name}: expected only one of these arguments. Leave out {name} or stores."
            )
    mixture = Mixture.open(stores, split)
    return mixture.stores[0], mixture


def compare_stores(first: Store, other: Store) -> None:
    """Raise WrongArgument if two stores differ in side, format or classes. The error gives the first difference."""
    for name, text in (("side_px", "a side of {} px"), ("format", "records of format {}")):
        values = getattr(first.settings, name), getattr(other.settings, name)
        if values[0] != values[1]:
            ours, theirs = (text.format(value) for value in values)
            raise WrongArgument(
                f"stores: {first.root} has {ours}, {other.root} has {theirs}. All stores need the same side and format."
            )
    for label in range(max(len(first.classes), len(other.classes))):
        ours, theirs = (
            repr(store.classes[label]) if label < len(store.classes) else "missing" for store in (first, other)
        )
        if ours != theirs:
            raise WrongArgument(
                f"stores: class {label} is {ours} in {first.root}, and {theirs} in {other.root}. All stores need the "
                "same classes in the same order."
            )

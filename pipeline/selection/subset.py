"""Subset of a split (class names, record numbers or a mask), and one weight for each record."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from pipeline.records import Records
from prep.console import WrongArgument, did_you_mean
from prep.store.manifest import Store

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Subset = str | Sequence[str] | Sequence[int] | Sequence[bool] | npt.NDArray[Any]
Weights = Literal["balanced"] | Sequence[float] | npt.NDArray[Any]

_LABELS_AT_ONCE = 16_384  # number of records whose labels are read by one call


def subset_numbers(store: Store, split: str, subset: Subset | None) -> Integers | None:
    """Return the record numbers of a subset in ascending order, int64 (n,); None for all records of the split.

    `subset` has one of these forms:

    - names of classes: the records of these classes. The labels of all records are read
    - record numbers, integers (n,) in any order, each number at most once
    - a mask, bool (records,): True for each record of the subset

    Raises WrongArgument for an unknown class, a wrong number, a mask of the wrong length, and an empty subset. Raises
    StoreError if the labels are needed and a record is damaged.
    """
    if subset is None:
        return None
    records = store.split(split).records
    values = np.asarray([subset] if isinstance(subset, str) else subset)
    if values.ndim != 1 or values.dtype.kind not in "Uiub":
        if values.size:
            raise WrongArgument(
                f"subset of {values.dtype} {values.shape}: expected class names, record numbers, or a mask of "
                f"{records:,} bools."
            )
        numbers = np.empty(0, np.int64)
    elif values.dtype.kind == "U":
        numbers = np.flatnonzero(np.isin(record_labels(store, split), _labels_of(store, values.tolist())))
    elif values.dtype.kind == "b":
        if len(values) != records:
            raise WrongArgument(f"subset mask of {len(values):,} bools, split {split} has {records:,} records.")
        numbers = np.flatnonzero(values)
    else:
        numbers = _checked(values, split, records)
    if not len(numbers):
        raise WrongArgument(
            f"subset selects no record of split {split} of {store.root}. Choose other classes or numbers."
        )
    return None if len(numbers) == records else numbers.astype(np.int64)


def record_weights(store: Store, split: str, numbers: Integers | None, weights: Weights | None) -> Floats | None:
    """Return the weight of each record of a subset, divided by the largest weight: float64 (n,); None without weights.

    `numbers` are the record numbers of the subset, from subset_numbers. `weights` has one weight for each record of the
    split. With "balanced", the weight of a record is 1 / (number of records of its class in the subset), so that each
    class is drawn equally often.

    Raises WrongArgument for a wrong number of weights, for a weight that is negative or not finite, and if all weights
    of the subset are 0.
    """
    if weights is None:
        return None
    records = store.split(split).records
    chosen = slice(None) if numbers is None else numbers
    if isinstance(weights, str):
        if weights != "balanced":
            raise WrongArgument(f"weights {weights!r}: expected balanced, or {records:,} numbers.")
        labels = record_labels(store, split)[chosen]
        values: Floats = 1 / np.bincount(labels)[labels]
    else:
        given = np.asarray(weights, np.float64)
        if given.shape != (records,):
            raise WrongArgument(f"weights of shape {given.shape}, split {split} has {records:,} records.")
        values = given[chosen]
        wrong = ~(np.isfinite(values) & (values >= 0))
        if wrong.any():
            first = int(np.flatnonzero(wrong)[0])
            number = first if numbers is None else int(numbers[first])
            raise WrongArgument(f"weight {values[first]} of record {number}: expected a finite number of at least 0.")
        if not values.any():
            raise WrongArgument("weights: all weights are 0. Give at least one record a weight of more than 0.")
    scaled: Floats = values / values.max()
    return scaled


def record_labels(store: Store, split: str) -> Integers:
    """Return the labels of all records of a split: int64 (records,).

    Reads the beginning and the end of each record. Raises StoreError for a damaged record.
    """
    records = Records(store, split, check=False)
    try:
        parts = [
            np.arange(first, min(first + _LABELS_AT_ONCE, len(records)))
            for first in range(0, len(records), _LABELS_AT_ONCE)
        ]
        return np.concatenate([records.batch(part).labels for part in parts] or [np.empty(0, np.int64)])
    finally:
        records.close()


def digest_of(values: npt.NDArray[Any]) -> str:
    """Return the first 128 bits of an array's SHA-256 as hex digits. The array is hashed as little-endian bytes."""
    return hashlib.sha256(values.astype(values.dtype.newbyteorder("<")).tobytes()).hexdigest()[:32]


def _labels_of(store: Store, names: Sequence[str]) -> list[int]:
    label_of = {name: label for label, name in enumerate(store.classes)}
    for name in names:
        if name not in label_of:
            similar = did_you_mean(name, store.classes) or " loader.classes has the names."
            raise WrongArgument(f"subset: {store.root} has no class {name!r}.{similar}")
    return [label_of[name] for name in names]


def _checked(numbers: npt.NDArray[Any], split: str, records: int) -> npt.NDArray[Any]:
    """Return record numbers in ascending order. Raises WrongArgument if a number is out of range or given twice."""
    numbers = np.sort(numbers)
    for number in (numbers[0], numbers[-1]) if len(numbers) else ():
        if not 0 <= number < records:
            raise WrongArgument(f"subset: record {number}, split {split} has the records 0 to {records - 1:,}.")
    twice = numbers[:-1][numbers[1:] == numbers[:-1]]
    if len(twice):
        raise WrongArgument(
            f"subset: record {twice[0]} is given twice. To repeat records, use weights of train_loader."
        )
    return numbers

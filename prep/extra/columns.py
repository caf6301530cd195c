"""Columns of extra fields. A build reads a row for each input; a split keeps only the rows of its records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.console import UserError
from prep.schema import file_sha256
from prep.store.extra import Column, StoredColumns, save_columns
from prep.store.lmdb_shard import ShardReader
from prep.store.manifest import ExtraField, Shard, Store, StoreError, split_files, split_fingerprint
from prep.store.models import Account


def record_positions(root: Path, shards: Sequence[Shard], inputs: int) -> npt.NDArray[np.int64]:
    """Return, for each record, the index of its input among all inputs in record order: int64 (records,).

    The key of a record is this index. Keys are read only if inputs were left out. Raises StoreError if a shard cannot
    be read, or has a key that is not the index of an input.
    """
    if sum(shard.records for shard in shards) == inputs:
        return np.arange(inputs)
    positions = []
    for shard in shards:
        reader = ShardReader(root / shard.path, shard.records)
        try:
            positions.append(reader.key_numbers(np.arange(shard.records)))
            reader.check_map()
        finally:
            reader.close()
    found = np.concatenate(positions)
    if found.min() < 0 or found.max() >= inputs:
        raise StoreError(f"{root}: keys from {found.min()} to {found.max()}, expected 0 to {inputs - 1}.")
    return found


def refuse_other_types(store: Store, split: str, columns: Mapping[str, Column]) -> None:
    """Raise UserError if a field of `columns` has a different type or width in another split of the store."""
    for other_name, other in store.splits.items():
        for name, column in columns.items():
            before = other.extra.get(name)
            if other_name != split and before and (before.type, before.width) != (column.type, column.width):
                raise UserError(
                    f"--extra {name}: {type_text(column.entry())} in {split}, {type_text(before)} in {other_name} of "
                    f"{store.root}. All splits need the same type: pass --extra {name}:{before.type}=CSV, or choose "
                    "another FIELD."
                )


def new_columns(store: Store, split: str, columns: Mapping[str, Column]) -> dict[str, Column]:
    """Return those of `columns` that a complete split lacks.

    Each of `columns` has a row for each input, in record order. Each returned column has a row for each record. Raises
    UserError if the split already has one of the fields, but with another type or other values. Raises StoreError if
    the store is damaged.
    """
    if not columns:
        return {}
    entry, missing = store.split(split), {}
    inputs = len(next(iter(columns.values())))
    positions = record_positions(store.root, entry.shards, inputs)
    stored: dict[str, Column] = {}
    if any(name in entry.extra for name in columns):
        opened = StoredColumns(store, split)
        try:
            stored = opened.take(np.arange(entry.records))
        finally:
            opened.close()
    for name, column in columns.items():
        rows = column.take(positions)
        before = stored.get(name)
        if before is None:
            missing[name] = rows
            continue
        advice = "Pass the same values as before, choose another FIELD, or choose another --store."
        if (before.type, before.width) != (rows.type, rows.width):
            raise UserError(
                f"{store.root}: the field {name} of {split} is {type_text(before.entry())}, this command has "
                f"{type_text(rows.entry())}. {advice}"
            )
        differ = before.differences(rows)
        if len(differ):
            record = int(differ[0])
            values = f"{before.value(record)!s:.40} in the store, {rows.value(record)!s:.40} in this command"
            raise UserError(
                f"{store.root}: the values of the field {name} in the store and in this command differ in "
                f"{len(differ):,} records of {split}. The first is record {record:,}: {values}. {advice}"
            )
    return missing


def add_columns(store: Store, split: str, columns: Mapping[str, Column]) -> Store:
    """Write `columns` into a complete split, then the manifest, and return the new store.

    Each of `columns` has a row for each record.
    """
    if not columns:
        return store
    entry = store.split(split)
    extra = dict(sorted({**entry.extra, **save_columns(store.root / split, columns)}.items()))
    new = [file for file in split_files(extra) if file not in entry.account["files"]]
    files = {**entry.account["files"], **{file: file_sha256(store.root / split / file) for file in new}}
    account: Account = {**entry.account, "files": files}
    fingerprint = split_fingerprint(store.classes, entry.shards, extra, files)
    changed = replace(entry, extra=extra, account=account, fingerprint=fingerprint)
    added = replace(store, splits={**store.splits, split: changed})
    added.save()
    return added


def type_text(field: ExtraField) -> str:
    """Return the type of a field for messages, such as `int` or `vector of 4`."""
    return f"vector of {field.width:,}" if field.type == "vector" else field.type

"""Describes a store from its manifest, and finds a record by its key."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prep.console import bytes_text, count_noun
from prep.extra.columns import type_text
from prep.images.codec import checked_datum
from prep.inputs.classes import first_labels_text
from prep.inputs.names import name_text
from prep.store import lmdb_file, lmdb_shard
from prep.store.datum import Datum, DatumError
from prep.store.extra import StoredColumns
from prep.store.input_log import IGNORED
from prep.store.manifest import DROPPED, Settings, Split, Store, StoreError
from prep.workers import Runner, TaskProgress, WorkerDied

ADVICE = "Check the store with: alexprep verify"


def describe_store(store: Store) -> dict[str, Any]:
    """Return the settings, tools, classes, splits and record counts by class, as a JSON object.

    Only the manifest is read.
    """
    return {
        "store": str(store.root),
        "fingerprint": store.fingerprint,
        "settings": store.settings.to_json(),
        "tools": dict(store.tools),
        "classes": list(store.classes),
        "splits": {name: _describe_split(store, split) for name, split in store.splits.items()},
    }


def _describe_split(store: Store, split: Split) -> dict[str, Any]:
    account = split.account
    return {
        "records": split.records,
        "bytes": split.bytes,
        "bytes_per_record": round(split.bytes / split.records, 1),
        "pixels": split.pixels,
        "shards": len(split.shards),
        "fingerprint": split.fingerprint,
        "inputs": account["inputs"],
        "kept": account["kept"],
        "converted": account["converted"],
        "exif_orientation": account["exif_orientation"],
        "warnings": account.get("warnings", {}),
        "bad": account["bad"],
        "ignored": account.get(IGNORED, {}),
        **({"extra": {name: asdict(field) for name, field in sorted(split.extra.items())}} if split.extra else {}),
        **({"sources": account["sources"]} if "sources" in account else {}),
        "records_of_class": dict(zip(store.classes, split.label_counts, strict=True)),
    }


def summary_lines(store: Store) -> Iterator[str]:
    """Yield the main facts of `describe_store` as lines of text."""
    settings = store.settings
    format = f"jpeg, quality {settings.quality}" if settings.format == "jpeg" else settings.format
    shape = "whole images" if settings.keep_aspect else "central squares"
    yield f"{store.root}: {format}, {shape}, shorter side {settings.side_px} px, filter {settings.filter}"
    if settings.background == DROPPED:
        yield "  alpha channels dropped by the version that built the store"
    else:
        yield f"  transparent pixels over {settings.background}"
    yield f"  fingerprint {store.fingerprint}, order seed {settings.seed}"
    yield f"  {count_noun(len(store.classes), 'class', 'classes')}, by label: {first_labels_text(store.classes)}"
    yield "  made with " + ", ".join(f"{name} {version}" for name, version in store.tools.items())
    for name, split in store.splits.items():
        account, counts = split.account, [count for count in split.label_counts if count]
        yield (
            f"{name}: {count_noun(split.records, 'record')}, {bytes_text(split.bytes)} in "
            f"{count_noun(len(split.shards), 'shard')}, {bytes_text(split.bytes / split.records)} per record"
        )
        yield (
            f"  {len(counts):,} of {count_noun(len(store.classes), 'class', 'classes')} have records, "
            f"{min(counts):,} to {max(counts):,} each"
        )
        if split.extra:
            yield "  extra fields: " + fields_text(split)
        for origin in account.get("sources", ()):
            records, fingerprint = count_noun(origin["records"], "record"), origin["fingerprint"][:16]
            yield f"  merged: {records} from the split with fingerprint {fingerprint}"
        bad = sum(account["bad"].values())
        yield f"  {count_noun(account['inputs'], 'input')}: {account['kept']:,} kept, {bad:,} left out"
        for title, group in (("converted", account["converted"]), ("EXIF orientation", account["exif_orientation"])):
            if group:
                yield f"  {title}: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(group.items()))
        for text, count in account.get("warnings", {}).items():
            yield f"  kept, with warnings: {count:,} {text}"
        for reason, count in account["bad"].items():
            yield f"  left out: {count:,} {reason}"
        for reason, count in account.get(IGNORED, {}).items():
            yield f"  not part of the data set: {reason} ({count:,})"
        if account["converted"] or account.get("warnings") or account.get(IGNORED) or bad:
            yield f"  {store.root / name / 'inputs.jsonl'} lists these inputs"


def fields_text(split: Split) -> str:
    """Return the extra fields of a split with their types for messages, such as `age (int), box (vector of 4)`."""
    return ", ".join(f"{name} ({type_text(field)})" for name, field in sorted(split.extra.items()))


class FoundRecord(NamedTuple):
    """A record, and where it is stored."""

    shard: str  # path of the shard
    number: int  # number of the record in its split, from 0
    datum: Datum


def find_record(store: Store, split: str, key: str, runner: Runner) -> FoundRecord:
    """Find a record by its key.

    The leading zeros of the key may be left out. Raises StoreError if no shard has the key, or if the record is
    damaged.
    """
    if not (key.isascii() and key.isdigit()):
        raise StoreError(f"--key {key!r}: expected a number such as {name_text(lmdb_shard.record_key(17))} or 17.")
    padded_key = key.zfill(8).encode()
    paths = store.shard_paths(split)
    tasks = [(path, padded_key, store.settings, len(store.classes)) for path in paths]
    for (path, *_), result in runner.map(_read_record, tasks, lambda counts: None):
        if isinstance(result, WorkerDied):
            raise StoreError(
                f"{path}: the process that read this shard {result.describe()}. Check the store with: alexprep verify"
            )
        if result is not None:
            before = sum(shard.records for shard in store.split(split).shards[: paths.index(path)])
            return FoundRecord(path, before + result[0], result[1])
    raise StoreError(
        f"{store.root} has no key {name_text(padded_key)} in {split} ({store.split(split).records:,} records)."
    )


def record_extra(store: Store, split: str, number: int) -> dict[str, Any]:
    """Return {field: value} for the extra fields of a record. A value is an int, a float, a text or a list of floats.

    Raises StoreError if a column is damaged.
    """
    if not store.split(split).extra:
        return {}
    with closing(StoredColumns(store, split)) as columns:
        values = {name: column.value(0) for name, column in columns.take(np.array([number])).items()}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def _read_record(task: tuple[str, bytes, Settings, int], task_progress: TaskProgress) -> tuple[int, Datum] | None:
    """Return the index of a record in its shard, and the record; None if the shard does not have the key."""
    path, key, settings, classes = task
    with lmdb_file.LmdbFile(Path(path), ADVICE) as file:
        value = file.pages.get(key)
        index = (
            0
            if value is None
            else next(index for index, (other, _) in enumerate(file.pages.items(with_values=False)) if other == key)
        )
    try:
        return None if value is None else (index, checked_datum(bytes(value), settings, classes))
    except DatumError as error:
        raise StoreError(f"{path}, key {name_text(key)}: {error}. {ADVICE}") from None

"""Tasks of a merge that worker processes run: list the records of one shard, and write one shard of the new store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.build.shard_task import store_shard
from prep.console import UserError
from prep.images.codec import checked_datum
from prep.images.color_stats import PixelSums
from prep.inputs.formats.shards import pack_location
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.store import lmdb_shard
from prep.store.datum import CRC32_BYTES, SOURCE, DatumError, locate_image, parse_fields
from prep.store.manifest import Settings, Shard
from prep.workers import TaskProgress

ADVICE = "Check the store with: alexprep verify"


@dataclass(frozen=True)
class SourceShard:
    """A shard of a source store. The class with label k in the source store gets label `labels[k]` in the new store."""

    folder: Path
    records: int
    labels: tuple[int, ...]


@dataclass(frozen=True)
class CopyTask:
    """Everything that is needed to write one shard of the new store. A task is pickled and sent to a worker process."""

    number: int  # index of the new shard
    first_index: int  # key of the first record of the new shard
    # For each record of the new shard: index of its source shard in `shards`, and index of the record in that shard.
    records: tuple[tuple[int, int], ...]
    shards: tuple[SourceShard, ...]
    folder: Path  # folder of the split in the new store
    settings: Settings
    build_id: str


def list_shard(task: tuple[int, SourceShard], task_progress: TaskProgress) -> Listing:
    """Return the records of one shard, with their new labels.

    Raises UserError if a record is not a Datum of a store, and ShardBroken if the shard cannot be read from the disk.
    """
    number, shard = task
    listing = Listing()
    reader = lmdb_shard.ShardReader(shard.folder, shard.records)
    try:
        for index in range(shard.records):
            task_progress.begin(index)
            value = reader[index]
            try:
                span = locate_image(value)
                tail = bytes(value[span.end :])  # the image itself is not parsed
                path = parse_fields(tail, len(tail) - CRC32_BYTES).get(SOURCE, b"")
                label = shard.labels[span.label]
                reader.check_map()
            except (DatumError, IndexError) as error:
                reader.check_map()
                raise UserError(f"{shard.folder}, key {name_text(reader.key(index))}: {error}. {ADVICE}") from None
            crc32 = int.from_bytes(tail[-4:], "little")
            location = pack_location(number, index)
            listing.add(path if isinstance(path, bytes) else b"", label, len(value), crc32, location)
    finally:
        reader.close()
    return listing


def copy_shard(task: CopyTask, task_progress: TaskProgress) -> None:
    """Write one shard of the new store.

    Raises UserError if a record is damaged, ShardBroken if a shard cannot be read from the disk, and DiskFull if the
    disk is full.
    """
    labels: Counter[int] = Counter()
    sums = PixelSums(task.settings.side_px)
    opened: dict[int, lmdb_shard.ShardReader] = {}

    def records() -> Iterator[tuple[bytes, bytes]]:
        for index, (shard_index, record_index) in enumerate(task.records):
            task_progress.begin(index)
            shard = task.shards[shard_index]
            if shard_index not in opened:
                opened[shard_index] = lmdb_shard.ShardReader(shard.folder, shard.records)
            value = bytes(opened[shard_index][record_index])
            opened[shard_index].check_map()
            try:
                datum = checked_datum(value, task.settings, len(shard.labels))
                label = shard.labels[datum.label]
            except DatumError as error:
                raise UserError(f"{shard.folder}, record {record_index}: {error}. {ADVICE}") from None
            if label != datum.label:
                value = replace(datum, label=label).encode()
            if task.settings.format == "ppm":
                sums.add(np.frombuffer(datum.data, np.uint8).reshape(datum.height + 1, datum.width, 3)[1:])
            labels[label] += 1
            task_progress.count(len(value))
            yield lmdb_shard.record_key(task.first_index + index), value

    def results(built: Shard) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        summary = {"shard": asdict(built), "build": task.build_id, "labels": sorted(labels.items()), "fates": []}
        return sums.square_sum(), summary

    try:
        store_shard(task.folder, task.number, records(), results)
    finally:
        for reader in opened.values():
            reader.close()

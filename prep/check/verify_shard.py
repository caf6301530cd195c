"""Verifies one shard: each record, the order of the records, and the digest of the shard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b, sha256
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.images.codec import BadImage, checked_datum, decode_image
from prep.images.color_stats import Moments, PixelSums
from prep.images.jpeg import encode_jpeg, quantization_tables
from prep.inputs.names import name_text
from prep.store import lmdb_shard
from prep.store.datum import CRC32_BYTES, SOURCE, Datum, DatumError, parse_fields
from prep.store.lmdb_file import ShardBroken
from prep.store.manifest import Settings, Shard, StoreError
from prep.workers import TaskProgress


@dataclass(frozen=True)
class Fault:
    """One difference between a store and its manifest, or one damaged record."""

    where: str  # name of a shard, such as `train/00003`, or of a file of the store
    key: str  # key of the record; empty if the fault does not concern a single record
    source: str  # source path in the record; empty if it cannot be read
    what: str

    def text(self) -> str:
        """Return the fault as one line of text."""
        key = f", key {self.key}" if self.key else ""
        source = f" ({self.source})" if self.source else ""
        return f"{self.where}{key}{source}: {self.what}"


@dataclass(frozen=True)
class ShardCheck:
    """The task of verifying one shard. A task is pickled and sent to a worker process."""

    root: Path
    shard: Shard
    settings: Settings
    classes: int
    decode: bool


@dataclass
class ShardFindings:
    """Result of the check of one shard."""

    faults: list[Fault] = field(default_factory=list)
    keys: tuple[int, int] = (-1, -1)  # keys of the first and the last record
    records: int = 0
    labels: Counter[int] = field(default_factory=Counter)
    moments: Moments = field(default_factory=Moments)
    square_sum: npt.NDArray[np.int64] | None = None
    # source_hash of the first and of the last record; both are empty if there is no record.
    hashes: tuple[bytes, bytes] = (b"", b"")


def check_shard(task: ShardCheck, task_progress: TaskProgress) -> ShardFindings:
    """Check each record of one shard. If no record is damaged, compare the counts and the digest with the manifest.

    The records of a split are sorted by a hash of their source paths, keyed with the seed of the store
    (Listing.permutation). Only the first record that breaks the order is reported as a fault. Raises ShardBroken if the
    file is truncated while it is read.
    """
    found, shard, digest, size, last_key = ShardFindings(), task.shard, sha256(), 0, -1
    in_order = True
    sums = PixelSums(task.settings.side_px)
    try:
        for key, value in lmdb_shard.read(task.root / shard.path):
            task_progress.begin(found.records)
            found.records += 1
            digest.update(key + len(value).to_bytes(8, "little"))
            digest.update(value)
            size += len(value)
            fault_count = len(found.faults)
            number = int(key) if len(key) == 8 and key.isdigit() else -1
            try:
                if number <= last_key:
                    raise DatumError("the key is not a number of eight digits greater than the previous key")
                last_key = number
                found.keys = (number if found.keys[0] < 0 else found.keys[0], number)
                datum, pixels = _check_record(task, value)
                found.labels[datum.label] += 1
                if pixels is not None:
                    sums.add(pixels)
                order = source_hash(datum.source, task.settings.seed)
                was_in_order, in_order = in_order, in_order and found.hashes[1] <= order
                found.hashes = found.hashes[0] or order, order
                if was_in_order and not in_order:
                    seed = task.settings.seed
                    raise DatumError(f"not in the order of seed {seed}: this record belongs before the previous record")
            except (DatumError, BadImage) as error:
                found.faults.append(Fault(shard.path, name_text(key), _readable_source(value), str(error)))
            task_progress.count(len(value), bad=len(found.faults) > fault_count)
    except ShardBroken:
        raise
    except StoreError as error:
        found.faults.append(Fault(shard.path, "", "", str(error)))
    if not found.faults:
        for name, actual, expected in (
            ("records", found.records, shard.records),
            ("bytes", size, shard.bytes),
            ("digest", digest.hexdigest(), shard.digest),
        ):
            if actual != expected:
                found.faults.append(Fault(shard.path, "", "", f"{name} {actual}, the manifest says {expected}"))
                break
    if task.decode:
        found.moments, found.square_sum = sums.moments, sums.square_sum()
    return found


def source_hash(source: bytes, seed: int) -> bytes:
    """Return the 8-byte hash by which the records of a split are sorted (Listing.permutation)."""
    return blake2b(source, digest_size=8, key=seed.to_bytes(8, "little")).digest()


@cache
def _tables_of(quality: int) -> list[bytes]:
    return quantization_tables(encode_jpeg(np.zeros((16, 16, 3), np.uint8), quality))


def _check_record(task: ShardCheck, value: bytes) -> tuple[Datum, npt.NDArray[np.uint8] | None]:
    """Return a record and its pixels, uint8 (H, W, 3). The pixels are None if the task does not decode.

    Raises DatumError or BadImage if the record is damaged or contradicts `task`.
    """
    settings, datum = task.settings, checked_datum(value, task.settings, task.classes)
    if datum.encode() != value:
        raise DatumError("the record has other fields, or another order of fields, than alexprep writes")
    if settings.format == "jpeg" and quantization_tables(datum.data) != _tables_of(settings.quality):
        raise DatumError(f"a JPEG file that was not encoded with quality {settings.quality} of the manifest")
    if not task.decode:
        return datum, None
    shape = datum.height, datum.width
    if settings.format == "ppm":
        return datum, np.frombuffer(datum.data, np.uint8).reshape(shape[0] + 1, shape[1], 3)[1:]
    image = decode_image(datum.data)
    if image.pixels.shape[:2] != shape or image.converted:
        raise DatumError(
            f"decodes to shape {image.pixels.shape}, conversions {image.converted}; "
            f"expected an RGB JPEG of shape {(*shape, 3)} without conversion"
        )
    return datum, image.pixels


def _readable_source(value: bytes) -> str:
    """Return the source path in a record that may be damaged; empty if the path cannot be read."""
    try:
        source = parse_fields(value, len(value) - CRC32_BYTES).get(SOURCE, b"")
    except DatumError:
        return ""
    return name_text(source) if isinstance(source, bytes) else ""

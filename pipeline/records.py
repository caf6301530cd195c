"""Random access to the records of a split by number: zero-copy views of memory-mapped LMDB shards."""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prep.images.jpeg import decode_jpeg
from prep.store.datum import CRC32_BYTES, SOURCE, DatumError, locate_image, parse_fields, verify_checksum
from prep.store.lmdb_shard import ShardReader
from prep.store.manifest import Store, StoreError


class Record(NamedTuple):
    """One stored image and its label. The payload is valid until Records.close is called."""

    payload: npt.NDArray[np.uint8]  # JPEG stores: bytes of the JPEG file, (n,); PPM stores: RGB, (height, width, 3)
    height: int
    width: int
    label: int


class Records:
    """The records of one split, numbered 0..len − 1 across all its shards. Each shard is opened at its first use."""

    def __init__(self, store: Store, split: str) -> None:
        """Raises StoreError if the store has no such split."""
        self.store, self.split = store, split
        self._shards = store.split(split).shards
        self._ends = list(accumulate(shard.records for shard in self._shards))
        self._readers: dict[int, ShardReader] = {}
        self._is_raw, self._side_px = store.settings.format == "ppm", store.settings.side_px

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Record:
        """Record `number`. Raises StoreError with the location of the record if a field is invalid.

        The checksum is not verified here, because verification takes time; find_damage verifies the checksum.
        """
        value = self._value(number)
        try:
            start, end, height, width, label = locate_image(value)
            if not 0 <= label < len(self.store.classes):
                raise DatumError(f"label {label}, the store has {len(self.store.classes):,} classes")
            if self._is_raw:
                start += 3 * width  # skip the PPM header, which has the length of a row of pixels (codec.ppm_header)
                if end - start != 3 * width * height:
                    raise DatumError(f"{end - start:,} bytes of pixels, expected {width}×{height}×3")
            if min(height, width) != self._side_px:
                raise DatumError(f"{width}×{height} px, the shorter side of this store's images is {self._side_px} px")
        except DatumError as error:
            raise StoreError(f"{self.location(number)}: {error}. {self.advice}") from None
        payload = np.frombuffer(value, np.uint8, end - start, start)
        return Record(payload.reshape(height, width, 3) if self._is_raw else payload, height, width, label)

    def location(self, number: int) -> str:
        """Shard folder, key and source file of record `number`, for messages."""
        shard, _ = self._locate(number)
        source = self.source(number)
        suffix = f", source {source}" if source else ""
        return f"{self.store.root / self._shards[shard].path}, key {self.key(number)}{suffix}"

    def key(self, number: int) -> str:
        """The LMDB key of record `number`: 8 digits, unique in its split."""
        shard, index = self._locate(number)
        return self._reader(shard).key(index).decode()

    def source(self, number: int) -> str:
        """The input file of record `number`, relative to the split's input folder; empty if unknown."""
        value = bytes(self._value(number))
        with suppress(DatumError):
            source = parse_fields(value, len(value) - CRC32_BYTES).get(SOURCE)
            if isinstance(source, bytes):
                return source.decode("utf-8", "backslashreplace")
        return ""

    def find_damage(self, number: int) -> str:
        """Describe the damage of record `number`; empty if the record is intact.

        Verifies the checksum and the fields, and that a JPEG decodes to the size stored in the record.
        """
        try:
            verify_checksum(bytes(self._value(number)))
            payload, height, width, _ = self[number]
            if not self._is_raw:
                size = decode_jpeg(payload.tobytes()).shape[:2]
                if size != (height, width):
                    return f"{size[1]}×{size[0]} px, the record gives {width}×{height}"
        except (DatumError, StoreError) as error:
            return str(error)
        except ValueError as error:
            return f"cannot be decoded: {error}"
        return ""

    def close(self) -> None:
        """Unmap all files. Payloads must not be used afterwards, even if they are still referenced."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _value(self, number: int) -> memoryview:
        """The bytes of record `number` as a view of the mapped file."""
        shard, index = self._locate(number)
        return self._reader(shard)[index]

    def _locate(self, number: int) -> tuple[int, int]:
        """Position of record `number`: (index of the shard, index of the record in the shard)."""
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            entry = self._shards[shard]
            self._readers[shard] = ShardReader(self.store.root / entry.path, entry.records, self.advice)
        return self._readers[shard]

    @property
    def advice(self) -> str:
        """The last sentence of a message about a damaged record: the command that checks the store."""
        return f"Check the store with: alexprep verify --store {self.store.root}"

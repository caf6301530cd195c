"""The records of a split by number, as the pictures that a graph is fed with: views of the mapped files."""

from __future__ import annotations

from bisect import bisect_right
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simplejpeg

from prep.store.datum import CRC32_BYTES, SOURCE, DatumError, locate_image, parse_fields, verify_checksum
from prep.store.lmdb_shard import ShardReader
from prep.store.manifest import Store, StoreError


class Record(NamedTuple):
    """One record, until its Records are closed."""

    payload: npt.NDArray[np.uint8]  # a JPEG file's bytes, (n,); of a PPM the pixels, (height, width, 3)
    height: int
    width: int
    label: int


class Records:
    """Random access to a split. Shards are opened when they are first needed."""

    def __init__(self, store: Store, split: str) -> None:
        """Raises StoreError for a split that is not there."""
        self.store, self.split = store, split
        self._shards = store.split(split).shards
        self._ends = list(accumulate(shard.records for shard in self._shards))
        self._readers: dict[int, ShardReader] = {}
        self._raw, self._side_px = store.settings.format == "ppm", store.settings.side_px

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Record:
        """Record `number`, 0..len − 1, in the store's order; raises StoreError naming it where it is damaged."""
        value = self._value(number)
        try:
            start, end, height, width, label = locate_image(value)
            if not 0 <= label < len(self.store.classes):
                raise DatumError(f"label {label}, the store has {len(self.store.classes):,} classes")
            if self._raw:
                start += 3 * width  # the header fills one row (prep.images.codec.ppm_header)
                if end - start != 3 * width * height:
                    raise DatumError(f"{end - start:,} bytes of pixels, expected {width}×{height}×3")
            if min(height, width) != self._side_px:
                raise DatumError(f"{width}×{height} px, the shorter side of this store's pictures is {self._side_px}")
        except DatumError as error:
            raise StoreError(f"{self.location(number)}: {error}. {self.advice}") from None
        picture = np.frombuffer(value, np.uint8, end - start, start)
        return Record(picture.reshape(height, width, 3) if self._raw else picture, height, width, label)

    def location(self, number: int) -> str:
        """Where record `number` lies and where it came from: shard, key and source path."""
        shard, _ = self._locate(number)
        source = self.source(number)
        made_of = f", made of {source}" if source else ""
        return f"{self.store.root / self._shards[shard].path}, key {self.key(number)}{made_of}"

    def key(self, number: int) -> str:
        """The key of record `number`: 8 digits, its own in the whole split."""
        shard, place = self._locate(number)
        return self._reader(shard).key(place).decode()

    def source(self, number: int) -> str:
        """The path of the photograph that record `number` was made of, in its source; empty where it is not told."""
        value = bytes(self._value(number))
        with suppress(DatumError):
            source = parse_fields(value, len(value) - CRC32_BYTES).get(SOURCE)
            if isinstance(source, bytes):
                return source.decode("utf-8", "backslashreplace")
        return ""

    def find_damage(self, number: int) -> str:
        """Why record `number` cannot be what was written: checksum, fields, or a JPEG that cannot be decoded or has
        another size. Empty where nothing is wrong with it.
        """
        try:
            verify_checksum(bytes(self._value(number)))
            picture, height, width, _ = self[number]
            if not self._raw:
                size = simplejpeg.decode_jpeg(picture.tobytes(), "RGB", strict=True).shape[:2]
                if size != (height, width):
                    return f"{size[1]}×{size[0]} px, the record says {width}×{height}"
        except (DatumError, StoreError) as error:
            return str(error)
        except ValueError as error:
            return f"cannot be decoded: {error}"
        return ""

    def close(self) -> None:
        """Unmap all files: pictures that are still held must not be used again."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def _value(self, number: int) -> memoryview:
        shard, place = self._locate(number)
        return self._reader(shard)[place]

    def _locate(self, number: int) -> tuple[int, int]:
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            told = self._shards[shard]
            self._readers[shard] = ShardReader(self.store.root / told.path, told.records, self.advice)
        return self._readers[shard]

    @property
    def advice(self) -> str:
        """What to do about a damaged record."""
        return f"This checks the store: alexprep verify --store {self.store.root}"

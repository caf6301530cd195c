"""Random access to the records of a split by record number, as zero-copy views of memory-mapped LMDB shards.

A store is not trusted. Before a record is used, its fields are compared with each other, with the manifest and with the
header of its image. If the argument `check` of Records is True, the checksum of the record is also verified.
"""

from __future__ import annotations

import ctypes
import threading
from bisect import bisect_right
from collections.abc import Mapping
from contextlib import suppress
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prep.images.jpeg import check_jpeg, decode_jpeg, file_kind
from prep.store import kernels
from prep.store.datum import CRC32_BYTES, SOURCE, DatumError, locate_image, parse_fields, verify_checksum
from prep.store.extra import Column, ColumnsOfSplit
from prep.store.lmdb_shard import ShardReader
from prep.store.manifest import ExtraField, Store, StoreError

# Default of the argument `check` of Records, by the format of the records. Verifying the checksum of a record takes
# less than 1 % of the time that decoding a JPEG file takes, but 20 % of the time that cropping a raw image takes.
CHECK_BY_DEFAULT = {"jpeg": True, "ppm": False}
_MAX_SIDE_PX = 2**31 - 1
_READ_ONLY = 0x100  # PyBUF_READ
_view = ctypes.pythonapi.PyMemoryView_FromMemory
_view.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_view.restype = ctypes.py_object


class Record(NamedTuple):
    """One stored image and its label. The payload is valid until Records.close is called."""

    payload: npt.NDArray[np.uint8]  # JPEG stores: bytes of the JPEG file, (n,); PPM stores: RGB, (height, width, 3)
    height: int
    width: int
    label: int


class RecordBatch(NamedTuple):
    """N records as arrays.

    Addresses that point into mapped files are valid until Records.close is called. The other addresses point into
    `memory`, and are valid while `memory` exists.
    """

    numbers: npt.NDArray[np.int64]  # (N,): numbers of the records in their split
    labels: npt.NDArray[np.int64]  # (N,)
    sizes: npt.NDArray[np.int32]  # (N, 2): height and width of the images in px
    # (N,): addresses of the payloads. In JPEG stores, these are the addresses of the JPEG files. In PPM stores, these
    # are the addresses of the first pixels.
    addresses: npt.NDArray[np.uint64]
    payload_bytes: npt.NDArray[np.int64]  # (N,): sizes of the payloads in bytes
    is_raw: bool  # True for PPM stores
    memory: object = None  # arrays with the payloads that are not in mapped files
    sources: tuple[str, ...] = ()  # (N,): source paths sent by a service; empty if no service sent any
    # Values of the extra fields, by name, sent by a service; empty if no service sent any.
    extra: Mapping[str, Column] = {}

    def payloads(self) -> list[npt.NDArray[np.uint8]]:
        """Return the payloads without copies.

        A payload has the shape (n,) for a JPEG file, and (height, width, 3) for a raw record.
        """
        parts = zip(self.addresses.tolist(), self.payload_bytes.tolist(), strict=True)
        payloads = [np.frombuffer(_view(address, size, _READ_ONLY), np.uint8) for address, size in parts]
        if not self.is_raw:
            return payloads
        sizes = self.sizes.tolist()
        return [payload.reshape(*size, 3) for payload, size in zip(payloads, sizes, strict=True)]


class Records:
    """The records of one split. The records of all shards together have the numbers 0..len − 1.

    Each shard is opened when it is first used.
    """

    def __init__(self, store: Store, split: str, check: bool | None = None) -> None:
        """Raises StoreError if the store has no such split.

        If `check` is True, the checksum of each record is verified when the record is read. If `check` is None, the
        value of CHECK_BY_DEFAULT is used.
        """
        self.store, self.split = store, split
        self.check = CHECK_BY_DEFAULT[store.settings.format] if check is None else check
        self._shards = store.split(split).shards
        self._ends = list(accumulate(shard.records for shard in self._shards))
        self._readers: dict[int, ShardReader] = {}
        self._size_checks = 0  # number of calls of check_maps that have compared a file size
        self._is_raw, self._side_px = store.settings.format == "ppm", store.settings.side_px
        self._last_numbers = np.array(self._ends, np.int64) - 1  # (S,): number of the last record of each shard
        self._clear_index()
        self._lock = threading.Lock()
        self._columns = ColumnsOfSplit(store, split)

    def __reduce__(self) -> tuple[type[Records], tuple[Store, str, bool]]:
        """Let a pickled copy, for example in a spawned process, open the files again."""
        return Records, (self.store, self.split, self.check)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Record:
        """Return record `number`. Raises StoreError with the location of the record if the record is not valid.

        The image is not decoded.
        """
        value = self._value(number)
        try:
            start, end, height, width, label = locate_image(value)
            self._check_label(label)
            # A PPM header has as many bytes as one row of pixels (codec.ppm_header).
            header_bytes = 3 * width if self._is_raw else 0
            if self._is_raw and end - start - header_bytes != 3 * width * height:
                raise DatumError(f"{end - start - header_bytes:,} bytes of pixels, expected {width}×{height}×3")
            if fault := self.store.settings.size_fault(height, width):
                raise DatumError(fault)
            if self.check:
                verify_checksum(value)
            content = value[start:end]
            if self._is_raw:
                from prep.images.codec import ppm_header  # loads Pillow, which --help must not load

                if content[:header_bytes] != ppm_header(height, width):
                    raise DatumError(f"{file_kind(content)}, expected a PPM file whose header fills one row")
            elif reason := check_jpeg(content, height, width):
                raise DatumError(reason)
        except DatumError as error:
            self.check_maps()
            raise StoreError(f"{self.location(number)}: {error}. {self.advice}") from None
        payload = np.frombuffer(value, np.uint8, end - start - header_bytes, start + header_bytes)
        return Record(payload.reshape(height, width, 3) if self._is_raw else payload, height, width, label)

    def pixels(self, number: int) -> npt.NDArray[np.uint8]:
        """Return the decoded image of record `number`: a new array, uint8 RGB (height, width, 3).

        Raises StoreError with the location of the record if the record is damaged.
        """
        pixels = self[number].payload
        if self._is_raw:
            pixels = pixels.copy()
        else:
            try:
                pixels = decode_jpeg(pixels.tobytes())
            except ValueError as error:
                self.check_maps()
                raise StoreError(f"{self.location(number)}: cannot be decoded: {error}. {self.advice}") from None
        self.check_maps()
        return pixels

    def label(self, number: int) -> int:
        """Return the label of record `number`. Raises StoreError if the record has no valid label.

        The image of the record is not read.
        """
        try:
            label = locate_image(self._value(number)).label
            self._check_label(label)
        except DatumError as error:
            self.check_maps()
            raise StoreError(f"{self.location(number)}: {error}. {self.advice}") from None
        self.check_maps()
        return label

    def _check_label(self, label: int) -> None:
        if label >= len(self.store.classes):
            raise DatumError(f"label {label}, the store has {len(self.store.classes):,} classes")

    def batch(self, numbers: npt.NDArray[np.int64]) -> RecordBatch:
        """Return the records `numbers` (N,), in this order.

        If records are damaged, raises the StoreError that `self[number]` raises for the first of these records.

        If the C library is available, one call of the library, which does not hold the GIL, finds and checks all
        records. NumPy then compares the sizes and labels of the records with the manifest. If the library does not find
        a record, or if the fields of a record are not valid, the record is read with `self[number]`, whose error gives
        the reason. Without the C library, every record is read with `self[number]`.
        """
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"records {numbers.min()} to {numbers.max()}: expected 0 to {len(self) - 1}")
        count = len(numbers)
        found = np.zeros(count, kernels.FOUND_DTYPE)
        if kernels.native is not None:
            shard_of = np.searchsorted(self._last_numbers, numbers)
            if not self._is_indexed[shard_of].all():
                self._index_shards(np.unique(shard_of).tolist())
            kernels.native.renew_protection()
            format = self.store.settings.format
            found = kernels.native.find_records(self._maps, shard_of, self._key_numbers[numbers], format, self.check)
        height, width, size = found["height"], found["width"], found["bytes"]
        labels = np.ascontiguousarray(found["label"])
        valid = (found["image"] != 0) & (np.minimum(height, width) == self._side_px)
        most_px = _MAX_SIDE_PX if self.store.settings.keep_aspect else self._side_px
        valid &= (labels < len(self.store.classes)) & (np.maximum(height, width) <= most_px)
        # sizes of the PPM headers (see __getitem__)
        header_bytes = 3 * width if self._is_raw else np.zeros(count, np.int64)
        if self._is_raw:
            valid &= size - header_bytes == 3 * width * height
        sizes = np.stack([height, width], axis=1).astype(np.int32)
        addresses, payload_bytes = found["image"] + header_bytes.astype(np.uint64), size - header_bytes
        memory = []
        for k in np.flatnonzero(~valid).tolist():
            payload, *size_px, labels[k] = self[int(numbers[k])]
            sizes[k], addresses[k], payload_bytes[k] = size_px, payload.ctypes.data, payload.size
            memory.append(payload)  # keeps the bytes of a file that is not mapped
        self.check_maps()
        return RecordBatch(numbers, labels, sizes, addresses, payload_bytes, self._is_raw, memory)

    def check_maps(self) -> None:
        """Raise ShardBroken, which is a StoreError, if a mapped file was truncated or one of its pages cannot be read.

        Bytes that cannot be read appear as zeros. A caller must therefore call check_maps after it has used the
        payloads of a batch.

        If a file was truncated within a page, the rest of this page appears as zeros without a SIGBUS. Each call
        therefore also compares the present size of one file with the mapped size. Comparing all files in each call
        would take too long, so successive calls take the files in turn.
        """
        readers = list(self._readers.values())  # a copy, because other threads open shards
        if kernels.native is None or not readers:
            return
        if kernels.native.broken_pages:
            for reader in readers:
                reader.check_map()
        self._size_checks += 1
        readers[self._size_checks % len(readers)].check_size()

    def location(self, number: int) -> str:
        """Return the shard folder, key and source file of record `number`, for messages."""
        shard, _ = self._locate(number)
        source = self.source(number)
        suffix = f", source {source}" if source else ""
        return f"{self.store.root / self._shards[shard].path}, key {self.key(number)}{suffix}"

    def key(self, number: int) -> str:
        """Return the LMDB key of record `number`: 8 digits, unique in the split."""
        shard, index = self._locate(number)
        return self._reader(shard).key(index).decode()

    def source(self, number: int) -> str:
        """Return the path of the input file of record `number`, relative to the split's input folder; empty if unknown.

        Raises ShardBroken, which is a StoreError, if the record cannot be read from the disk.
        """
        value = bytes(self._value(number))
        self.check_maps()
        with suppress(DatumError):
            source = parse_fields(value, len(value) - CRC32_BYTES).get(SOURCE)
            if isinstance(source, bytes):
                return source.decode("utf-8", "backslashreplace")
        return ""

    @property
    def extra_fields(self) -> Mapping[str, ExtraField]:
        """The extra fields of the records, by name."""
        return self._columns.fields

    def extra(self, numbers: npt.NDArray[np.int64]) -> dict[str, Column]:
        """Return the values of the extra fields of the records `numbers` (N,), by name of the field.

        The first call compares the files that hold these values with their digests in the manifest. Raises StoreError
        for a damaged file.
        """
        return self._columns.take(numbers)

    def find_damage(self, number: int) -> str:
        """Return a description of the damage of record `number`; empty if the record is intact.

        Checks the checksum and the fields of the record. In a JPEG store, also decodes the image, and compares its
        height and width with the fields.
        """
        try:
            verify_checksum(self._value(number))
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
        """Unmap all files. After this call, payloads must not be used, even if they are still referenced."""
        with self._lock:
            for reader in self._readers.values():
                reader.close()
            self._readers.clear()
            self._clear_index()
        self._columns.close()

    def _clear_index(self) -> None:
        shards, records = len(self._shards), len(self)
        self._is_indexed = np.zeros(shards, np.bool_)
        self._maps = np.zeros(shards, kernels.SHARD_DTYPE)  # the memory maps of the shards, for the C library
        self._key_numbers = np.empty(records, np.int64)  # the keys of the records of all shards, as numbers

    def _index_shards(self, shards: list[int]) -> None:
        """Open and map the shards that `batch` needs."""
        for shard in shards:
            reader = self._reader(shard)
            with self._lock:
                if not self._is_indexed[shard]:
                    end, count = self._ends[shard], self._shards[shard].records
                    self._maps[shard] = reader.map_entry()
                    self._key_numbers[end - count : end] = reader.key_numbers(np.arange(count))
                    self._is_indexed[shard] = True

    def _value(self, number: int) -> memoryview:
        """Return the bytes of record `number`: a view of the mapped file, or a copy if the file is not mapped."""
        shard, index = self._locate(number)
        return self._reader(shard)[index]

    def _locate(self, number: int) -> tuple[int, int]:
        """Return the position of record `number`: (index of the shard, index of the record in the shard)."""
        shard = bisect_right(self._ends, number)
        return shard, number - (self._ends[shard - 1] if shard else 0)

    def _reader(self, shard: int) -> ShardReader:
        reader = self._readers.get(shard)
        if reader is None:
            with self._lock:
                if shard not in self._readers:
                    entry = self._shards[shard]
                    self._readers[shard] = ShardReader(self.store.root / entry.path, entry.records, self.advice)
                reader = self._readers[shard]
        return reader

    @property
    def advice(self) -> str:
        """Return the last sentence of a message about a damaged record: the command that checks the store."""
        return f"Check the store with: alexprep verify --store {self.store.root}"

"""Writes a shard of a split in the order of its keys, and reads a shard sequentially or by index.

A shard is a folder with one LMDB. LMDB sorts keys by their bytes. Keys are 8 decimal digits, so that this order is the
numeric order. The main database holds only Datums, because DALI reads the value of every key as a record. The digest of
a shard is SHA-256 over its records in order. For each record, the digest covers the key, the length of the value
(8 bytes, little-endian) and the value.

The lmdb library writes the files. prep.store.lmdb_file reads the files, because the library does not check what it
reads.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from prep.store import kernels
from prep.store.guarded_map import GuardedMap
from prep.store.lmdb_file import DATA_FILE, LmdbFile, LmdbPages, broken_error, open_data_file
from prep.store.manifest import StoreError

_COMMIT_BYTES = 64_000_000
_FIRST_MAP_BYTES = 64 << 20
_KEY_DIGITS = 8


def record_key(index: int) -> bytes:
    """Return the key of record `index` of a split, such as b"00000017" for 17."""
    return b"%08d" % index


def write(folder: Path, records: Iterable[tuple[bytes, bytes]]) -> tuple[int, int, str]:
    """Write (key, value) pairs, in ascending order of keys, to a new LMDB.

    Returns (number of records, size of all values in bytes, digest of the shard). The file is synced before the
    function returns. When the memory map is full, its size is doubled, so the caller need not give a size. The file
    grows only by the pages that are written. Raises lmdb.Error or OSError if the disk is full.
    """
    digest, count, size = hashlib.sha256(), 0, 0
    folder.mkdir(parents=True)
    with lmdb.open(os.fsencode(folder), map_size=_FIRST_MAP_BYTES, subdir=True, lock=False) as env:
        pending: list[tuple[bytes, bytes]] = []
        pending_bytes = 0
        for key, value in records:
            digest.update(key + len(value).to_bytes(8, "little"))
            digest.update(value)
            count, size = count + 1, size + len(value)
            pending.append((key, value))
            pending_bytes += len(value)
            if pending_bytes >= _COMMIT_BYTES:
                _commit(env, pending)
                pending, pending_bytes = [], 0
        _commit(env, pending)
        env.sync(True)
    with suppress(FileNotFoundError):
        (folder / "lock.mdb").unlink()
    return count, size, digest.hexdigest()


def _commit(env: lmdb.Environment, records: list[tuple[bytes, bytes]]) -> None:
    """Write `records` in one transaction. If the memory map is too small, double it and try again."""
    while True:
        try:
            with env.begin(write=True) as txn:
                for key, value in records:
                    txn.put(key, value, append=True)
            return
        except lmdb.MapFullError:
            env.set_mapsize(env.info()["map_size"] * 2)


def read(folder: Path, advice: str = "Build the store again.") -> Iterator[tuple[bytes, bytes]]:
    """Yield the (key, value) pairs in order.

    Raises StoreError, with `advice` in its message, if the LMDB is damaged. Raises ShardBroken, which is a StoreError,
    if the file is truncated or becomes unreadable during the iteration.
    """
    with LmdbFile(folder, advice) as file:
        yield from file.pages.items()


class ShardReader:
    """Random access to the records of one shard by index, from 0 to records − 1.

    If the compiled kernels.c can be used, the file is mapped into memory, and a record is a view of the map, without a
    copy. Otherwise, records are read with system calls, because nothing would protect a map: SIGBUS would end the
    process if the mapped file were truncated.

    Raises StoreError, with `advice` in its message, if the LMDB is damaged or does not have `records` records.
    """

    def __init__(self, folder: Path, records: int, advice: str = "Check the store with: alexprep verify") -> None:
        self.folder, self._advice = folder, advice
        self._path = os.path.join(folder, DATA_FILE)
        self._map: GuardedMap | None = None
        self._inode = (0, 0)  # device and inode of the mapped file
        self._file: LmdbFile | None = None
        # The keys as numbers and as bytes. Both stay None if the keys are consecutive numbers.
        self._numbers: npt.NDArray[np.int64] | None = None
        self._keys: list[bytes] | None = None
        try:
            self._pages = self._open()
            entries = self._pages.tree.entries
            if entries != records:
                raise StoreError(f"{folder}: {entries:,} records, the manifest says {records:,}. {advice}")
            first, last = self._pages.edge_key(last=False), self._pages.edge_key(last=True)
            self._first = int(first) if first.isdigit() and len(first) == _KEY_DIGITS else 0
            # The keys are not consecutive numbers if inputs were left out.
            if last != record_key(self._first + records - 1):
                self._keys = [key for key, _ in self._pages.items(with_values=False)]
        except BaseException:
            try:
                self.check_map()
            finally:
                self.close()
            raise

    def key(self, index: int) -> bytes:
        """Return the key of the record at `index`."""
        return record_key(self._first + index) if self._keys is None else self._keys[index]

    def __getitem__(self, index: int) -> memoryview:
        """Return the record's bytes, which are valid until `close`.

        After the bytes of a record were used, call `check_map`, because bytes that could not be read from the disk
        appear as zeros.
        """
        if self._map is not None:
            self._map.renew_protection()
        try:
            value = self._pages.get(self.key(index))
        except StoreError:
            self.check_map()
            raise
        if value is None:
            self.check_map()
            raise StoreError(f"{self.folder}: there is no key {self.key(index).decode()}. {self._advice}")
        return memoryview(value)

    def key_numbers(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the keys (N,) of the records at `indices` (N,), as numbers; −1 for a key that is not 8 digits."""
        if self._keys is None:
            return indices + self._first
        if self._numbers is None:
            numbers = [int(key) if key.isdigit() and len(key) == _KEY_DIGITS else -1 for key in self._keys]
            self._numbers = np.array(numbers, np.int64)
        return self._numbers[indices]

    def map_entry(self) -> tuple[int, int, int, int]:
        """Return the values of one item of kernels.SHARD_DTYPE, for kernels.NativeKernels.find_records.

        The last value is the root of the tree. The root is −1 if the file is not mapped.
        """
        tree = self._pages.tree
        if self._map is None:
            return 0, 0, tree.page_bytes, -1
        return self._map.address, self._map.size, tree.page_bytes, tree.root

    def check_map(self) -> None:
        """Raise ShardBroken if a page of the memory map could not be read since the shard was opened.

        Bytes of such a page are zeros (see kernels.c).
        """
        if self._map is not None and self._map.is_broken():
            raise broken_error(self.folder, self._map.size, self._advice)

    def check_size(self) -> None:
        """Raise ShardBroken if the mapped file is shorter now than it was when the shard was opened.

        The map stays complete if the file was removed, or if another file has replaced it.
        """
        if self._map is None:
            return
        with suppress(OSError):
            now = os.stat(self._path)
            if (now.st_dev, now.st_ino) == self._inode and now.st_size < self._map.size:
                raise broken_error(self.folder, self._map.size, self._advice)

    def close(self) -> None:
        """Unmap or close the file. After this call, views of records must not be used. A second call has no effect."""
        if self._map is not None:
            self._map.close()
        if self._file is not None:
            self._file.close()

    def _open(self) -> LmdbPages:
        """Map the file, or open the file if it cannot be mapped."""
        if kernels.native is not None:
            with open_data_file(self.folder, self._advice) as file:
                status = os.fstat(file.fileno())
                size, self._inode = status.st_size, (status.st_dev, status.st_ino)
                self._map = GuardedMap.of(file.fileno(), size, kernels.native)
            if self._map is not None:
                view = self._map.view
                return LmdbPages(self.folder, lambda offset, count: view[offset : offset + count], size, self._advice)
        self._file = LmdbFile(self.folder, self._advice)
        return self._file.pages

"""One shard of a split, an LMDB folder: written once in key order, then read sequentially or by index.

LMDB sorts keys by their bytes. Keys are 8 decimal digits, so that this order is the numeric order. The main database
holds only Datums, because DALI takes the value of every key for a record. The digest of a shard is SHA-256 over its
records in order. For each record, the digest covers the key, the length of the value (8 bytes, little-endian) and the
value.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from prep.store import kernels
from prep.store.manifest import StoreError

_COMMIT_BYTES = 64_000_000
_FIRST_MAP_BYTES = 64 << 20


def record_key(index: int) -> bytes:
    """Return the key of record `index` of a split: b"00000017"."""
    return b"%08d" % index


def write(folder: Path, records: Iterable[tuple[bytes, bytes]]) -> tuple[int, int, str]:
    """Write (key, value) pairs, in ascending order of keys, to a new LMDB.

    Returns (number of records, bytes of all values, digest). The file is synced before the function returns. When the
    memory map is full, its size is doubled, so the caller need not give a size. The file grows only by the pages that
    are written. Raises lmdb.Error or OSError if the disk is full.
    """
    digest, count, size = hashlib.sha256(), 0, 0
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=_FIRST_MAP_BYTES, subdir=True, lock=False) as env:
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

    Raises StoreError, with `advice` in its message, if the LMDB is damaged.
    """
    with _opened(folder, advice) as env, env.begin(buffers=False) as txn:
        count, expected = 0, txn.stat()["entries"]  # DALI expects this number of records
        for item in txn.cursor():
            count += 1
            if count > expected:
                break  # damaged pages can form a cycle, in which the cursor would never end
            yield item
        if count != expected:
            more = "more than " if count > expected else ""
            raise StoreError(
                f"{folder}: {more}{min(count, expected):,} records, the LMDB header says {expected:,}. {advice}"
            )


class ShardReader:
    """Random access to the records of one shard by index, from 0 to records − 1.

    A record is returned as a view of the memory-mapped file, without a copy. Raises StoreError, with `advice` in its
    message, if the LMDB is damaged or does not have `records` records.
    """

    def __init__(self, folder: Path, records: int, advice: str = "Check the store with: alexprep verify") -> None:
        self.folder, self._advice = folder, advice
        self._resources = ExitStack()
        self._map: tuple[int, int, int, int] | None = None
        # The keys as numbers, if some numbers are missing from the keys.
        self._numbers: npt.NDArray[np.int64] | None = None
        with _lmdb_errors_as_store_errors(folder, advice):
            env = self._resources.enter_context(_opened(folder, advice))
            self._txn = self._resources.enter_context(env.begin(buffers=True))
            entries = self._txn.stat()["entries"]
            if entries != records:
                self.close()
                raise StoreError(f"{folder}: {entries:,} records, the manifest says {records:,}. {advice}")
            with self._txn.cursor() as cursor:
                first = bytes(cursor.key()) if cursor.first() else b""
                last = bytes(cursor.key()) if cursor.last() else b""
                self._first = int(first) if first.isdigit() else 0
                self._keys: list[bytes] | None = None
                # Numbers are missing from the keys if inputs were left out.
                if last != record_key(self._first + records - 1):
                    cursor.first()
                    self._keys = [bytes(key) for key in islice(cursor.iternext(values=False), records)]

    def key(self, index: int) -> bytes:
        """Return the key of the record at `index`."""
        return record_key(self._first + index) if self._keys is None else self._keys[index]

    def __getitem__(self, index: int) -> memoryview:
        """Return the record's bytes, which are valid until `close`.

        py-lmdb reads from the disk without holding the GIL.
        """
        with _lmdb_errors_as_store_errors(self.folder, self._advice):
            value: memoryview | None = self._txn.get(self.key(index))
        if value is None:
            raise StoreError(f"{self.folder}: there is no key {self.key(index).decode()}. {self._advice}")
        return value

    def key_numbers(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the keys (N,) of the records at `indices` (N,), as numbers."""
        if self._keys is None:
            return indices + self._first
        if self._numbers is None:
            self._numbers = np.array([int(key) if key.isdigit() else -1 for key in self._keys], np.int64)
        return self._numbers[indices]

    def map_file(self) -> tuple[int, int, int, int]:
        """Map the file for kernels.NativeKernels.find_records. Returns the values of one item of kernels.SHARD_DTYPE.

        This memory map is separate from the map of py-lmdb, whose address is not public. `close` unmaps the file. The
        last value is the root of the tree. The root is −1 if kernels.c cannot search the file.
        """
        if self._map is None:
            page_bytes = self._txn.stat()["psize"]
            with open(self.folder / "data.mdb", "rb") as file:
                tree = kernels.find_tree(file.read(2 * page_bytes), page_bytes, self._txn.id())
                size = os.fstat(file.fileno()).st_size
                address = None if tree is None else _map(file.fileno(), size)
            if address is not None and tree is not None:
                self._resources.callback(_unmap, address, size)
                self._map = address, size, page_bytes, tree.root
            else:
                self._map = 0, 0, page_bytes, -1
        return self._map

    def close(self) -> None:
        """Unmap the file. After this call, views of records must not be used."""
        self._map = None
        self._resources.close()


_libc = ctypes.CDLL(None)
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _map(descriptor: int, size: int) -> int | None:
    """Map a file for reading, and return the address of the map, or None if the file cannot be mapped.

    Python's mmap would keep a descriptor open.
    """
    address: int | None = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    return None if address == ctypes.c_void_p(-1).value else address


def _unmap(address: int, size: int) -> None:
    _libc.munmap(address, size)


_lock = threading.Lock()


def _renew_lock() -> None:
    """Replace the lock in a forked child.

    A thread of the parent may hold the lock, and would never release it in the child.
    """
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)
_environments: dict[str, tuple[lmdb.Environment, int]] = {}  # real path -> (environment, number of users)


@contextmanager
def _opened(folder: Path, advice: str) -> Iterator[lmdb.Environment]:
    """Open the LMDB environment of `folder`, or share the environment that this process has already opened.

    The environment is shared because LMDB forbids opening a file twice in a process.

    LMDB maps the file without checking it. Reading past the end of a truncated file kills the process (SIGBUS). Before
    any other page is read, the size of the file is therefore compared with the page count in its header.
    """
    with _lmdb_errors_as_store_errors(folder, advice):
        path = os.path.realpath(folder)
        with _lock:
            if path not in _environments:
                env = lmdb.open(path, readonly=True, lock=False, subdir=True, max_spare_txns=0)
                expected_bytes = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
                file_bytes = os.stat(f"{path}/data.mdb").st_size
                if file_bytes < expected_bytes:
                    env.close()
                    raise StoreError(
                        f"{folder}: data.mdb has {file_bytes:,} bytes, expected {expected_bytes:,}. {advice}"
                    )
                _environments[path] = env, 0
            env, users = _environments[path]
            _environments[path] = env, users + 1
        try:
            yield env
        finally:
            with _lock:
                env, users = _environments.pop(path)
                if users > 1:
                    _environments[path] = env, users - 1
                else:
                    env.close()


@contextmanager
def _lmdb_errors_as_store_errors(folder: Path, advice: str) -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise StoreError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}. {advice}") from None

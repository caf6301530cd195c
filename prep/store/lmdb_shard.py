"""One LMDB folder of records: written once in key order, read often.

Keys are 8 decimal digits, so that the B-tree's byte order is the number's. The main database holds Datums and nothing
else, for DALI takes every key for a record. The digest is SHA-256 over each record's key, its length (8 bytes,
little-endian) and its value, in order.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import islice
from pathlib import Path

import lmdb

from prep.store.manifest import StoreError

_COMMIT_BYTES = 64_000_000
_FIRST_MAP_BYTES = 64 << 20


def record_key(index: int) -> bytes:
    """The key of record `index` of a split."""
    return b"%08d" % index


def write(folder: Path, records: Iterable[tuple[bytes, bytes]]) -> tuple[int, int, str]:
    """Write (key, value) pairs, in ascending order of keys, to a new LMDB; returns records, bytes of values, digest.

    Synced when it returns. The map grows by doubling as needed: no size to choose, and no file larger than its
    contents. Raises lmdb.Error or OSError where the disk is full.
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
    """One transaction; a map that is too small kills it, so it is given again to one twice as large."""
    while True:
        try:
            with env.begin(write=True) as txn:
                for key, value in records:
                    txn.put(key, value, append=True)
            return
        except lmdb.MapFullError:
            env.set_mapsize(env.info()["map_size"] * 2)


def read(folder: Path, mend: str = "Build the store again.") -> Iterator[tuple[bytes, bytes]]:
    """Every (key, value) in order; raises StoreError where the LMDB is damaged."""
    with _opened(folder, mend) as env, env.begin(buffers=False) as txn:
        count, said = 0, txn.stat()["entries"]  # which DALI takes for the number of records
        for item in txn.cursor():
            count += 1
            if count > said:
                break  # pages that lead to themselves never end
            yield item
        if count != said:
            more = "more than " if count > said else ""
            raise StoreError(f"{folder}: {more}{min(count, said):,} records, its header says {said:,}. {mend}")


class ShardReader:
    """The records of one shard by their place, 0..records − 1: views of the mapped file, nothing copied.

    Raises StoreError where the LMDB is damaged, or has not the `records` that it should.
    """

    def __init__(self, folder: Path, records: int, mend: str = "Look closer with: alexprep verify") -> None:
        self.folder, self._mend = folder, mend
        self._held = ExitStack()
        with _as_store_error(folder, mend):
            env = self._held.enter_context(_opened(folder, mend))
            self._txn = self._held.enter_context(env.begin(buffers=True))
            found = self._txn.stat()["entries"]
            if found != records:
                self.close()
                raise StoreError(f"{folder}: {found:,} records, the manifest says {records:,}. {mend}")
            with self._txn.cursor() as cursor:
                first = bytes(cursor.key()) if cursor.first() else b""
                last = bytes(cursor.key()) if cursor.last() else b""
                self._first = int(first) if first.isdigit() else 0
                self._keys: list[bytes] | None = None
                if last != record_key(
                    self._first + records - 1
                ):  # inputs were left out: their keys are not given again
                    cursor.first()
                    self._keys = [bytes(key) for key in islice(cursor.iternext(values=False), records)]

    def key(self, place: int) -> bytes:
        """The key of the record at `place`."""
        return record_key(self._first + place) if self._keys is None else self._keys[place]

    def __getitem__(self, place: int) -> memoryview:
        """The record's bytes, valid until `close`. Its pages are touched while other threads run."""
        with _as_store_error(self.folder, self._mend):
            value: memoryview | None = self._txn.get(self.key(place))
        if value is None:
            raise StoreError(f"{self.folder}: there is no key {self.key(place).decode()}. {self._mend}")
        return value

    def close(self) -> None:
        """Unmap the file: views that are still held must not be used again."""
        self._held.close()


_lock = threading.Lock()
_environments: dict[str, tuple[lmdb.Environment, int]] = {}  # by real path, with the number of users


@contextmanager
def _opened(folder: Path, mend: str) -> Iterator[lmdb.Environment]:
    """The LMDB at `folder`, opened once in a process however many use it (LMDB's own rule).

    LMDB maps its file and trusts it: reading past the end of one that was cut short kills the process. So its length is
    held against the number of pages that its header promises, before any is touched.
    """
    with _as_store_error(folder, mend):
        path = os.path.realpath(folder)
        with _lock:
            if path not in _environments:
                env = lmdb.open(path, readonly=True, lock=False, subdir=True, max_spare_txns=0)
                promised, found = (
                    (env.info()["last_pgno"] + 1) * env.stat()["psize"],
                    os.stat(f"{path}/data.mdb").st_size,
                )
                if found < promised:
                    env.close()
                    raise StoreError(f"{folder}: data.mdb has {found:,} bytes, expected {promised:,}. {mend}")
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
def _as_store_error(folder: Path, mend: str) -> Iterator[None]:
    try:
        yield
    except lmdb.Error as error:
        raise StoreError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}. {mend}") from None

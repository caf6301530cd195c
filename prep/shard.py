"""One LMDB folder of records: written once in key order, read often.

Keys are 8 decimal digits, so that the B-tree's byte order is the number's. The main database holds Datums and nothing
else, for DALI takes every key for a record. The digest is SHA-256 over each record's key, its length (8 bytes,
little-endian) and its value, in order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import lmdb

from prep.manifest import StoreError

_COMMIT_BYTES = 64_000_000
_FIRST_MAP_BYTES = 64 << 20


def key_of(index: int) -> bytes:
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
    """Every (key, value) in order; raises StoreError where the LMDB is damaged.

    LMDB maps its file and trusts it: reading past the end of one that was cut short kills the process. So its length is
    held against the number of pages that its header promises, before any is touched.
    """
    try:
        with lmdb.open(str(folder), readonly=True, lock=False, subdir=True) as env:
            promised, found = (env.info()["last_pgno"] + 1) * env.stat()["psize"], (folder / "data.mdb").stat().st_size
            if found < promised:
                raise StoreError(f"{folder}: data.mdb has {found:,} bytes, expected {promised:,}. {mend}")
            with env.begin(buffers=False) as txn:
                count, said = 0, txn.stat()["entries"]  # which DALI takes for the number of records
                for item in txn.cursor():
                    count += 1
                    if count > said:
                        break  # pages that lead to themselves never end
                    yield item
                if count != said:
                    more = "more than " if count > said else ""
                    raise StoreError(f"{folder}: {more}{min(count, said):,} records, its header says {said:,}. {mend}")
    except lmdb.Error as error:
        raise StoreError(f"{folder}: {str(error).removeprefix(f'{folder}: ')}. {mend}") from None

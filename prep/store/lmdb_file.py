"""Reads LMDB data files (data.mdb) page by page. Every number of the file is checked before it is used.

The lmdb library trusts its files: a damaged page makes the library read outside of its memory map, which can end the
process. This module reads files that LMDB 0.9 (MDB_DATA_VERSION 1) wrote on little-endian machines. A file must have
one database with unique keys, as alexprep and Caffe write it. kernels.py describes the pages. A header page has the
following numbers. In this list, the offset in bytes stands before each number:

    16 magic number   20 version   40 page size   92 flags of the main database   120 number of records
    128 number of the root page of the tree   136 number of the last page   144 number of the transaction
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from prep.schema import open_regular
from prep.store.manifest import StoreError

DATA_FILE = "data.mdb"
MAGIC, VERSION = 0xBEEFC0DE, 1
_MIN_PAGE_BYTES, _MAX_PAGE_BYTES = 512, 65_536
_HEADER = struct.Struct("<10x H 4x II 16x I 48x H 26x Q QQQ")  # 152 bytes; see the docstring of this module
_PAGE_HEADER, _NODE_HEADER = 16, 8
_BRANCH, _LEAF, _META, _PAGE_TYPES, _IN_PAGES = 1, 2, 8, 0x6F, 1
_BROKEN = f"{DATA_FILE} was changed or became unreadable during reading"
_NO_PAGE = 2**64 - 1
_MAX_DEPTH = 32
# Records that state a larger size are refused, because a damaged record can state any size. The largest image that
# prep.images.limits.MAX_RESCALED_PIXELS allows has 300 MB without compression.
_MAX_VALUE_BYTES = 400_000_000

Bytes = bytes | memoryview
ReadAt = Callable[[int, int], Bytes]  # read_at(offset, size); at the end of the file, returns fewer bytes than `size`


class ShardBroken(StoreError):
    """A data.mdb was truncated, or could not be read from the disk, while a command used it."""

    exit_code = 74  # EX_IOERR of sysexits.h


def broken_error(folder: Path, expected_bytes: int, advice: str) -> ShardBroken:
    """Return the error for a data.mdb that had `expected_bytes` when it was opened, and that cannot be read now."""
    try:
        actual_bytes = os.stat(folder / DATA_FILE).st_size
    except OSError as error:
        found = f"now it cannot be found ({error.strerror})"
    else:
        found = f"now it has {actual_bytes:,} bytes, expected {expected_bytes:,}"
        if actual_bytes >= expected_bytes:
            found = f"a page could not be read, although the file has {actual_bytes:,} bytes"
    return ShardBroken(f"{folder}: {_BROKEN}: {found}. {advice}")


def store_error(text: str) -> StoreError:
    """Return the error for a text that another process sent: ShardBroken if the text has _BROKEN, else StoreError."""
    return ShardBroken(text) if _BROKEN in text else StoreError(text)


class Tree(NamedTuple):
    """Size and root of the tree of the main database, from the header page of the last transaction."""

    page_bytes: int
    pages: int  # number of pages of the file that are in use
    root: int  # number of the page at the root; −1 if there are no records
    entries: int  # number of records


class LmdbPages:
    """The records of one data.mdb. The methods raise StoreError, with `advice` in its message, for a damaged file.

    Several threads may use an object at the same time if `read_at` allows calls from several threads.
    """

    def __init__(self, folder: Path, read_at: ReadAt, file_bytes: int, advice: str) -> None:
        """Read the header pages. Raises StoreError if the file is not an LMDB or is shorter than its header states."""
        self.folder, self._read_at, self.file_bytes, self._advice = folder, read_at, file_bytes, advice
        self.tree = self._find_tree()

    def items(self, with_values: bool = True) -> Iterator[tuple[bytes, bytes]]:
        """Yield (key, value) of each record, in the order of the keys. Values are empty if `with_values` is false."""
        count = pages = 0
        stack = [self.tree.root] if self.tree.root >= 0 else []
        while stack:
            pages += 1
            if pages > self.tree.pages or len(stack) > _MAX_DEPTH * self.tree.page_bytes:
                raise self._damaged("the pages of the tree form a cycle")
            page, kind, nodes = self._page(stack.pop())
            if kind == _BRANCH:
                stack += [self._child(page, node) for node in reversed(nodes)]
                continue
            for node in nodes:
                count += 1
                if count > self.tree.entries:
                    raise self._damaged(f"more records than {self.tree.entries:,}, the number in the LMDB header")
                yield self._key(page, node), bytes(self._value(page, node)) if with_values else b""
        if count != self.tree.entries:
            raise self._damaged(f"{count:,} records, the LMDB header says {self.tree.entries:,}")

    def get(self, key: bytes) -> Bytes | None:
        """Return the value of a key, or None if there is no such key."""
        number = self.tree.root
        for _ in range(_MAX_DEPTH if number >= 0 else 0):
            page, kind, nodes = self._page(number)
            first, end = 0, len(nodes)
            while end - first > 1:
                middle = (first + end) // 2
                if self._key(page, nodes[middle]) > key:
                    end = middle
                else:
                    first = middle
            if kind == _LEAF:
                return self._value(page, nodes[first]) if self._key(page, nodes[first]) == key else None
            number = self._child(page, nodes[first])
        return None

    def edge_key(self, last: bool) -> bytes:
        """Return the first key, or the last key if `last` is true. Returns b"" if there are no records."""
        number = self.tree.root
        for _ in range(_MAX_DEPTH if number >= 0 else 0):
            page, kind, nodes = self._page(number)
            node = nodes[-1 if last else 0]
            if kind == _LEAF:
                return self._key(page, node)
            number = self._child(page, node)
        return b""

    def _find_tree(self) -> Tree:
        first = self._header(0)
        page_bytes = first[3]
        if page_bytes not in (1 << k for k in range(9, 17)):
            raise self._damaged(f"pages of {page_bytes:,} bytes, expected a power of two from 512 to 65,536")
        second = self._header(page_bytes)
        header = max(first, second, key=lambda numbers: numbers[-1])
        *_, flags, entries, root, last_page, _ = header
        if header[3] != page_bytes:
            raise self._damaged(f"pages of {header[3]:,} bytes, the first header says {page_bytes:,}")
        if flags:
            raise self._damaged(f"a database with the flags {flags:#x}, expected a database with unique text keys")
        pages = last_page + 1
        if self.file_bytes < pages * page_bytes:
            raise self._damaged(f"{DATA_FILE} has {self.file_bytes:,} bytes, expected {pages * page_bytes:,}")
        if entries > self.file_bytes // _NODE_HEADER or (root == _NO_PAGE) != (entries == 0):
            raise self._damaged(f"{entries:,} records, which do not fit into {self.file_bytes:,} bytes")
        return Tree(page_bytes, pages, -1 if root == _NO_PAGE else root, entries)

    def _header(self, offset: int) -> tuple[int, ...]:
        content = self._read_at(offset, _HEADER.size)
        numbers: tuple[int, ...] = _HEADER.unpack(content) if len(content) == _HEADER.size else (0,) * 9
        kind, magic, version = numbers[:3]
        if not kind & _META or (magic, version) != (MAGIC, VERSION):
            found = f"no header of LMDB at byte {offset:,}" if version in (0, VERSION) else f"LMDB version {version:,}"
            raise self._damaged(f"{DATA_FILE} is not an LMDB file of version {VERSION}: {found}")
        return numbers

    def _page(self, number: int) -> tuple[Bytes, int, tuple[int, ...]]:
        """Return a page of the tree, its kind (_BRANCH or _LEAF) and the offsets of its one or more nodes."""
        page_bytes = self.tree.page_bytes
        if not 2 <= number < self.tree.pages:
            raise self._damaged(f"a reference to page {number:,}, but the file has {self.tree.pages:,} pages")
        page = self._read(number * page_bytes, page_bytes)
        flags, end = struct.unpack_from("<HH", page, 10)
        kind, count = flags & _PAGE_TYPES, (end - _PAGE_HEADER) // 2
        if kind not in (_BRANCH, _LEAF) or count < 1 or end > page_bytes:
            raise self._damaged(f"page {number:,} is not a page of the tree of keys")
        offsets: tuple[int, ...] = struct.unpack_from(f"<{count}H", page, _PAGE_HEADER)
        if max(offsets) > page_bytes - _NODE_HEADER:
            raise self._damaged(f"page {number:,} has a record beyond its end")
        return page, kind, offsets

    def _key(self, page: Bytes, node: int) -> bytes:
        (size,) = struct.unpack_from("<H", page, node + 6)
        start = node + _NODE_HEADER
        if start + size > len(page):
            raise self._damaged(f"a key of {size:,} bytes ends beyond its page")
        return bytes(page[start : start + size])

    def _child(self, page: Bytes, node: int) -> int:
        low, high = struct.unpack_from("<IH", page, node)
        return int(low | high << 32)

    def _value(self, page: Bytes, node: int) -> Bytes:
        size, flags, key_size = struct.unpack_from("<IHH", page, node)
        start = node + _NODE_HEADER + key_size
        if flags == 0:
            if start + size > len(page):
                raise self._damaged(f"a record of {size:,} bytes ends beyond its page")
            return page[start : start + size]
        if size > _MAX_VALUE_BYTES:
            raise self._damaged(f"a record of {size:,} bytes, expected at most {_MAX_VALUE_BYTES:,}")
        if flags != _IN_PAGES or start + 8 > len(page):
            raise self._damaged(f"a record with the flags {flags:#x}, expected 0 or {_IN_PAGES}")
        (number,) = struct.unpack_from("<Q", page, start)
        offset = number * self.tree.page_bytes + _PAGE_HEADER
        if not 2 <= number < self.tree.pages or offset + size > self.tree.pages * self.tree.page_bytes:
            raise self._damaged(
                f"a record of {size:,} bytes begins in page {number:,}, but the file has {self.tree.pages:,} pages"
            )
        return self._read(offset, size)

    def _read(self, offset: int, size: int) -> Bytes:
        content = self._read_at(offset, size)
        if len(content) != size:  # the file had these bytes when it was opened
            raise broken_error(self.folder, self.file_bytes, self._advice)
        return content

    def _damaged(self, what: str) -> StoreError:
        return StoreError(f"{self.folder}: {what}. {self._advice}")


def open_data_file(folder: Path, advice: str) -> BinaryIO:
    """Open the data.mdb of a folder for reading.

    Raises StoreError, with `advice` in its message, if there is no such file, or if it is not a regular file.
    """
    try:
        return open_regular(folder / DATA_FILE, advice, StoreError)
    except (OSError, ValueError) as error:  # a path with a zero byte raises ValueError
        text = error.strerror if isinstance(error, OSError) else str(error)
        raise StoreError(f"{folder}: {DATA_FILE} cannot be opened: {text}. {advice}") from None


class LmdbFile:
    """An open data.mdb, which is read with system calls, not through a memory map.

    Use an LmdbFile in a `with` statement. If the file is truncated while it is open, the methods of `pages` raise
    ShardBroken.
    """

    def __init__(self, folder: Path, advice: str) -> None:
        """Raises StoreError, with `advice` in its message, if the file cannot be opened or is not an LMDB."""
        self._folder, self._advice, self._descriptor = folder, advice, -1
        with open_data_file(folder, advice) as file:
            self._descriptor = os.dup(file.fileno())
        try:
            self.pages = LmdbPages(folder, self._read_at, os.fstat(self._descriptor).st_size, advice)
        except BaseException:
            self.close()
            raise

    def _read_at(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except OSError as error:
            text = f"{self._folder}: {_BROKEN}: byte {offset:,}: {error.strerror}. {self._advice}"
            raise ShardBroken(text) from None

    def close(self) -> None:
        """Close the file. A second call has no effect."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        """Close the file when a cache drops this object."""
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

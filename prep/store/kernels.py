"""Python interface of kernels.c, which looks up the records of a batch in mapped LMDB files without the GIL.

`native` is None if the library cannot be used (prep/compiled.py). Without the library, records are looked up one by one
with py-lmdb.

kernels.c reads the files of LMDB 0.9 (MDB_DATA_VERSION 1) on little-endian machines: a B+ tree of pages. Numbers are
little-endian. Every offset is compared with the size of the map before it is used.

    meta page    pages 0 and 1. The page of the later transaction is valid, and has the number of the root page
    page header  16 bytes: number, flags at byte 10 (1 branch, 2 leaf), end of the list of nodes at byte 12. The list
                 follows the header: the offset of each node in the page, 2 bytes, in ascending order of the keys
    node         8 bytes: branch: number of the child page (6 bytes); leaf: size of the value (4), flags (2).
                 Then size of the key (2), key, value. If the flags are 1, the node does not hold the value, but a page
                 number (8 bytes): the value is in pages from this page on, after one page header
"""

from __future__ import annotations

import ctypes
import struct
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prep import compiled

SOURCE = Path(__file__).with_name("kernels.c")
SHARD_DTYPE = np.dtype([("map", np.uint64), ("bytes", np.int64), ("page_bytes", np.int64), ("root", np.int64)])
# Same fields as struct record in kernels.c; `image` is 0 if the record was not found or has another format.
FOUND_DTYPE = np.dtype(
    [("image", np.uint64), ("bytes", np.int64), ("height", np.int64), ("width", np.int64), ("label", np.int64)]
)
_META = struct.Struct("<16x II 16x 48x 40x q Q Q")  # signature, version, root of the main tree, last page, transaction
_MAGIC, _VERSION = 0xBEEFC0DE, 1


class NativeKernels:
    """The function of the compiled library. Raises AttributeError if the library lacks the function."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._find_records = library.find_records
        self._find_records.argtypes = [pointer, pointer, pointer, number, pointer]
        self._find_records.restype = None

    def find_records(
        self, shards: npt.NDArray[np.void], shard_of: npt.NDArray[np.int64], keys: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.void]:
        """Look up N records.

        `keys` (N,) are the keys of the records, `shard_of` (N,) the indices of their shards in `shards`. `shards` is
        (S,) of SHARD_DTYPE. The result is (N,) of FOUND_DTYPE. The files must stay mapped during the call.
        """
        found = np.empty(len(keys), FOUND_DTYPE)
        arrays = [np.ascontiguousarray(array, np.int64) for array in (shard_of, keys)]
        self._find_records(shards.ctypes.data, *(array.ctypes.data for array in arrays), len(keys), found.ctypes.data)
        return found


class Tree(NamedTuple):
    """The B+ tree of an LMDB file."""

    page_bytes: int
    root: int  # number of the page at the root of the tree


def find_tree(head: bytes, page_bytes: int, transaction: int) -> Tree | None:
    """Return the tree after `transaction`, from the first two pages of a file.

    Returns None if the pages are not as expected.
    """
    for start in (0, page_bytes):
        if len(head) >= start + _META.size:
            magic, version, root, _, number = _META.unpack_from(head, start)
            if (magic, version, number) == (_MAGIC, _VERSION, transaction):
                return Tree(page_bytes, root)
    return None


def is_correct(kernels: NativeKernels) -> bool:
    """Return True if the library finds the records of a small tree: a branch page, two leaf pages and a long value."""
    if sys.byteorder != "little":
        return False
    page = 512
    head = b"\x08\x03\x10\x80\x02\x18\xac\x02\x22"  # height 256 and width 300, then the size of the image
    short, long = head + b"\x03abc\x28\x07", head + b"\xbc\x05" + bytes(700) + b"\x28\x81\x01"
    values = [(0, short), (1, short.replace(b"\x28", b"\x29")), (2, long)]
    leaves = [_page(2, [_leaf_node(key, value, 3) for key, value in part]) for part in (values[:1], values[1:])]
    branch = _page(1, [struct.pack("<IHH", 1, 0, 0), struct.pack("<IHH", 2, 0, 8) + b"00000001"])
    content = b"".join(part.ljust(page, b"\0") for part in (branch, *leaves, bytes(16) + long))
    buffer = np.frombuffer(content.ljust(5 * page, b"\0"), np.uint8)
    start = buffer.ctypes.data
    shards = np.array([(start, 5 * page, page, 0), (start, 4 * page, page, 0)], SHARD_DTYPE)
    keys = np.array([0, 1, 2, 3, 0, 2])  # record 1 has no label, record 3 is missing; shard 1 ends within record 2
    found = kernels.find_records(shards, np.array([0, 0, 0, 0, 1, 1]), keys)
    first = (start + content.index(b"abc"), 3, 256, 300, 7)
    expected = [first, (start + 3 * page + 16 + len(head) + 2, 700, 256, 300, 129), first]
    is_found = (found["image"] != 0).tolist() == [True, False, True, False, True, False]
    return bool(is_found and found[[0, 2, 4]].tolist() == expected)


def _page(flags: int, nodes: list[bytes], page_bytes: int = 512) -> bytes:
    """Return a page of a tree, for the self-test."""
    offsets, used = [], page_bytes
    for item in nodes:
        used -= len(item)
        offsets.append(used)
    header = struct.pack("<10xHHH", flags, 16 + 2 * len(nodes), used) + struct.pack(f"<{len(nodes)}H", *offsets)
    return header + bytes(used - len(header)) + b"".join(reversed(nodes))


def _leaf_node(key: int, value: bytes, long_page: int) -> bytes:
    """Return a node of a leaf page, for the self-test. A value of more than 100 bytes is in page `long_page`."""
    is_long = len(value) > 100
    header = struct.pack("<IHH", len(value), is_long, 8) + b"%08d" % key
    return header + (struct.pack("<Q", long_page) if is_long else value)


native = compiled.load(compiled.library_path(SOURCE), NativeKernels, is_correct)

"""Python interface of kernels.c, which looks up the records of a batch in mapped LMDB files without the GIL.

`native` is None if the compiled kernels.c cannot be used (prep/compiled.py). lmdb_file.py then looks up records one by
one, and no file is mapped.

kernels.c reads files that LMDB 0.9 (MDB_DATA_VERSION 1) wrote on little-endian machines. Such a file is a B+ tree of
pages, and its numbers are little-endian. Every offset is compared with the size of the map before it is used.

    header page  pages 0 and 1. The page with the larger transaction number is valid, and has the number of the root
                 page
    page header  16 bytes: number of the page, flags at byte 10 (1 branch, 2 leaf), end of the list of nodes at byte 12.
                 The list of nodes follows the header. For each node, in ascending order of the keys, the list has the
                 offset of the node in the page (2 bytes)
    node         in a branch page: number of the child page (6 bytes), size of the key (2), key
                 in a leaf page: size of the value (4), flags (2), size of the key (2), key, value. If the flags are 1,
                 a page number (8) takes the place of the value. The value is then in the page with this number, after
                 one page header, and in the pages that follow

kernels.c also protects the maps. If a page of a mapped file cannot be read, because the file was truncated or the disk
has an error, the operating system sends SIGBUS, which would end the process. A signal handler puts a page of zeros in
place of the unreadable page, and marks the map.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep import compiled

SOURCE = Path(__file__).with_name("kernels.c")
SHARD_DTYPE = np.dtype([("map", np.uint64), ("bytes", np.int64), ("page_bytes", np.int64), ("root", np.int64)])
# Same fields as struct record in kernels.c; `image` is 0 if the record was not found or has another format.
FOUND_DTYPE = np.dtype(
    [("image", np.uint64), ("bytes", np.int64), ("height", np.int64), ("width", np.int64), ("label", np.int64)]
)
FORMATS = {"": 0, "jpeg": 1, "ppm": 2}  # format of the images -> number in kernels.c; "": any format


class NativeKernels:
    """The functions of the compiled library. Raises AttributeError if the library lacks a function."""

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._find_records = library.find_records
        self._find_records.argtypes = [pointer, pointer, pointer, number, number, number, pointer]
        self._find_records.restype = None
        self.crc32_of = library.crc32_of
        self.crc32_of.argtypes, self.crc32_of.restype = [ctypes.c_char_p, number], ctypes.c_uint32
        self._install_handler = library.install_handler
        self._install_handler.argtypes, self._install_handler.restype = [], number
        self._guard_map = library.guard_map
        self._guard_map.argtypes, self._guard_map.restype = [pointer, ctypes.c_uint64], pointer
        self._release_map = library.release_map
        self._release_map.argtypes, self._release_map.restype = [pointer], None
        self._map_is_broken = library.map_is_broken
        self._map_is_broken.argtypes, self._map_is_broken.restype = [pointer], number
        self._broken_pages = ctypes.c_int64.in_dll(library, "broken_pages")

    def find_records(
        self,
        shards: npt.NDArray[np.void],
        shard_of: npt.NDArray[np.int64],
        keys: npt.NDArray[np.int64],
        format: str = "",
        check: bool = False,
    ) -> npt.NDArray[np.void]:
        """Look up N records.

        `keys` (N,) are the keys of the records, `shard_of` (N,) the indices of their shards in `shards`. `shards` is
        (S,) of SHARD_DTYPE. The result is (N,) of FOUND_DTYPE. The files must stay mapped during the call.

        If `format` is "jpeg" or "ppm", a record is found only if its image begins like a file of this format. A JPEG
        file must also have the height and width that the record states (prep.images.jpeg.check_jpeg). With `check`, a
        record is found only if its checksum is correct.
        """
        found = np.empty(len(keys), FOUND_DTYPE)
        arrays = [np.ascontiguousarray(array, np.int64) for array in (shard_of, keys)]
        addresses = [array.ctypes.data for array in (shards, *arrays)]
        self._find_records(*addresses, len(keys), FORMATS[format], check, found.ctypes.data)
        return found

    def renew_protection(self) -> None:
        """Protect the maps again if other code has replaced the handler of SIGBUS, as faulthandler.enable() does.

        Call this method before a batch is read from maps. A call takes a few microseconds.
        """
        self._install_handler()

    def guard_map(self, address: int, size_bytes: int) -> int | None:
        """Protect the memory map of a file against SIGBUS.

        Returns a handle for `release_map` and `map_is_broken`, or None if the map cannot be protected.
        """
        with _lock:
            handle: int | None = self._guard_map(address, size_bytes)
        return handle

    def release_map(self, handle: int) -> None:
        """End the protection of a map. Call this function before the file is unmapped."""
        with _lock:
            self._release_map(handle)

    def map_is_broken(self, handle: int) -> bool:
        """Return True if a page of a map could not be read. The signal handler has replaced this page with zeros."""
        return bool(self._map_is_broken(handle))

    @property
    def broken_pages(self) -> int:
        """Number of pages of protected maps that could not be read in this process."""
        return self._broken_pages.value


_lock = threading.Lock()


def _renew_lock() -> None:
    """Replace the lock in a forked child, because a thread of the parent may hold the lock."""
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)


def is_correct(kernels: NativeKernels) -> bool:
    """Return True if the library finds the records of a small tree: a branch page, two leaf pages and a long value.

    The checksums of the library must also agree with zlib.
    """
    if sys.byteorder != "little":
        return False
    message = bytes(range(251)) * 2
    if any(kernels.crc32_of(message[k:], 502 - k) != zlib.crc32(message[k:]) for k in (0, 1, 300, 440, 497, 502)):
        return False
    page = 512
    head = b"\x08\x03\x10\x80\x02\x18\xac\x02\x22"  # 3 channels, height 256, width 300, tag of the image
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

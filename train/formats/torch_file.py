"""Reads the content of a file that torch.save wrote, but not the numbers of its tensors. Does not use torch.

Since version 1.6, torch.save writes a zip archive that is not compressed. Its entry `data.pkl` is the pickle of the
saved value, and its entries `data/0`, `data/1` and so on are the storages of the tensors. Older versions wrote five
pickles in a row, and the storages after them. `read_content` checks that each storage is in the file, with the size
that the pickle states. torch 2.13 also compares the sizes. A version of torch that does not compare the sizes would
read other memory of the process if a storage is too short.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from train.formats.pickled_values import Storage, StoredTensor, UnsafeFile, read_pickle

MAX_PICKLE_BYTES = 64 << 20  # largest size of `data.pkl`, which has about 50 KB for a network with 1,000 classes
MAX_ENTRIES = 10_000  # largest number of entries of the archive
_OLD_MAGIC = 0x1950A86A20F9469CFC6C  # first value of a file of torch before version 1.6
_OLD_PROTOCOL = 1001
_ZIP = b"PK\3\4"


def read_content(file: BinaryIO) -> Any:
    """Return the value in a file of torch.save: plain values, and a StoredTensor for each tensor.

    `file` is an open regular file, whose position changes. Raises UnsafeFile if torch.save did not write the file, if
    the file holds anything but plain values and dense tensors, or if the file is shorter than its pickle states. Raises
    OSError for a read error.
    """
    file.seek(0)
    is_zip = file.read(4) == _ZIP
    file.seek(0)
    return _read_archive(file) if is_zip else _read_older(file)


def tensors_in(value: Any) -> Iterator[StoredTensor]:
    """Yield the tensors in a value of `read_content`, each as often as the value contains it."""
    if isinstance(value, StoredTensor):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def _read_archive(file: BinaryIO) -> Any:
    size_bytes = os.fstat(file.fileno()).st_size
    try:
        _check_directory(file, size_bytes)
        with zipfile.ZipFile(file) as archive:
            entries = _entries(archive, size_bytes)
            pickle_name = _pickle_name(entries)
            if entries[pickle_name] > MAX_PICKLE_BYTES:
                raise UnsafeFile(f"data.pkl has {entries[pickle_name]:,} bytes, expected at most {MAX_PICKLE_BYTES:,}")
            value = read_pickle(io.BytesIO(archive.read(pickle_name)))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error, RuntimeError) as error:
        if isinstance(error, UnsafeFile):
            raise
        raise UnsafeFile(f"an archive that cannot be read ({error})") from None
    folder = pickle_name.removesuffix("data.pkl")
    for tensor in tensors_in(value):
        stored = entries.get(f"{folder}data/{tensor.storage.key}")
        if stored != tensor.storage.bytes:
            raise UnsafeFile(
                f"storage {tensor.storage.key!r:.40} is stated to have {tensor.storage.bytes:,} bytes, but the archive "
                + ("lacks this storage" if stored is None else f"holds {stored:,}")
            )
    return value


def _check_directory(file: BinaryIO, size_bytes: int) -> None:
    """Raise UnsafeFile if the directory of the archive is larger than the directory of MAX_ENTRIES entries would be."""
    tail = min(size_bytes, 22 + 65535)
    file.seek(size_bytes - tail)
    end = file.read(tail)
    position = end.rfind(b"PK\5\6")
    if position < 0 or len(end) - position < 22:
        raise UnsafeFile("an incomplete archive")
    directory_bytes = struct.unpack_from("<L", end, position + 12)[0]
    if directory_bytes == 0xFFFFFFFF:  # the size is in the end record of zip64, which comes before this end record
        record = end.rfind(b"PK\6\6", 0, position)
        if record < 0:
            raise UnsafeFile("an incomplete archive")
        directory_bytes = struct.unpack_from("<Q", end, record + 40)[0]
    if directory_bytes > MAX_ENTRIES * 200:
        raise UnsafeFile(f"an archive whose directory has {directory_bytes:,} bytes")


def _entries(archive: zipfile.ZipFile, size_bytes: int) -> dict[str, int]:
    """Return the names and sizes in bytes of the entries.

    The entries must not be compressed and must not overlap, and the first entry must begin at the start of the file.
    Every reader therefore finds the same entries, and the archive cannot become larger when it is unpacked.
    """
    entries: dict[str, int] = {}
    end = 0
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    if len(infos) > MAX_ENTRIES:
        raise UnsafeFile(f"an archive of {len(infos):,} entries, expected at most {MAX_ENTRIES:,}")
    for info in infos:
        name = info.filename
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size or info.flag_bits & 1:
            raise UnsafeFile(f"the entry {name!r:.40} is compressed or encrypted ({info.file_size:,} bytes unpacked)")
        if name in entries:
            raise UnsafeFile(f"the entry {name!r:.40} occurs twice")
        if info.header_offset < end or (not entries and info.header_offset != 0):
            raise UnsafeFile(f"the entry {name!r:.40} overlaps another entry, or bytes precede the first entry")
        end = info.header_offset + 30 + len(name.encode()) + info.file_size
        entries[name] = info.file_size
    if end > size_bytes:
        raise UnsafeFile(f"entries of {end:,} bytes in a file of {size_bytes:,} bytes")
    return entries


def _pickle_name(entries: dict[str, int]) -> str:
    """Return the name of the entry with the pickle, which is in the only folder of the archive."""
    names = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    folders = {name.partition("/")[0] for name in entries}
    if len(names) != 1 or len(folders) != 1:
        raise UnsafeFile("an archive without data.pkl")
    return names[0]


def _read_older(file: BinaryIO) -> Any:
    """Return the value of a file of torch before version 1.6: five pickles, then the storages."""
    size_bytes = os.fstat(file.fileno()).st_size
    if read_pickle(file) != _OLD_MAGIC or read_pickle(file) != _OLD_PROTOCOL:
        raise UnsafeFile("neither an archive nor an older file of torch.save")
    read_pickle(file)  # sizes of the C types
    value, keys = read_pickle(file), read_pickle(file)
    storages: dict[str, Storage] = {}
    for tensor in tensors_in(value):
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise UnsafeFile(f"storage {tensor.storage.key!r:.40} has two descriptions")
    if not isinstance(keys, list) or sorted(map(str, keys)) != sorted(storages):
        raise UnsafeFile("a list of storages that differs from the storages of the tensors")
    expected = file.tell() + sum(8 + storage.bytes for storage in storages.values())
    if expected > size_bytes:
        raise UnsafeFile(f"storages that need {expected:,} bytes in a file of {size_bytes:,} bytes")
    return value

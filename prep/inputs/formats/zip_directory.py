"""Reads the central directory of a zip archive entry by entry, with limited memory.

Python's zipfile keeps every entry in memory, which takes more than a gigabyte for ImageNet. The layout is described in
APPNOTE.TXT of PKWARE, sections 4.3.7 (local header), 4.3.12 (central directory), 4.3.14 to 4.3.16 (end records), and
4.5.3 (zip64).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from prep.console import UserError
from prep.schema import open_regular

_END, _END64_LOCATOR, _END64 = b"PK\5\6", b"PK\6\7", b"PK\6\6"
_ENTRY = struct.Struct("<4s4B4HL2L5H2L")  # one entry of the central directory, without its name
_MAX_COMMENT = 0xFFFF
_READ_BYTES = 1 << 20
_UNIX, _DOS = 3, 0  # the number in an entry that says on which operating system the entry was written
METHODS = {0: "stored", 8: "deflate", 12: "bzip2", 14: "lzma"}  # the compression methods that can be read


@dataclass(frozen=True, slots=True)
class ZipEntry:
    """One entry of the central directory."""

    name: bytes
    size: int  # bytes, uncompressed
    offset: int  # position of the local header in the file
    reason: str = ""  # reason why the entry cannot be read; empty if it can be read

    @property
    def is_folder(self) -> bool:
        """Return whether the entry is a folder."""
        return self.name.endswith(b"/")


def is_zip(path: Path) -> bool:
    """Return whether a file begins with a member of a zip archive, or is an empty archive."""
    with open_regular(path) as file:
        return file.read(4) in (b"PK\3\4", _END)


def count_entries(path: Path) -> int:
    """Return the number of entries that the end record states; 0 if the end record cannot be read."""
    with open_regular(path) as file, suppress(ValueError, struct.error):
        return _find_directory(file)[2]
    return 0


def iterate_entries(path: Path) -> Iterator[ZipEntry]:
    """Yield the entries of the central directory. Raises UserError if the archive is damaged or truncated."""
    damaged = f"{path} is not a zip archive, or is damaged or truncated"
    try:
        with open_regular(path) as file:
            start, size, count, shift = _find_directory(file)
            file.seek(start)
            entries = _entries(file, size, start, shift)
            found = 0
            for found, entry in enumerate(entries, 1):  # noqa: B007  # `found` is used after the loop
                yield entry
            if found != count:
                raise ValueError(f"{found:,} entries, but the end record says {count:,}")
    except (ValueError, struct.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{damaged} ({error}). Download the file again.") from None


def _find_directory(file: BinaryIO) -> tuple[int, int, int, int]:
    """Return position, size in bytes and number of entries of the central directory.

    The fourth returned number is the number of bytes that come before the archive in the file.
    """
    file_bytes = file.seek(0, 2)
    tail_start = max(0, file_bytes - _MAX_COMMENT - 22)
    file.seek(tail_start)
    tail = file.read()
    at = tail.rfind(_END)
    if at < 0 or len(tail) - at < 22:
        raise ValueError("no end record")
    disk, _, _, count, size, offset, _ = struct.unpack_from("<4H2LH", tail, at + 4)
    end = tail_start + at
    if at >= 20 and tail.startswith(_END64_LOCATOR, at - 20):
        end64 = struct.unpack_from("<Q", tail, at - 12)[0]
        end -= 20
        # The position `end - 56` is right if other bytes come before the archive in the file, as in a self-extracting
        # program.
        for position in (end64, end - 56):
            file.seek(min(position, file_bytes))
            record = file.read(56)
            if record.startswith(_END64) and len(record) == 56:
                count, size, offset = struct.unpack_from("<3Q", record, 32)
                end = position
                break
        else:
            raise ValueError("no end record of zip64")
    elif disk:
        raise ValueError("one of several volumes")
    shift = end - size - offset
    if shift < 0:
        raise ValueError(f"the directory of {size:,} bytes at byte {offset:,} does not fit into the file")
    return offset + shift, size, count, shift


def _entries(file: BinaryIO, size: int, start: int, shift: int) -> Iterator[ZipEntry]:
    left, block, at = size, b"", 0
    while left or at < len(block):
        if len(block) - at < _ENTRY.size + 3 * _MAX_COMMENT and left:
            more = file.read(min(left, _READ_BYTES))
            if not more:
                raise ValueError("the directory is truncated")
            left -= len(more)
            block, at = block[at:] + more, 0
        fields = _ENTRY.unpack_from(block, at)
        magic, system, flags, method = fields[0], fields[2], fields[5], fields[6]
        name_bytes, extra_bytes, comment_bytes, attributes = *fields[12:15], fields[17]
        if magic != b"PK\1\2":
            raise ValueError(f"no entry at byte {start + size - left - len(block) + at:,}")
        at += _ENTRY.size
        name = block[at : at + name_bytes]
        extra = block[at + name_bytes : at + name_bytes + extra_bytes]
        at += name_bytes + extra_bytes + comment_bytes
        if at > len(block):
            raise ValueError("the directory is truncated")
        plain_size, _, offset = _with_zip64(extra, fields[11], fields[10], fields[18])
        if system == _DOS:
            name = name.replace(b"\\", b"/")
        reason = _reason(flags, method, attributes >> 16 if system == _UNIX else 0)
        if offset + shift + 30 > start:
            raise ValueError(f"an entry points to byte {offset + shift:,}, which is after the end of the contents")
        yield ZipEntry(name, plain_size, offset + shift, reason)


def _with_zip64(extra: bytes, *values: int) -> tuple[int, int, int]:
    """Return uncompressed size, compressed size and offset.

    If a value is FFFFFFFF, the true value is in the part of `extra` that has the tag 1.
    """
    at, numbers = 0, list(values)
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            body = extra[at + 4 : at + 4 + length]
            for index, value in enumerate(numbers):
                if value == 0xFFFFFFFF:
                    numbers[index], body = struct.unpack_from("<Q", body)[0], body[8:]
            break
        at += 4 + length
    return numbers[0], numbers[1], numbers[2]


def _reason(flags: int, method: int, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link, not a file"
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "neither a plain file nor a folder"
    if flags & 1:
        return "encrypted"
    if method not in METHODS:
        return f"compression method {method}; expected {', '.join(METHODS.values())}"
    return ""

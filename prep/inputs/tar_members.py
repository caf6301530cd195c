"""Reads the members of a tar archive with limited memory and without unpacking, and reports a damaged archive.

Python's tarfile parses the headers. This module works around these problems of tarfile:

-   tarfile reads a long name (GNU) or an extended header (PAX) into memory, whatever its size. The newest versions of
    Python read 1 MiB at a time. Older versions of Python read the whole header at once. This module therefore gives
    tarfile a `BoundedFile`, which refuses to read more than MAX_HEADER_BYTES at once, or 2·MAX_HEADER_BYTES for one
    member.
-   tarfile keeps a list of all members in memory, which takes a gigabyte for ImageNet. Since Python 3.13, tarfile keeps
    no list if `stream` is true. In versions of Python before 3.13, this module empties the list after each member.
-   tarfile treats a damaged header as the end of the archive. This module therefore checks that all bytes after the
    apparent end are zero, as in a complete archive.
-   If a PAX header has a negative size, newer versions of Python set `offset` to a wrong position. tarfile then either
    treats this position as the end of the archive, or returns the second member in place of the first. This module
    therefore compares `offset` with the end of the previous member.

Python's documentation does not list TarFile's attributes `firstmember`, `members` and `offset`. The tests in
test_tar_members.py fail if a version of Python changes one of the three attributes.
"""

from __future__ import annotations

import io
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prep.console import Progress, UserError
from prep.inputs.names import name_text

MAX_HEADER_BYTES = 1 << 20
_MAX_PADDING_BYTES = 16 << 20  # largest padding with zeros that tapes need; more zeros mean an incomplete download
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # signatures of gzip, bzip2, xz and zstd

_NO_MEMBER_LIST: dict[str, Any] = {"stream": True} if sys.version_info >= (3, 13) else {}


class BoundedFile(io.BufferedReader):
    """A file that refuses to read too many bytes.

    One read may return MAX_HEADER_BYTES, and all reads between two calls of `allow_header` together may return
    2·MAX_HEADER_BYTES.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path))
        self.allow_header()

    def allow_header(self) -> None:
        """Allow another 2·MAX_HEADER_BYTES to be read, for the headers of the next member."""
        self._bytes_left = 2 * MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Return the next `size` bytes, or fewer at the end of the file.

        Raises tarfile.ReadError for an invalid size.
        """
        if size is None or not 0 <= size <= min(MAX_HEADER_BYTES, self._bytes_left):
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES:,} bytes, or of a negative size")
        self._bytes_left -= size
        return super().read(size)


def iterate_members(
    file: BoundedFile, path: Path, start: int, end: int, progress: Progress | None = None
) -> Iterator[tarfile.TarInfo]:
    """Yield the members of the archive in the bytes `start` to `end` of `file`.

    Names are decoded with `surrogateescape`. `offset_data` of a member counts from the beginning of the file. The
    caller may seek in the file between two members, for example to read an archive inside this one. If `progress` is
    given, it is set to the position in `file`, in bytes. Raises UserError, which names `path`, if the archive is
    compressed, damaged or truncated.
    """
    damaged = f"{path} is not a tar archive, or is damaged at byte"
    file.seek(start)
    file.allow_header()
    if file.read(6).startswith(_COMPRESSED):
        raise UserError(f"{path} is compressed, so its members cannot be read directly. Decompress the archive first.")
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r", encoding="utf-8", errors="surrogateescape", **_NO_MEMBER_LIST)
        # The constructor has read the first member.
        next_header = tar.offset if tar.firstmember else start  # type: ignore[attr-defined]
        while tar.offset == next_header and (member := tar.next()) is not None:
            next_header = tar.offset
            if not _NO_MEMBER_LIST:
                tar.members = []  # type: ignore[attr-defined]
            if member.size < 0:
                raise tarfile.ReadError(f"{_text(member)} has a size below zero")
            member_end = member.offset_data + (member.size if member.isreg() else 0)
            if member_end > end:
                raise UserError(
                    f"{path} is truncated: {_text(member)} would end at byte {member_end:,}, but the archive ends at "
                    f"byte {end:,}. Download the archive again."
                )
            if progress is not None:
                progress.update(min(member.offset_data, progress.total))
            yield member
            file.allow_header()
        if tar.offset != next_header:
            raise tarfile.ReadError(f"the header at byte {next_header:,} is damaged")
        zeros = _count_zeros(file, tar.offset, end)
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{damaged} {file.tell():,} ({error}). Download the archive again.") from None
    if tar.offset + zeros < end and zeros <= _MAX_PADDING_BYTES:
        raise UserError(f"{damaged} {tar.offset + zeros:,}. Download the archive again.")
    if not tarfile.BLOCKSIZE <= zeros <= _MAX_PADDING_BYTES:
        raise UserError(
            f"{path} is truncated: {zeros:,} zero bytes follow byte {tar.offset:,}; a complete archive ends with "
            f"{2 * tarfile.BLOCKSIZE:,} to {_MAX_PADDING_BYTES:,} zero bytes. Download the archive again."
        )


def name_bytes(member: tarfile.TarInfo) -> bytes:
    """Return the bytes that a member's name has in the archive."""
    return member.name.encode("utf-8", "surrogateescape")


def _text(member: tarfile.TarInfo) -> str:
    return name_text(name_bytes(member))


def _count_zeros(file: BoundedFile, position: int, end: int) -> int:
    """Return the number of consecutive zero bytes that begin at `position`.

    Counting stops soon after _MAX_PADDING_BYTES bytes.
    """
    file.seek(position)
    count = 0
    while position + count < end and count <= _MAX_PADDING_BYTES:
        file.allow_header()
        block = file.read(min(MAX_HEADER_BYTES, end - position - count))
        count += len(block) - len(block.lstrip(b"\0"))
        if not block or block.strip(b"\0"):
            break
    return count

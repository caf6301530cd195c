"""The digest of a checkpoint file, in the comment of its zip archive (APPNOTE 4.3.16, last field)."""

from __future__ import annotations

import hashlib
import os
from io import BufferedRandom
from typing import BinaryIO

_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
# Number of bytes of the end record of a zip archive; the last two bytes are the length of the archive comment.
_END_BYTES = 22


def append_digest(file: BufferedRandom) -> None:
    """Append the archive comment that `digests` reads: the SHA-256 of all bytes before the comment."""
    file.seek(-_END_BYTES, os.SEEK_END)
    end = file.read()
    assert end.startswith(b"PK\5\6") and end.endswith(b"\0\0")
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_BYTES.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest.encode())


def digests(file: BinaryIO) -> tuple[str, str]:
    """Return the digest in the archive comment, and the actual digest of all bytes before the comment, in hex.

    The first digest is "" if the file has no digest comment.
    """
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size - _COMMENT_BYTES
    while left > 0:
        block = file.read(min(left, 1 << 20))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    comment = file.read(_COMMENT_BYTES)
    stated = comment[len(_MARK) :].decode("ascii", "replace") if comment.startswith(_MARK) else ""
    return stated, digest.hexdigest()

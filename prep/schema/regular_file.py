"""Opens regular files only. A FIFO, socket, device or folder in place of a file causes an error, and never blocks."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from hashlib import file_digest
from io import BufferedReader
from pathlib import Path

from prep.console import UserError, escaped

MAX_TEXT_BYTES = 256 << 20  # largest size of a file of labels or names; such a file for ImageNet has 40 MB
_CHUNK_BYTES = 1 << 20
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(
    path: Path | str,
    advice: str = "Put the file back, or name another file.",
    error: Callable[[str], UserError] = UserError,
) -> BufferedReader:
    """Open a regular file for reading. A symbolic link to a regular file is opened as well.

    Raises FileNotFoundError or another OSError if the file cannot be opened. Raises `error`, with `advice` in its
    message, if `path` is a folder, a named pipe, a socket or a device. The function never waits for another process.
    """
    return open(regular_descriptor(path, advice, error), "rb")


def regular_descriptor(path: Path | str, advice: str, error: Callable[[str], UserError] = UserError) -> int:
    """Return a descriptor of a regular file that is open for reading. The caller must close the descriptor.

    Raises the errors of open_regular.
    """
    _refuse_other_kinds(os.stat(path).st_mode, path, advice, error)  # opening some devices has side effects
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        _refuse_other_kinds(os.fstat(descriptor).st_mode, path, advice, error)  # the file may have been replaced
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_regular(path: Path | str, max_bytes: int, advice: str, error: Callable[[str], UserError] = UserError) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes.

    Raises FileNotFoundError or another OSError, with the path as its filename, if the file cannot be read. Raises
    `error`, with `advice` in its message, if `path` is not a regular file, or if the file is larger than `max_bytes`.
    The file's size is compared with `max_bytes` before memory is allocated.
    """
    with open_regular(path, advice, error) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise error(escaped(f"{path} has {size:,} bytes, expected at most {max_bytes:,}. {advice}"))
        try:
            content = file.read(size + 1)
            while size < len(content) <= max_bytes:  # the file grew, or is in /proc, where every size is 0
                more = file.read(_CHUNK_BYTES)
                if not more:
                    break
                content += more
        except OSError as failure:
            raise OSError(failure.errno, failure.strerror or str(failure), str(path)) from None
    if len(content) > max_bytes:
        raise error(escaped(f"{path} has more than {max_bytes:,} bytes, the largest size allowed. {advice}"))
    return content


def check_regular(path: Path | str, advice: str, error: Callable[[str], UserError] = UserError) -> None:
    """Raise `error` if something other than a regular file is at `path`. Nothing is raised if `path` does not exist.

    Call this function before a library opens the file itself.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        _refuse_other_kinds(os.stat(path).st_mode, path, advice, error)


def file_sha256(path: Path | str, advice: str = "", error: Callable[[str], UserError] = UserError) -> str:
    """Return the SHA-256 (hex) of a regular file of any size. Raises the errors of open_regular."""
    with open_regular(path, advice, error) as file:
        return file_digest(file, "sha256").hexdigest()


def _refuse_other_kinds(mode: int, path: Path | str, advice: str, error: Callable[[str], UserError]) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "a special file")
        raise error(escaped(f"{path} is {kind}, expected a regular file. {advice}"))

"""Catches the lines that C libraries write to standard error while they decode a file.

libtiff, for example, reports damaged data on standard error, without the name of the file. The caller of
`caught_stderr` adds the name of the file to the lines.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDERR = 2
_MAX_LINES, _MAX_CHARS, _MAX_READ_BYTES = 3, 160, 64_000
_HARMLESS = ("Unknown field with tag",)  # libtiff writes this line about every tag of Photoshop and of cameras
_lock = threading.Lock()  # standard error belongs to the process, so only one thread at a time may redirect it
_before: list[int] = []  # a copy of the descriptor of standard error, while standard error is redirected


def _reset_in_child() -> None:
    """In a forked child, undo the redirection of standard error if a thread of the parent has redirected it.

    That thread does not run in the child, so it would never end the redirection.
    """
    global _lock
    _lock = threading.Lock()
    if _before:
        os.dup2(_before[0], _STDERR)


os.register_at_fork(after_in_child=_reset_in_child)


@contextmanager
def caught_stderr() -> Iterator[list[str]]:
    """Redirect file descriptor 2 during a `with` block, and yield a list that is empty until the block ends.

    After the block, the list holds the lines that were written to the descriptor. Empty lines and known harmless lines
    are left out. At most three lines are kept, each of at most 160 characters. If there were more lines, a fourth item
    of the list gives their number. Only one thread at a time can be in a block of caught_stderr: any other thread waits
    before its block.
    """
    lines: list[str] = []
    with _lock:
        try:
            before = os.dup(_STDERR)
        except OSError:  # the process has no standard error
            yield lines
            return
        written = os.memfd_create("stderr")
        try:
            _before[:] = [before]
            os.dup2(written, _STDERR)
            try:
                yield lines
            finally:
                os.dup2(before, _STDERR)
                _before.clear()
                lines += _read_lines(written)
        finally:
            os.close(before)
            os.close(written)


def _read_lines(descriptor: int) -> list[str]:
    content = b""
    with suppress(OSError):
        content = os.pread(descriptor, _MAX_READ_BYTES, 0)
    # Pillow gives libtiff the name tempfile.tif for a file in memory.
    lines = [line.strip().removeprefix("tempfile.tif: ") for line in content.decode("utf-8", "replace").splitlines()]
    kept = [line[:_MAX_CHARS] for line in lines if line and not any(text in line for text in _HARMLESS)]
    others = len(kept) - _MAX_LINES
    return kept[:_MAX_LINES] + [f"{others:,} more lines"] * (others > 0)

"""Append-only files whose pieces are whole, also after a kill or on a disk that was full for a while."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class AppendLog:
    """Appends pieces of bytes to a file, each whole or not at all.

    A piece is handed to the operating system before `add` returns, so kill -9 loses none. While the disk is full,
    pieces are held in memory and written with the next one.
    """

    def __init__(self, path: Path) -> None:
        """The file at `path` is created by the first piece if it does not exist."""
        self.path = path
        self._size = path.stat().st_size if path.exists() else 0
        self._pending = b""

    def add(self, piece: bytes) -> OSError | None:
        """Append `piece` after the pending ones.

        Returns the error if this piece is the first that had to be kept in memory, else None.
        """
        nothing_was_pending, self._pending = not self._pending, self._pending + piece
        error = self._write(synced=False)
        return error if nothing_was_pending else None

    def sync(self) -> None:
        """Write all pending pieces and fsync; raises OSError if that fails."""
        error = self._write(synced=True)
        if error is not None:
            raise error

    def _write(self, synced: bool) -> OSError | None:
        try:
            with open(self.path, "ab") as file:
                file.write(self._pending)
                file.flush()
                if synced:
                    os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._size)  # remove a part that was written
            return error
        self._size, self._pending = self._size + len(self._pending), b""
        return None

"""A file that grows by whole pieces, also on a disk that is full for a while."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


class AppendLog:
    """Each piece is with the system when `add` returns, so that kill -9 loses none; or it waits in memory."""

    def __init__(self, path: Path) -> None:
        """`path` is made by the first piece where it is not there yet."""
        self.path = path
        self._size = path.stat().st_size if path.exists() else 0
        self._waiting = b""

    def add(self, piece: bytes) -> OSError | None:
        """Write `piece` after what waits, all or nothing; returns why not the first time that it must wait."""
        begins_to_wait, self._waiting = not self._waiting, self._waiting + piece
        error = self._write(synced=False)
        return error if begins_to_wait else None

    def sync(self) -> None:
        """Have every piece on the disk; raises OSError where it cannot be."""
        error = self._write(synced=True)
        if error is not None:
            raise error

    def _write(self, synced: bool) -> OSError | None:
        try:
            with open(self.path, "ab") as file:
                file.write(self._waiting)
                file.flush()
                if synced:
                    os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self._size)  # a part may have been written
            return error
        self._size, self._waiting = self._size + len(self._waiting), b""
        return None

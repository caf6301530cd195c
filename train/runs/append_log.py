"""Log files to which entries (lines or events) are appended.

A killed process or a full disk leaves no partly written entry in the file. A power cut can leave a partly written last
entry. `read_lines` (train/formats/lines.py) leaves out such an entry. MetricsLog removes such an entry from
metrics.jsonl, and `remove_cut_line` removes it from evaluations.jsonl.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def remove_cut_line(path: Path) -> None:
    """Remove the last line of a file of lines if a power cut left the line without its newline.

    If the cut line stayed, the next entry would be on the same line. Does nothing if the file does not exist. Raises
    OSError.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    complete = content.rfind(b"\n") + 1
    if complete < len(content):
        os.truncate(path, complete)


class AppendLog:
    """Appends entries (bytes) to a file. Each entry is written completely or not at all.

    An entry is passed to the operating system before `add` returns, so kill -9 loses no entry. While the disk is
    full, entries are held in memory and written together with the next entry.
    """

    def __init__(self, path: Path) -> None:
        """The first entry creates the file `path` if it does not exist."""
        self.path = path
        self._size = path.stat().st_size if path.exists() else 0
        self._pending = b""

    def add(self, entry: bytes) -> OSError | None:
        """Append `entry` after the pending entries.

        Returns the disk error if `entry` is now the only pending entry, otherwise None.
        """
        nothing_was_pending, self._pending = not self._pending, self._pending + entry
        error = self._write(synced=False)
        return error if nothing_was_pending else None

    def sync(self) -> None:
        """Write all pending entries and fsync the file. Raises OSError for a disk error."""
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
                os.truncate(self.path, self._size)  # removes a partly written entry
            return error
        self._size, self._pending = self._size + len(self._pending), b""
        return None

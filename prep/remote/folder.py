"""The protocol Folder for folders that a store is copied from or to, and the class for local folders."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

from prep.console import UserError, disk_error
from prep.files import sync_folder, write_atomic
from prep.schema import open_regular, read_regular

MAX_SMALL_FILE_BYTES = 64 << 20  # largest size of manifest.json and of SHA256SUMS
CHUNK_BYTES = 8 << 20  # a large file is transferred in parts of this size, with one request for each part

# A function that is called with the number of bytes of a file that have been transferred so far.
CountBytes = Callable[[int], None]


class FileState(NamedTuple):
    """Size and version of a file. The version changes when the file is written again."""

    size_bytes: int
    version: str  # in object storage the ETag, in a local folder the modification time in ns


class Folder(Protocol):
    """A folder of files. Paths are relative to the folder and have forward slashes.

    Methods raise FileNotFoundError if a file is missing, and UserError if the folder cannot be used.
    """

    name: str  # the folder as the user named it, without a slash at the end
    is_remote: bool
    retries: int  # number of times that a failed request was sent again; 0 for a local folder

    def is_empty(self) -> bool:
        """Return whether the folder contains no file. A missing folder is empty."""

    def states(self, paths: Iterable[str]) -> dict[str, FileState]:
        """Return {path: state} for the files `paths`. Missing files are left out."""

    def read(self, path: str) -> bytes:
        """Return the content of a small file, of at most MAX_SMALL_FILE_BYTES. Raises UserError for a larger file."""

    def chunks(self, path: str, state: FileState) -> Iterator[bytes]:
        """Yield the content of a file. Raises UserError if the state of the file is no longer `state`."""

    def write(self, path: str, content: bytes) -> None:
        """Write a small file. The file appears with its whole content or not at all."""

    def delete(self, paths: Iterable[str]) -> None:
        """Delete the files. Missing files are ignored."""


class LocalFolder:
    """A folder of this machine's file system."""

    is_remote = False
    retries = 0

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)

    def is_empty(self) -> bool:
        """Return whether the folder contains no file except the lock file of an earlier command.

        See Folder.is_empty.
        """
        try:
            return all(name == ".lock" for name in os.listdir(self.root))
        except FileNotFoundError:
            return True

    def states(self, paths: Iterable[str]) -> dict[str, FileState]:
        """See Folder.states."""
        found = {}
        for path in paths:
            try:
                found[path] = self._state(path)
            except (FileNotFoundError, NotADirectoryError):
                continue
        return found

    def _state(self, path: str) -> FileState:
        status = (self.root / path).stat()
        return FileState(status.st_size, str(status.st_mtime_ns))

    def read(self, path: str) -> bytes:
        """See Folder.read."""
        advice = "Copy the store again, or build it again."
        return read_regular(self.root / path, MAX_SMALL_FILE_BYTES, advice)

    def chunks(self, path: str, state: FileState) -> Iterator[bytes]:
        """See Folder.chunks."""
        with open_regular(self.root / path) as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
        if self._state(path) != state:
            raise UserError(f"{self.root / path} changed while it was read. Run the same command again.")

    def write(self, path: str, content: bytes) -> None:
        """See Folder.write."""
        with self.disk_errors():
            (self.root / path).parent.mkdir(parents=True, exist_ok=True)
            if (self.root / path).is_dir():
                raise IsADirectoryError(errno.EISDIR, f"{path} is a folder, expected a file")
            write_atomic(self.root / path, content)

    def move_in(self, temporary: Path, path: str) -> None:
        """Move a file from a temporary path on the same disk to `path`. The file must already be synced to the disk."""
        final = self.root / path
        with self.disk_errors():
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, final)
            sync_folder(final.parent)

    def delete(self, paths: Iterable[str]) -> None:
        """See Folder.delete."""
        for path in paths:
            (self.root / path).unlink(missing_ok=True)

    def disk_errors(self) -> _DiskErrors:
        """Return a context manager that converts an OSError to DiskFull or UserError with advice to the user."""
        return _DiskErrors(self.name)


class _DiskErrors:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, OSError):
            text = f"{self.name}: {error.strerror or error}"
            advice = "Correct this error, then run the same command again. Files that have arrived are kept."
            raise disk_error(error, f"{text}. {advice}") from None

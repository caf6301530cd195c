"""Atomic file writes, so that no file is ever half-written, and locks, so that only one process uses a folder."""

from __future__ import annotations

import fcntl
import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from prep.console import UserError


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically: until the new content is complete, `path` keeps its old content or does not exist."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. The file appears at `path` only when it is complete.

    The file is written under a temporary name, synced and renamed. Then the folder is synced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


_LOCK_TRIES, _LOCK_RETRY_S = 5, 0.02


@contextmanager
def hold_lock(folder: Path, activity: str) -> Iterator[None]:
    """Hold the folder's lock during a `with` block.

    Raises UserError, with `activity` in its message, if another process holds the lock. The kernel releases the lock
    when the process ends, even after a crash.
    """
    with open(folder / ".lock", "a") as handle:
        for tries_left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # lock_is_held() in another process may hold the lock briefly: try again
                if not tries_left:
                    raise UserError(
                        f"{folder}: another {activity} is at work in this folder. "
                        "Wait until it ends, or name another folder."
                    ) from None
                time.sleep(_LOCK_RETRY_S)
        yield


def lock_is_held(folder: Path) -> bool:
    """Whether a process holds the folder's lock. The function takes a shared lock briefly and writes nothing.

    Raises OSError if the lock file cannot be opened.
    """
    try:
        with open(folder / ".lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def sync_folder(path: Path) -> None:
    """Sync a folder, so that a rename in the folder survives a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file atomically."""
    content = io.BytesIO()
    np.save(content, array)
    write_atomic(path, content.getvalue())

"""Files that are whole or not there, and folders that one process works in at a time."""

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
    """Write a file whole or not at all."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that is there whole or not at all: temporary name, fsync, rename, fsync of the folder."""
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


_LOCK_TRIES, _LOCK_TRY_S = 5, 0.02


@contextmanager
def hold_lock(folder: Path, activity: str) -> Iterator[None]:
    """Be the only one of `activity` in a folder; raises UserError where another is. Ends with the process."""
    with open(folder / ".lock", "a") as handle:
        for left in reversed(range(_LOCK_TRIES)):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # perhaps by lock_is_held, for a moment
                if not left:
                    raise UserError(
                        f"{folder}: another {activity} is at work in this folder. Wait for it, or name another."
                    ) from None
                time.sleep(_LOCK_TRY_S)
        yield


def lock_is_held(folder: Path) -> bool:
    """Whether someone holds hold_lock in a folder: asked by sharing the lock for a moment, which writes nothing.

    Raises OSError where the lock cannot be looked at.
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
    """Make a rename inside `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Write a .npy file whole or not at all."""
    content = io.BytesIO()
    np.save(content, array)
    write_atomic(path, content.getvalue())

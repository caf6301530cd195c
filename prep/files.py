"""Atomic file writes, so that no file is ever half-written, and locks, so that only one process uses a folder."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import click
import numpy as np
import numpy.typing as npt

from prep.console import UserError, WrongArgument, say
from prep.schema import open_regular

# Errors of flock on file systems without locks. Some file systems in user space raise EINVAL.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)


class LockHeld(UserError):
    """Another process holds the lock of the folder."""


def unique_suffix() -> str:
    """Return the suffix of a temporary name, `PID-HEX.tmp`, unique among all machines that share a file system."""
    return f"{os.getpid()}-{secrets.token_hex(4)}.tmp"


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file atomically: `path` keeps its old content, or does not exist, until the new content is complete."""
    with atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing. The file appears at `path` only when it is complete.

    The file is written under a temporary name, synced and renamed. The folder is synced afterwards.
    """
    temporary = path.with_name(f".{path.name}.{unique_suffix()}")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def check_extension(path: Path, option: str, extensions: Sequence[str], kind: str) -> None:
    """Raise WrongArgument unless a file name ends in one of `extensions`, such as `.png`, in upper or lower case.

    `option` and `kind` (for example `a figure is`) are parts of the message.
    """
    if path.suffix.lower() not in extensions:
        names = " or ".join(path.with_suffix(extension).name for extension in extensions[:2]) if path.name else ""
        advice = f"Name it {names}." if names else "Name a file."
        raise WrongArgument(f"{option} {path}: {kind} {' or '.join(extensions)}. {advice}".lstrip())


def check_output_file(path: Path, option: str = "") -> None:
    """Raise WrongArgument if a file cannot be written at `path`: the path is a folder, or its folder does not exist.

    `option` is the option that names the file, for the message.
    """
    name = f"{option} {path}".lstrip()
    if path.is_dir():
        raise WrongArgument(f"{name}: this is a folder. Name a file in it.")
    if not path.parent.is_dir():
        raise WrongArgument(f"{name}: there is no folder {path.parent}. Make this folder, or name another folder.")


def check_output_folder(path: Path, option: str = "") -> None:
    """Raise WrongArgument if the folder `path` cannot be made because `path` or one of its parents is a file.

    `option` is the option that names the folder, for the message.
    """
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not existing.is_dir():
        raise WrongArgument(f"{option} {path}: {existing} is a file, not a folder. Name another folder.".lstrip())


def output_file(
    *extensions: str, kind: str = "the file is"
) -> Callable[[click.Context, click.Parameter, Path | None], Path | None]:
    """Return a click callback for an option that names an output file.

    If the option is given, the callback checks the path with check_output_file. If `extensions` are given, the callback
    also checks with check_extension that the name ends in one of the extensions.
    """

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path is not None:
            option = parameter.opts[0] if isinstance(parameter, click.Option) else ""
            if extensions:
                check_extension(path, option, extensions, kind)
            check_output_file(path, option)
        return path

    return check


_LOCK_RETRY_S, _LOCK_WAIT_S = 0.02, 0.1
_uses_locks = True  # False within `without_locks`
_told_folders: set[Path] = set()  # folders for which this process has already printed the warning about missing locks


@contextmanager
def hold_lock(
    folder: Path, activity: str, *, name: str = ".lock", shared: bool = False, wait_s: float = _LOCK_WAIT_S
) -> Iterator[bool]:
    """Hold the lock of a folder during a `with` block. The function locks the file `name` in the folder.

    Several processes can hold a `shared` lock at the same time. A `shared` lock can be taken unless another process
    holds an exclusive lock. An exclusive lock (without `shared`) can be taken only if no other process holds any lock.
    If the lock cannot be taken at once, the function tries again for `wait_s` seconds. After this time the function
    raises LockHeld, with `activity` in the message. The kernel releases the lock when the process ends, even after a
    crash. On NFS and on most cluster file systems, the lock also excludes processes of other machines.

    The value of the `with` block is True if the folder is locked. The value is False within `without_locks` and on a
    file system without locks. Other processes can then work in the folder. On a file system without locks, a warning is
    printed once for each folder.
    """
    if not _uses_locks:
        yield False
        return
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    deadline = time.monotonic() + wait_s
    with open(folder / name, "a+") as handle:  # NFS permits a shared lock only if the file is open for reading
        is_held = False
        while not is_held:
            try:
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
                is_held = True
            except BlockingIOError:  # lock_is_held() in another process may hold the lock for a moment: try again
                if time.monotonic() > deadline:
                    raise LockHeld(
                        f"{folder}: another {activity} is at work in this folder. "
                        "Wait until the other command ends, or name another folder."
                    ) from None
                time.sleep(_LOCK_RETRY_S)
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                _tell_of_missing_locks(folder, activity, error)
                break
        yield is_held


def _tell_of_missing_locks(folder: Path, activity: str, error: OSError) -> None:
    if folder not in _told_folders:
        _told_folders.add(folder)
        say(
            f"{folder}: this file system has no locks ({error.strerror}), so a second {activity} in this folder would "
            "not be noticed. Start only one. Pass --no-lock to work without this warning, or mount the file system "
            "with locks (for Lustre: the option flock)."
        )


@contextmanager
def without_locks() -> Iterator[None]:
    """Make hold_lock lock nothing during a `with` block (option --no-lock)."""
    global _uses_locks
    before, _uses_locks = _uses_locks, False
    try:
        yield
    finally:
        _uses_locks = before


def _work_without_locks(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.with_resource(without_locks())


no_lock_option = click.option(
    "--no-lock",
    is_flag=True,
    expose_value=False,
    callback=_work_without_locks,
    help="Do not lock the folder into which the command writes. This option is for file systems without locks. Make "
    "sure that no second command writes into the folder at the same time.",
)


def lock_is_held(folder: Path) -> bool | None:
    """Return whether a process holds the folder's lock; None if this cannot be known.

    It cannot be known if the file system has no locks, or if there is no lock file within `without_locks`. The function
    takes a shared lock briefly and writes nothing. Raises OSError if the lock file cannot be opened.
    """
    try:
        with open_regular(folder / ".lock", "Remove it.") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:  # no process has ever locked the folder, or a process with --no-lock works in the folder
        return None if not _uses_locks else False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None
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
    header, values = io.BytesIO(), np.asarray(array, order="C")
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(values))
    with atomic_file(path) as file:
        file.write(header.getvalue())
        if values.size:  # the memoryview of an empty array cannot be cast to bytes
            file.write(values.data.cast("B"))

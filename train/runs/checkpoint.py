"""Checkpoints: one file, whole or not there, held to a digest, loaded without executing anything.

`checkpoint-00001500.pt` in the run folder is the state after step 1,500: parameters and velocity in the joined shapes,
schedule, stream, random generators, network, recipe, classes, the identity of the run and the version of the code.
Written to a temporary name, synced, renamed. It is the zip archive that torch.save writes; the archive's comment (the
end of APPNOTE 4.3.16) is the SHA-256 of every byte before it, so that one altered bit is found before anything is read.

The newest of them are kept, and as `best.pt` the one with the lowest validation error: a second name of the same file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from io import BufferedRandom
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch

from prep.console import DiskFull, UserError, disk_error, quoted, say
from prep.files import atomic_file, sync_folder

FORMAT = 2
KEPT = 2
BEST = "best.pt"
FULL_DISKS = 3  # checkpoints in a row that a full disk may prevent: then the run ends

_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_END_BYTES = 22  # of the record that ends a zip archive without a comment; its last two are the comment's length


class Unreadable(UserError):
    """A checkpoint that is torn, altered, or none."""


def path_of(run_dir: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run_dir / f"checkpoint-{step:08d}.pt"


def save(run_dir: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, and containers of these) as the checkpoint of `step`.

    Raises DiskFull where there is no room, UserError for another error of the disk: the checkpoints before are whole.
    """
    path = path_of(run_dir, step)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save({"format": FORMAT, **state}, file)
            _sign(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(run_dir)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch has an error of its own for it
        if not isinstance(cause, OSError):
            raise
        raise disk_error(
            cause,
            f"{path}: cannot be written ({cause.strerror or cause}). The checkpoints before it are whole: make room "
            "and give the same command again.",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


class Keeper:
    """The checkpoints of a run under way, and what each takes over from the one before it."""

    def __init__(self, run_dir: Path, keep: int, state: Mapping[str, Any] | None) -> None:
        """`state`: the checkpoint that the run goes on from. Removes and mends what a kill has left half done."""
        self.run_dir, self.keep = run_dir, keep
        self.best: dict[str, Any] | None = None if state is None else state["best"]  # step, top1_error in 0..1
        self.ancestry: list[dict[str, Any]] = [] if state is None else state["ancestry"]
        self._failures = 0
        for leftover in run_dir.glob(".*.tmp"):
            leftover.unlink()
        if state is not None:
            self._tidy(state["step"])

    def save(self, step: int, state: Mapping[str, Any], last: bool, before: Callable[[], None]) -> None:
        """Write a checkpoint, once `before` has written what it relies on, and remove those that are too many.

        A full disk is borne: the checkpoints before stay. Raises DiskFull when it is so for the third time in a row, or
        where the `last` one is at stake; UserError as `save`.
        """
        try:
            before()
            save(self.run_dir, step, {**state, "best": self.best, "ancestry": self.ancestry})
        except DiskFull as error:
            self._failures += 1
            if last or self._failures == FULL_DISKS:
                raise
            say(f"Warning: {error} Training goes on; failure {self._failures} of {FULL_DISKS} before it stops.")
            return
        self._failures = 0
        self._tidy(step)

    def validated(self, step: int, top1_error: float) -> None:
        """The checkpoint of `step` has this error: the lowest is kept."""
        path = path_of(self.run_dir, step)
        if path.exists() and (self.best is None or top1_error < self.best["top1_error"]):
            self.best = {"step": step, "top1_error": top1_error}
            self._keep_as_best(path)

    def _tidy(self, newest: int) -> None:
        """Have best.pt name the newest checkpoint where that is the best, and remove those that are too many."""
        path = path_of(self.run_dir, newest)
        if self.best is not None and self.best["step"] == newest:
            self._keep_as_best(path)
        for old in checkpoints(self.run_dir)[: -self.keep]:
            old.unlink()

    def _keep_as_best(self, path: Path) -> None:
        best = self.run_dir / BEST
        temporary = best.with_name(f".{BEST}.tmp")
        try:
            try:
                os.link(path, temporary)
                os.replace(temporary, best)
                sync_folder(self.run_dir)
            except OSError:  # a file system without links
                with open(path, "rb") as source, atomic_file(best) as file:
                    shutil.copyfileobj(source, file)
        except OSError as error:
            say(f"Warning: {best}: cannot be written ({error.strerror or error}); it is an earlier one, or not there.")
        finally:
            temporary.unlink(missing_ok=True)  # renaming a file to its own other name does nothing


def drop_after(run_dir: Path, step: int) -> None:
    """Remove checkpoints of later steps: a run that goes on from `step` found that they cannot be read."""
    for path in checkpoints(run_dir):
        if path > path_of(run_dir, step):
            path.unlink()


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, without the second name of the best, and others' files."""
    return sorted(run_dir.glob(f"checkpoint-{'[0-9]' * 8}.pt"))


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None where the run has none.

    One that cannot be read is named and passed over. Raises UserError where none of several can be read, or the newest
    is of another format, of another step than its name says, or another user's.
    """
    found = checkpoints(run_dir)
    for path in reversed(found):
        try:
            state = read(path)
        except Unreadable as error:
            if path not in checkpoints(run_dir):  # a run at work has newer ones by now
                return load_latest(run_dir)
            say(str(error) if path == found[0] else f"{error} The one before it is used.")
            continue
        named = path_of(run_dir, state["step"])
        if path != named:
            raise UserError(f"{path}: is of step {state['step']:,}. Name it {named.name}, or move it away.")
        return state
    if found:
        raise UserError(f"{run_dir}: none of its {len(found)} checkpoints can be read. Start a new --run-dir.")
    return None


def load(run_dir: Path, which: str = "last") -> dict[str, Any]:
    """The checkpoint `which` of a run: last, best, or the path of a file, as it is or inside the run folder.

    Raises UserError where there is none, or it cannot be read.
    """
    if which == "last":
        state = load_latest(run_dir)
        if state is None:
            raise UserError(f"{run_dir}: no checkpoint in it. Train it with: alextrain run --run-dir {quoted(run_dir)}")
        return state
    path = run_dir / BEST if which == "best" else Path(which)
    if which == "best" and not path.exists():
        raise UserError(f"{path}: not there, for no checkpoint of the run has been validated. Ask for last.")
    if not path.is_file() and (run_dir / path).is_file():
        path = run_dir / path
    if not path.is_file():
        raise UserError(f"--checkpoint {which}: no such file, here or in {run_dir}. Ask for best, last or a file.")
    return read(path)


def read(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU, and under `digest` the SHA-256 that it was held to.

    Raises Unreadable for a file that is not, to the bit, what was written; UserError for one of another format, or that
    may not be read; what torch raises where a whole file cannot be held, as for want of memory.
    """
    whole = False
    try:
        with open(path, "rb") as file:  # once: a run at work may put another under this name
            told, digest = _digests(file)
            whole = told == digest
            if whole or not told:  # format 1 had no digest
                file.seek(0)
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                if state.get("format") != FORMAT:
                    raise UserError(
                        f"{path}: checkpoint format {state.get('format')}, this program reads {FORMAT}. Read it with "
                        "the alexnet release that wrote it."
                    )
                if whole:
                    return {**state, "digest": digest}
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Ask its owner.") from None
    except Exception as error:  # a torn file makes torch raise many kinds, some with advice that is not ours
        if whole and not isinstance(error, UnpicklingError):
            raise
    raise Unreadable(f"{path}: torn, altered or not a checkpoint.")


def _sign(file: BufferedRandom) -> None:
    """Give a zip archive the comment that `read` holds it to."""
    file.seek(-_END_BYTES, os.SEEK_END)
    end = file.read()
    assert end.startswith(b"PK\5\6") and end.endswith(b"\0\0")
    file.seek(-2, os.SEEK_END)
    file.write(_COMMENT_BYTES.to_bytes(2, "little"))
    file.seek(0)
    digest = hashlib.file_digest(file, "sha256").hexdigest()
    file.seek(0, os.SEEK_END)
    file.write(_MARK + digest.encode())


def _digests(file: BinaryIO) -> tuple[str, str]:
    """(the digest that a file says, empty where it says none; the digest of what is before it), in hex."""
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size - _COMMENT_BYTES
    while left > 0:
        part = file.read(min(left, 1 << 20))
        if not part:
            break
        digest.update(part)
        left -= len(part)
    comment = file.read(_COMMENT_BYTES)
    told = comment[len(_MARK) :].decode("ascii", "replace") if comment.startswith(_MARK) else ""
    return told, digest.hexdigest()

"""Checkpoints: one file each, written whole or not at all, verified by a digest, loaded without executing code.

`checkpoint-00001500.pt` in the run folder is the state of a run after step 1,500; `Checkpoint` lists its fields. Only
`write` writes one and only `read` reads one.

The file is the zip archive that torch.save writes, under a temporary name until it is synced. The archive's comment
(the end of APPNOTE 4.3.16) is the SHA-256 of every byte before it, so that one altered bit is found before anything is
loaded. A run keeps its newest checkpoints, and as `best.pt`, a second name of the same file, the one with the lowest
validation error.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from io import BufferedRandom
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prep.console import DiskFull, UserError, disk_error, say, shell_quoted
from prep.files import atomic_file, sync_folder

FORMAT = 2  # of the file: raised when the fields of Checkpoint change their meaning
BEST = "best.pt"
MAX_DISK_FULL = 3  # checkpoints in a row that may fail because the disk is full; then the run ends

_MARK = b"sha256:"
_COMMENT_BYTES = len(_MARK) + 64
_END_BYTES = 22  # of the record that ends a zip archive without a comment; its last two are the comment's length


class UnreadableCheckpoint(UserError):
    """A file that is torn, altered, or not a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step`: all that decides what comes next, and all that is needed to use the network.

    The fields are the keys of the file, beside "format". Tensors are on the CPU.
    """

    identity: Mapping[str, Any]  # of the run (train/config/identity.py)
    model: Mapping[str, Any]  # the Architecture, as JSON
    recipe: Mapping[str, Any]  # the Recipe with its sources, as JSON
    classes: Sequence[str]  # names; a label is an index into them
    environment: Mapping[str, str]  # versions of the software that wrote it

    step: int  # steps made
    steps_per_epoch: int
    validation_due: bool  # the epoch has ended and its validation has not been made
    parameters: Mapping[str, Tensor]  # by joined name, in the shapes of the network without columns
    velocity: Mapping[str, Tensor]  # the same for the optimizer's velocity
    schedule: Mapping[str, Any]  # Schedule.state_dict
    devices: Sequence[str]  # that the random generators belong to; empty: generators begin anew
    random: Tensor  # state of torch's generator on the CPU
    random_cuda: Sequence[Tensor]  # states of the generators of the GPUs, in the order of the columns
    stream: Mapping[str, Any]  # TrainLoader.state_dict

    best: Mapping[str, Any] | None = None  # {"step", "top1_error"} of the lowest validation error so far
    ancestry: Sequence[Mapping[str, Any]] = ()  # checkpoints that a forked run began with, the oldest first
    digest: str = ""  # SHA-256 (hex) that the file was verified by; empty before it is written; not in the file


def path_of(run_dir: Path, step: int) -> Path:
    """The path of the checkpoint of a step."""
    return run_dir / f"checkpoint-{step:08d}.pt"


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """The checkpoints in a run folder, oldest first; best.pt and files of other names are left out."""
    return sorted(run_dir.glob(f"checkpoint-{'[0-9]' * 8}.pt"))


def write(run_dir: Path, state: Checkpoint) -> Path:
    """Write the checkpoint of `state.step` into a run folder; returns its path.

    Raises DiskFull if there is no room, UserError for another error of the disk. Earlier checkpoints stay whole.
    """
    path = path_of(run_dir, state.step)
    content = {field.name: getattr(state, field.name) for field in fields(state) if field.name != "digest"}
    content |= {"classes": list(state.classes), "devices": list(state.devices), "ancestry": list(state.ancestry)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save({"format": FORMAT, **content}, file)
            _append_digest(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(run_dir)
    except (OSError, RuntimeError) as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch wraps an OSError in its own
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


def read(path: Path) -> Checkpoint:
    """Read the file that `write` wrote, its tensors on the CPU.

    Raises UnreadableCheckpoint for a file that is not, to the bit, what was written; UserError for another format, a
    missing field, or a file that may not be read. What torch raises when an intact file cannot be loaded, for example
    when memory runs out, passes through.
    """
    intact = False
    try:
        with open(path, "rb") as file:  # opened once: a running training may replace the file under this name
            stated, actual = _digests(file)
            intact = stated == actual
            if intact or not stated:  # format 1 had no digest: it is loaded to name its format
                file.seek(0)
                content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                if content.get("format") != FORMAT:
                    raise UserError(
                        f"{path}: checkpoint format {content.get('format')}, this program reads {FORMAT}. Read it with "
                        "the alexnet release that wrote it."
                    )
                if intact:
                    return _checkpoint(path, content, actual)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Ask its owner.") from None
    except Exception as error:  # a torn file makes torch raise many types, some with advice that does not apply
        if intact and not isinstance(error, UnpicklingError):
            raise
    raise UnreadableCheckpoint(f"{path}: torn, altered or not a checkpoint.")


def _checkpoint(path: Path, content: Mapping[str, Any], digest: str) -> Checkpoint:
    names = {field.name for field in fields(Checkpoint)} - {"digest"}
    missing = sorted(names - set(content))
    if missing:
        raise UserError(f"{path}: the checkpoint has no {', '.join(missing)}. Read it with the release that wrote it.")
    return Checkpoint(**{name: content[name] for name in names}, digest=digest)


class CheckpointKeeper:
    """Writes the checkpoints of a run in progress, keeps the newest and the best, and removes the others."""

    def __init__(self, run_dir: Path, keep: int, resumed: Checkpoint | None) -> None:
        """Remove temporary files that a kill has left, and repair best.pt.

        keep     checkpoints to keep, beside the best
        resumed  the checkpoint that the run continues from, None for a new run
        """
        self.run_dir, self.keep = run_dir, keep
        self.best: Mapping[str, Any] | None = None if resumed is None else resumed.best
        self.ancestry: Sequence[Mapping[str, Any]] = () if resumed is None else resumed.ancestry
        self._failures = 0
        for leftover in run_dir.glob(".*.tmp"):
            leftover.unlink()
        if resumed is not None:
            self._tidy(resumed.step)

    def save(self, state: Checkpoint, is_last: bool, before: Callable[[], None] = lambda: None) -> None:
        """Write a checkpoint, after `before` has written what it relies on, and remove those that are too many.

        Best step and ancestry are filled in. A full disk is tolerated: the checkpoints before stay. Raises DiskFull at
        the third failure in a row, or when `is_last` and nothing would be kept of the last steps; UserError as `write`.
        """
        try:
            before()
            write(self.run_dir, replace(state, best=self.best, ancestry=self.ancestry))
        except DiskFull as error:
            self._failures += 1
            if is_last or self._failures == MAX_DISK_FULL:
                raise
            say(f"Warning: {error} Training goes on; failure {self._failures} of {MAX_DISK_FULL} before it stops.")
            return
        self._failures = 0
        self._tidy(state.step)

    def record_validation(self, step: int, top1_error: float) -> None:
        """Keep the checkpoint of `step` as best.pt if its top-1 error (0..1) is the lowest so far."""
        path = path_of(self.run_dir, step)
        if path.exists() and (self.best is None or top1_error < self.best["top1_error"]):
            self.best = {"step": step, "top1_error": top1_error}
            self._keep_as_best(path)

    def _tidy(self, newest: int) -> None:
        """Make best.pt name the newest checkpoint if that is the best, and remove checkpoints that are too many."""
        path = path_of(self.run_dir, newest)
        if self.best is not None and self.best["step"] == newest:
            self._keep_as_best(path)
        for old in checkpoint_paths(self.run_dir)[: -self.keep]:
            old.unlink()

    def _keep_as_best(self, path: Path) -> None:
        best = self.run_dir / BEST
        temporary = best.with_name(f".{BEST}.tmp")
        try:
            try:
                os.link(path, temporary)
                os.replace(temporary, best)
                sync_folder(self.run_dir)
            except OSError:  # a file system without hard links
                with open(path, "rb") as source, atomic_file(best) as file:
                    shutil.copyfileobj(source, file)
        except OSError as error:
            say(f"Warning: {best}: cannot be written ({error.strerror or error}). It is an earlier one, or missing.")
        finally:
            temporary.unlink(missing_ok=True)  # renaming a file to a hard link of itself does nothing


def drop_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints of later steps: a run that resumes from `step` has found that they cannot be read."""
    for path in checkpoint_paths(run_dir):
        if path > path_of(run_dir, step):
            path.unlink()


def load_latest(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint of a run that can be read; None if the run folder has no checkpoint.

    A file that cannot be read is named on standard error and skipped. Raises UserError if there are files and none can
    be read, or if the newest is of another format, of another step than its name says, or not readable by this user.
    """
    paths = checkpoint_paths(run_dir)
    for path in reversed(paths):
        try:
            state = read(path)
        except UnreadableCheckpoint as error:
            if path not in checkpoint_paths(run_dir):  # a running training has replaced it by a newer one
                return load_latest(run_dir)
            say(str(error) if path == paths[0] else f"{error} The one before it is used.")
            continue
        expected = path_of(run_dir, state.step)
        if path != expected:
            raise UserError(f"{path}: is of step {state.step:,}. Name it {expected.name}, or move it away.")
        return state
    if paths:
        raise UserError(f"{run_dir}: none of its {len(paths)} checkpoints can be read. Start a new --run-dir.")
    return None


def load(run_dir: Path, which: str = "last") -> Checkpoint:
    """The checkpoint `which` of a run: "last", "best", or the path of a file, relative to here or to the run folder.

    Raises UserError if it does not exist or cannot be read.
    """
    if which == "last":
        state = load_latest(run_dir)
        if state is None:
            raise UserError(
                f"{run_dir}: no checkpoint in it. Train it with: alextrain run --run-dir {shell_quoted(run_dir)}"
            )
        return state
    path = run_dir / BEST if which == "best" else Path(which)
    if which == "best" and not path.exists():
        raise UserError(f"{path}: does not exist: no checkpoint of the run has been validated. Ask for last.")
    if not path.is_file() and (run_dir / path).is_file():
        path = run_dir / path
    if not path.is_file():
        raise UserError(f"--checkpoint {which}: no such file, here or in {run_dir}. Ask for best, last or a file.")
    return read(path)


def _append_digest(file: BufferedRandom) -> None:
    """Append the archive comment that `read` verifies: the SHA-256 of every byte before it."""
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
    """(digest that the file states, empty if it states none; digest of the bytes before it), in hex."""
    digest = hashlib.sha256()
    left = os.fstat(file.fileno()).st_size - _COMMENT_BYTES
    while left > 0:
        block = file.read(min(left, 1 << 20))
        if not block:
            break
        digest.update(block)
        left -= len(block)
    comment = file.read(_COMMENT_BYTES)
    stated = comment[len(_MARK) :].decode("ascii", "replace") if comment.startswith(_MARK) else ""
    return stated, digest.hexdigest()

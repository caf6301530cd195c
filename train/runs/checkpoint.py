"""Checkpoint files: written atomically, verified by a digest, loaded without executing code.

`checkpoint-00001500.pt` in the run folder holds the state of a run after step 1,500. `Checkpoint` lists the fields of
the state. All checkpoint files are written by `write` and read by `read`.

A checkpoint file is the zip archive that torch.save writes. The file has a temporary name until it is synced to disk.
The archive comment (last field of 4.3.16 in the zip specification APPNOTE) is the SHA-256 of all bytes before it. If a
single bit of a file is altered, `read` therefore rejects the file. A run keeps its newest checkpoints and the
checkpoint with the lowest validation error. `best.pt` is a hard link to the checkpoint with the lowest validation
error, or a copy if the file system has no hard links.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from prep.console import DiskFull, UserError, WrongArgument, did_you_mean, disk_error, say, shell_quoted
from prep.files import atomic_file, sync_folder
from prep.schema import open_regular
from prep.schema.check import shown
from train.formats.archive_digest import append_digest, digests
from train.formats.checked_load import check_finite, check_generator_state, load_tensors
from train.formats.checkpoint_file import ADVICE, TENSORS, check_content
from train.formats.pickled_values import UnsafeFile
from train.formats.torch_file import read_content

FORMAT = 2  # version of the file format, incremented when fields of Checkpoint change their meaning
BEST = "best.pt"
MAX_DISK_FULL = 3  # the run ends when this number of checkpoints in a row cannot be written because the disk is full


class UnreadableCheckpoint(UserError):
    """Raised for a file that is incomplete, altered, or not a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after `step`: everything that is needed to continue the run and to use the network.

    The file holds a dict with the key "format" and a key for each field except `digest`. Tensors are on the CPU.
    """

    identity: Mapping[str, Any]  # identity of the run (train/config/identity.py)
    model: Mapping[str, Any]  # the Architecture, as JSON
    recipe: Mapping[str, Any]  # the Recipe with its sources, as JSON
    classes: Sequence[str]  # names of the classes; labels are indices into this list
    environment: Mapping[str, str]  # versions of the software that wrote the checkpoint

    step: int  # number of steps that the run has completed
    steps_per_epoch: int
    validation_due: bool  # True if an epoch ended at `step`, and its validation has not been computed yet
    parameters: Mapping[str, Tensor]  # parameters by name, joined over the columns (AlexNet.joined_tensors)
    velocity: Mapping[str, Tensor]  # velocity of the optimizer by parameter name, joined like the parameters
    schedule: Mapping[str, Any]  # Schedule.state_dict
    # Devices of the columns. The random generators are seeded anew if the run resumes on other devices, or if `devices`
    # is empty.
    devices: Sequence[str]
    random: Tensor  # state of torch's generator on the CPU
    random_cuda: Sequence[Tensor]  # states of the generators of the GPUs, in the order of the columns
    stream: Mapping[str, Any]  # TrainLoader.state_dict

    best: Mapping[str, Any] | None = None  # {"step", "top1_error"} of the validation with the lowest top-1 error
    # Checkpoints from which the run and its ancestors were forked, the oldest first.
    ancestry: Sequence[Mapping[str, Any]] = ()
    # Verified SHA-256 (hex) from the archive comment of the file that was read; "" in a new Checkpoint.
    digest: str = ""


# Keys of the dict in a checkpoint file, in addition to "format".
_FIELDS = tuple(field.name for field in fields(Checkpoint) if field.name != "digest")


def path_of(run_dir: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return run_dir / f"checkpoint-{step:08d}.pt"


def checkpoint_paths(run_dir: Path) -> list[Path]:
    """Return the paths of the checkpoints in a run folder, oldest first. best.pt and other names are left out."""
    return sorted(run_dir.glob(f"checkpoint-{'[0-9]' * 8}.pt"))


def write(run_dir: Path, state: Checkpoint) -> Path:
    """Write `state` as a checkpoint file in a run folder, and return the path of the file.

    Raises DiskFull if there is no disk space, and UserError for any other disk error. Earlier checkpoints stay intact.
    """
    path = path_of(run_dir, state.step)
    content = {name: getattr(state, name) for name in _FIELDS}
    content |= {"classes": list(state.classes), "devices": list(state.devices), "ancestry": list(state.ancestry)}
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            torch.save({"format": FORMAT, **content}, file)
            append_digest(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(run_dir)
    except (OSError, RuntimeError) as error:
        # If a write fails, torch.save raises a RuntimeError whose context is the OSError.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise disk_error(
            cause,
            f"{path}: cannot be written ({cause.strerror or cause}). Earlier checkpoints are intact. Free disk space, "
            "and run the same command again.",
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    return path


def read(path: Path) -> Checkpoint:
    """Read a checkpoint file that `write` wrote. The tensors are on the CPU.

    The content is checked before a tensor is allocated (train/formats/checkpoint_file.py). The types and ranges of all
    values must be valid. The names, shapes and types of the tensors must be those of the checkpoint's architecture.

    Raises UnreadableCheckpoint if any bit differs from the written file, or if the file cannot be read. Raises
    UserError for another version of the format, for content that no run writes, and for a missing read permission.
    Raises UserError if torch cannot load the tensors, for example because memory runs out.
    """
    try:
        with open_regular(path, ADVICE) as file:
            stated, actual = digests(file)
            if stated == actual:
                return _read_intact(path, file, actual)
            if not stated:
                _refuse_older_format(path, file)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). Ask the owner of the file.") from None
    except OSError:
        pass
    raise UnreadableCheckpoint(f"{path}: incomplete, altered or not a checkpoint.")


def _refuse_older_format(path: Path, file: BinaryIO) -> None:
    """Raise UserError if a file without a digest is a checkpoint of another format. Format 1 had no digest."""
    try:
        content = read_content(file)
    except UnsafeFile:
        return
    if isinstance(content, dict) and "format" in content:
        _check_format(path, content)


def _check_format(path: Path, content: Mapping[str, Any]) -> None:
    written = content.get("format")
    if type(written) is not int or written != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {shown(written)}, this program reads {FORMAT}. Read the file with the alexnet "
            "release that wrote the file."
        )


def _read_intact(path: Path, file: BinaryIO, digest: str) -> Checkpoint:
    """Return the checkpoint of a file whose digest is correct.

    Anyone can write a correct digest, so the content is checked too.
    """
    try:
        content = read_content(file)
    except UnsafeFile as error:
        raise UserError(f"{path}: holds {error}. {ADVICE}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {ADVICE}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {shown(content)}, expected the values of a checkpoint. {ADVICE}")
    _check_format(path, content)
    missing = sorted(set(_FIELDS) - set(content))
    if missing:
        raise UserError(
            f"{path}: the checkpoint has no {', '.join(missing)}. Read the checkpoint with the release that wrote it."
        )
    values = {name: content[name] for name in _FIELDS}
    check_content(values, str(path), random_bytes=torch.get_rng_state().numel())
    values |= load_tensors(file, {name: values[name] for name in TENSORS}, str(path), ADVICE)
    for part in ("parameters", "velocity"):
        check_finite(values[part], f"{path}: {part}", ADVICE)
    check_generator_state(values["random"], f"{path}: random", ADVICE)
    return Checkpoint(**values, digest=digest)


class CheckpointKeeper:
    """Writes the checkpoints of a run in progress.

    Keeps the newest and the best checkpoints, and removes all other checkpoints.
    """

    def __init__(self, run_dir: Path, keep: int, resumed: Checkpoint | None) -> None:
        """Remove the temporary files of a killed process, and repair best.pt.

        keep     number of newest checkpoints to keep, in addition to the best checkpoint
        resumed  the checkpoint from which the run continues; None for a new run
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
        """Write `state` as a checkpoint, and then remove old checkpoints. Fills in the fields `best` and `ancestry`.

        is_last  True if the run ends with this checkpoint
        before   function that is called before the checkpoint is written, such as MetricsLog.sync

        If the disk is full, a warning is printed, and earlier checkpoints are kept. Raises DiskFull at the third
        failure in a row. If `is_last`, DiskFull is raised at the first failure, because the last steps would be lost.
        Raises UserError for any other disk error.
        """
        try:
            before()
            write(self.run_dir, replace(state, best=self.best, ancestry=self.ancestry))
        except DiskFull as error:
            self._failures += 1
            if is_last or self._failures == MAX_DISK_FULL:
                raise
            say(
                f"Warning: {error} Training continues. This is failure {self._failures} in a row; training stops at "
                f"failure {MAX_DISK_FULL}."
            )
            return
        self._failures = 0
        self._tidy(state.step)

    def record_validation(self, step: int, top1_error: float) -> None:
        """Keep the checkpoint of `step` as best.pt if `top1_error` (0..1) is the lowest of the run so far."""
        path = path_of(self.run_dir, step)
        if path.exists() and (self.best is None or top1_error < self.best["top1_error"]):
            self.best = {"step": step, "top1_error": top1_error}
            self._keep_as_best(path)

    def _tidy(self, newest: int) -> None:
        """If the newest checkpoint has the lowest error, make best.pt a link to this checkpoint.

        Remove surplus checkpoints.
        """
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
            except OSError:  # the file system has no hard links
                with open(path, "rb") as source, atomic_file(best) as file:
                    shutil.copyfileobj(source, file)
        except OSError as error:
            say(
                f"Warning: {best}: cannot be written ({error.strerror or error}). If there is an earlier best.pt, it "
                "is kept."
            )
        finally:
            temporary.unlink(missing_ok=True)  # if both names are links to one file, os.replace keeps `temporary`


def drop_after(run_dir: Path, step: int) -> None:
    """Remove the checkpoints after `step`. The removed checkpoints are damaged, so `load_latest` skipped them."""
    for path in checkpoint_paths(run_dir):
        if path > path_of(run_dir, step):
            path.unlink()


def load_latest(run_dir: Path) -> Checkpoint | None:
    """Return the newest intact checkpoint of a run; None if the run folder has no checkpoint.

    A damaged file is reported on standard error and skipped. Raises UserError if all files are damaged. Raises
    UserError if the newest intact file has an unknown format, or if its step is not the step in its name. Raises
    UserError if a file cannot be opened for lack of read permission.
    """
    paths = checkpoint_paths(run_dir)
    for path in reversed(paths):
        try:
            state = read(path)
        except UnreadableCheckpoint as error:
            if path not in checkpoint_paths(run_dir):  # the training process has removed this file
                return load_latest(run_dir)
            say(str(error) if path == paths[0] else f"{error} An older checkpoint is used.")
            continue
        expected = path_of(run_dir, state.step)
        if path != expected:
            raise UserError(f"{path}: holds step {state.step:,}. Rename the file to {expected.name}, or move it away.")
        return state
    if paths:
        raise UserError(f"{run_dir}: none of its {len(paths)} checkpoints can be read. Name a new --run-dir.")
    return None


def load(run_dir: Path, which: str = "last") -> Checkpoint:
    """Return the checkpoint `which` of a run: "last", "best" or the path of a file.

    A relative path is looked up in the working directory, then in the run folder. Raises UserError if the checkpoint
    does not exist or cannot be read.
    """
    if which == "last":
        state = load_latest(run_dir)
        if state is None:
            raise UserError(
                f"{run_dir}: has no checkpoint. Train the run with: alextrain run --run-dir {shell_quoted(run_dir)}"
            )
        return state
    path = run_dir / BEST if which == "best" else Path(which)
    if which == "best" and not path.exists():
        raise UserError(
            f"{path}: no such file, because no checkpoint of the run has been validated. Pass --checkpoint last."
        )
    if not path.is_file() and (run_dir / path).is_file():
        path = run_dir / path
    if not path.is_file():
        raise WrongArgument(
            f"--checkpoint {which}: no such file in the working directory or in {run_dir}. Pass best, last or a file."
            + did_you_mean(which, ["best", "last"])
        )
    return read(path)

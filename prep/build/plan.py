"""Build plan of a split: its inputs in record order, their division into shards, and the finished shards."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import numpy as np
import numpy.typing as npt
from PIL import features

from prep.build.limits import DEFAULT_LIMITS, InputLimits
from prep.build.shard_task import ShardTask, summary_path
from prep.console import UserError
from prep.files import write_atomic
from prep.images.codec import BadImage
from prep.inputs.reader import Source
from prep.schema import shown
from prep.store.extra import Column
from prep.store.manifest import Settings, digest_json
from prep.store.models import MAX_CLASS_NAME, MAX_CLASSES
from prep.store.work_files import CrashCounts, SlowInputs, Summary, read_summary, read_work_file
from prep.version import package_version

T = TypeVar("T")

MAX_SHARD_RECORDS = 4096  # a shard of this length has about 100 MB of JPEG; one core builds it in about 10 s
CRASHED_TWICE = "killed the process that read it, twice"  # why an input is bad if it crashed two workers
_MIN_SHARD_RECORDS, _MIN_SHARDS = 64, 32  # a small split has shorter shards, so that all cores have work


@dataclass(frozen=True)
class BuildPolicy:
    """Options of a build: treatment of bad inputs and of an unfinished earlier build."""

    skip_bad: bool = False  # whether bad inputs are left out; if False, the first bad input stops the build
    max_bad: int | None = None  # the build stops when more than `max_bad` inputs are bad; None: no limit
    restart: bool = False  # whether an unfinished build is discarded
    allow_empty_classes: bool = False  # whether a class may lose all its photographs because they are bad
    limits: InputLimits = DEFAULT_LIMITS  # limits of the inputs that are kept

    def allows(self, bad: int) -> bool:
        """Return whether a build with this number of bad inputs continues."""
        return not bad or (self.skip_bad and (self.max_bad is None or bad <= self.max_bad))


DEFAULT_POLICY = BuildPolicy()


class BuildPlan:
    """The inputs of a split in record order, their division into shards of similar length, and the state of the build.

    The state of the build is in files in `work_dir` (see prep/build/split.py). Shards are numbered from 0.
    """

    def __init__(
        self, source: Source, folder: Path, settings: Settings, skip_bad: bool, limits: InputLimits | None = None
    ) -> None:
        """If `limits` is None, a finished shard is kept even if it was built with other limits.

        Raises UserError if a store cannot have the classes of `source`.
        """
        _check_classes(source.classes)
        self.source, self.folder, self.settings, self.skip_bad = source, folder, settings, skip_bad
        self.limits = limits
        self.work_dir = folder / ".build"
        self.boundaries = shard_boundaries(len(source.inputs))
        self.shard_count = len(self.boundaries) - 1
        # Identity of the unfinished build, from plan.json. A summary of another build is ignored, because a process of
        # a killed build can still write files for a moment after a new build has begun.
        self.build_id = ""
        self.digest = digest_json(
            {"settings": settings.to_json(), "classes": source.classes, "inputs": source.inputs.digest()}
        )

    @cached_property
    def permutation(self) -> npt.NDArray[np.int64]:
        """The record order, as indices into `source.inputs`."""
        return self.source.inputs.permutation(self.settings.seed)

    def extra_columns(self) -> dict[str, Column]:
        """Return {name: column} of the source's extra fields. A column has one row for each input, in record order."""
        return {name: column.take(self.permutation) for name, column in self.source.extra.items()}

    @cached_property
    def extra_digests(self) -> dict[str, str]:
        """{name: digest} of the extra fields. `digest` leaves them out, so that a finished split can get new fields."""
        return {name: column.digest() for name, column in self.extra_columns().items()}

    def task(self, number: int) -> ShardTask:
        """Return the task of shard `number` for the worker process that builds the shard."""
        start = self.boundaries[number]
        inputs = tuple(self.source.inputs[index] for index in self.input_indices(number))
        return ShardTask(
            number,
            start,
            inputs,
            self.source.reader,
            self.source.split,
            self.folder,
            self.settings,
            self.skip_bad,
            self._unreadable() if self.skip_bad else {},
            self.build_id,
            self.limits or DEFAULT_LIMITS,
        )

    def input_indices(self, number: int) -> list[int]:
        """Return the inputs of shard `number` in record order, as indices into `source.inputs`."""
        indices: list[int] = self.permutation[self.boundaries[number] : self.boundaries[number + 1]].tolist()
        return indices

    def sorted_input_indices(self, shard_numbers: Sequence[int]) -> Sequence[int]:
        """Return the inputs of some shards in the order of the listing, as indices into `source.inputs`."""
        if len(shard_numbers) == self.shard_count:
            return range(len(self.source.inputs))
        indices = [self.permutation[self.boundaries[s] : self.boundaries[s + 1]] for s in shard_numbers]
        return array("q", np.sort(np.concatenate(indices)).tobytes())

    def count_inputs(self, shard_numbers: Iterable[int]) -> int:
        """Return the number of inputs in the shards `shard_numbers`."""
        return sum(self.boundaries[number + 1] - self.boundaries[number] for number in shard_numbers)

    def crash_counts(self) -> dict[str, int]:
        """Return {path of an input: number of workers that crashed at this input}, over all runs of the build."""
        return self._read_counts("deaths.json", CrashCounts)

    def record_crash(self, path: str) -> None:
        """Add one to the number of crashes at the input `path`."""
        counts = self.crash_counts()
        counts[path] = counts.get(path, 0) + 1
        write_atomic(self.work_dir / "deaths.json", json.dumps(counts).encode())

    def record_slow_input(self, path: str, seconds: float) -> None:
        """Record that a worker process was ended because it used more than `seconds` of CPU time for an input."""
        slow = self._read_counts("slow.json", SlowInputs)
        write_atomic(self.work_dir / "slow.json", json.dumps({**slow, path: seconds}).encode())

    def has_recorded_faults(self) -> bool:
        """Return whether an earlier run of the build has noted an input that crashed a worker or was too slow."""
        return any((self.work_dir / name).exists() for name in ("deaths.json", "slow.json"))

    def _unreadable(self) -> dict[str, BadImage]:
        """Return {path: reason} of the inputs to leave out: those that crashed two workers or are too slow."""
        limits = self.limits or DEFAULT_LIMITS
        slow = self._read_counts("slow.json", SlowInputs).items()
        reasons = {path: limits.too_slow() for path, seconds in slow if 0 < limits.time_limit_s <= seconds}
        crashes = self.crash_counts().items()
        return reasons | {path: BadImage(CRASHED_TWICE) for path, n in crashes if n > 1}

    def _read_counts(self, name: str, type_: type[T]) -> T:
        try:
            return read_work_file(type_, self.work_dir / name, max_bytes=64 << 20)
        except (FileNotFoundError, UserError):  # a missing or damaged file counts as empty
            return type_()

    def sample(self, shard_numbers: Sequence[int], count: int = 16) -> list[ShardTask]:
        """Return tasks for a sample of up to 2·`count` inputs, spread evenly over the shards `shard_numbers`."""
        if not shard_numbers:
            return []
        chosen = dict.fromkeys(shard_numbers[len(shard_numbers) * k // count] for k in range(count))
        tasks = []
        for number in chosen:
            task = self.task(number)
            share = -(-count // len(chosen))
            step = max(1, len(task.inputs) // share)
            tasks.append(replace(task, inputs=task.inputs[::step][:share], skip_bad=True))
        return tasks

    def shard_summary(self, number: int) -> Summary | None:
        """Return the summary of shard `number`; None if a file is missing, damaged or from another build."""
        path = summary_path(self.folder, number)
        try:
            summary = read_summary(path, self.source.split, len(self.source.classes))
            size = (self.folder / f"{number:05d}" / "data.mdb").stat().st_size
        except (FileNotFoundError, UserError):
            return None
        is_whole = path.with_suffix(".npy").exists() and size >= summary["shard"]["bytes"]
        return summary if is_whole and summary.get("build", "") == self.build_id else None

    def has_finished_shards(self) -> bool:
        """Return whether `work_dir` has a summary of at least one shard. The summary may belong to another plan."""
        return any(self.work_dir.glob("[0-9]*.json"))

    def is_finished(self, number: int) -> bool:
        """Return whether shard `number` is finished and need not be built again.

        Without `skip_bad`, a shard is built again if a bad input was left out of it, because the bad input may have
        been corrected. A shard is also built again if the limits would now keep an input that was left out, or leave
        out an input that was kept.
        """
        summary = self.shard_summary(number)
        if summary is None or (not self.skip_bad and bad_outcomes(summary["fates"])):
            return False
        return self.limits is None or not self.limits.find_changed(summary["fates"], summary.get("largest_px", 0))

    def count_bad_inputs(self, shard_numbers: Iterable[int]) -> int:
        """Return the number of bad inputs that were left out of the finished shards among `shard_numbers`."""
        summaries = [self.shard_summary(number) for number in shard_numbers if self.is_finished(number)]
        return sum(len(bad_outcomes(summary["fates"])) for summary in summaries if summary is not None)

    def refresh(self) -> None:
        """List the folders, so that an NFS client notices files that other machines have created."""
        for folder in (self.folder, self.work_dir):
            if folder.exists():
                os.listdir(folder)


def _check_classes(classes: Sequence[str]) -> None:
    """Raise UserError if Store.open would refuse the number of classes or the length of a name."""
    if len(classes) > MAX_CLASSES:
        raise UserError(f"{len(classes):,} classes, expected at most {MAX_CLASSES:,}. Join some of the classes.")
    name = next((name for name in classes if not 1 <= len(name) <= MAX_CLASS_NAME), None)
    if name is not None:
        raise UserError(
            f"the class {shown(name)} has a name of {len(name):,} characters, expected 1 to {MAX_CLASS_NAME:,}. Change "
            "the name of the class."
        )


def shard_boundaries(count: int) -> list[int]:
    """Return boundaries of shards of similar length: shard s has the records boundaries[s] to boundaries[s + 1] − 1."""
    length = min(MAX_SHARD_RECORDS, max(_MIN_SHARD_RECORDS, -(-count // _MIN_SHARDS)))
    shard_count = -(-count // length)
    return [count * s // shard_count for s in range(shard_count + 1)] if count else [0]


def bad_outcomes(outcomes: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the outcomes (lines of inputs.jsonl) of the bad inputs, which were left out."""
    return [outcome for outcome in outcomes if outcome["fate"] == "bad"]


def no_image_error(source: Source, first_reason: str) -> UserError:
    """Return the error for a split of which all inputs are bad; `first_reason` tells why the first input is bad."""
    inputs = len(source.inputs) + len(source.refused)
    return UserError(f"{source.reader.root}: not one of {inputs:,} inputs is an image (first: {first_reason}).")


def not_images(count: int) -> str:
    """Return the text for messages, such as `1 input is not an image` or `3 inputs are not images`."""
    return "1 input is not an image" if count == 1 else f"{count:,} inputs are not images"


def tool_versions() -> dict[str, str]:
    """Return the versions of the software that determines the bytes of a record. The manifest holds these versions."""
    return {
        "alexnet": package_version(),
        "pillow": version("pillow"),
        "pillow_libjpeg_turbo": str(features.version_feature("libjpeg_turbo") or "none"),
        "simplejpeg": version("simplejpeg"),
        "numpy": np.__version__,
        "lmdb": ".".join(map(str, lmdb.version())),
    }

"""Builds a split in parts, without a cluster. Part I of N builds every N-th shard, beginning with the I-th shard.

Parts can run in any order, more than once, and at the same time on several machines that share a file system (for
example as the tasks of a SLURM array). Two files serve as locks:

    store/.lock                            each part holds a shared lock; `join` holds an exclusive lock, and so does a
                                           build without --part
    store/train/.build/part-3-of-8.lock    part 3 of 8 holds an exclusive lock, so that no second process runs part 3

The first part that runs begins the build: it writes its listing and settings into the new folder .build. Every other
part compares its own listing and settings with these files. When a part finds that all shards are finished, the part
takes an exclusive lock of the store and writes the manifest. If two parts finish at the same time, the lock allows only
one of them to write the manifest. `alexprep join` only writes the manifest; it builds no part. The file
.build/parts.json holds the number of parts, and the command line (without --part) of the part that was started last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from prep.build.assemble import assemble_split
from prep.build.plan import BuildPlan, BuildPolicy, shard_boundaries, tool_versions
from prep.build.resume import (
    begin_build,
    find_changed_inputs,
    open_existing,
    refuse_store_in_source,
    remove_temporary_files,
    remove_work_dir,
)
from prep.build.split import build_shards, disk_errors
from prep.console import Progress, UserError, count_noun
from prep.extra.columns import new_columns
from prep.files import LockHeld, hold_lock, write_atomic
from prep.inputs.folder import FolderReader
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.inputs.reader import Source
from prep.store.extra import read_column
from prep.store.manifest import SPLITS, Settings, Store
from prep.store.work_files import PartsFile, read_plan, read_work_file
from prep.workers import Runner

# Longest time that a part waits for the store's lock, because another part may be writing the manifest.
_BEGIN_WAIT_S = 60.0
# Longest time that a finished part waits for an exclusive lock, because other parts may be about to end.
_JOIN_WAIT_S = 2.0
_RESTART = "The unfinished build cannot be read: run alexprep build-lmdb with --restart."


@dataclass(frozen=True)
class Part:
    """Part `number` of a build that is divided into `count` parts. `number` is counted from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def shards(self, shard_count: int) -> range:
        """Return the numbers of the shards that this part builds, if the split has `shard_count` shards."""
        return range(self.number - 1, shard_count, self.count)

    def count_inputs(self, inputs: int) -> int:
        """Return the number of inputs in the shards that this part builds, if the split has `inputs` inputs."""
        boundaries = shard_boundaries(inputs)
        return sum(boundaries[shard + 1] - boundaries[shard] for shard in self.shards(len(boundaries) - 1))


@dataclass(frozen=True)
class Parts:
    """Division of a split into parts."""

    count: int  # number of parts
    command: str  # command line of a part, from which --part was removed; for messages


@dataclass(frozen=True)
class PartResult:
    """State of the split after a part has ended."""

    shards: int  # number of shards of the part
    store: Store | None  # the store; None if the split is not complete
    missing: dict[Part, list[int]]  # part -> its unfinished shards; empty if all shards are finished


def build_part(
    source: Source,
    store: Path,
    settings: Settings,
    runner: Runner,
    progress: Progress,
    policy: BuildPolicy,
    part: Part,
    command: str,
) -> PartResult:
    """Build the shards of one part. If all parts are then finished, also write the manifest.

    `command` is the command line without --part; `join` shows this command line in messages. Raises the same errors as
    build_split, and UserError if an input has changed since the first part began.
    """
    plan = BuildPlan(source, store / source.split, settings, policy.skip_bad, policy.limits)
    refuse_store_in_source(source, store)
    shards = part.shards(plan.shard_count)
    with disk_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        _clean_up_if_alone(store, plan)
        with hold_lock(store, "build", shared=True, wait_s=_BEGIN_WAIT_S):
            existing = open_existing(store, plan)
            if existing is not None and source.split in existing.splits:
                missing = list(new_columns(existing, source.split, plan.extra_columns()))
                if missing:
                    raise UserError(
                        f"{store}: the finished split {source.split} lacks the extra fields {', '.join(missing)}. Run "
                        "the same command once without --part: it adds the fields, and builds no record again."
                    )
                progress.skip(plan.count_inputs(shards))
                return PartResult(len(shards), existing, {})
            _begin_or_check(plan, store)
            parts = {"parts": part.count, "command": command}
            write_atomic(plan.work_dir / "parts.json", json.dumps(parts).encode())
            with hold_lock(plan.work_dir, f"build of part {part}", name=f"part-{part.number}-of-{part.count}.lock"):
                build_shards(plan, store, shards, runner, progress, policy)
        return _finish(plan, store, part, policy)


def _clean_up_if_alone(store: Path, plan: BuildPlan) -> None:
    """Remove temporary files of killed processes, unless another part is running."""
    with suppress(LockHeld), hold_lock(store, "build", wait_s=0) as is_alone:
        if not is_alone:  # the file system has no locks, so other parts may be running
            return
        remove_temporary_files(store)
        if not (plan.work_dir / "plan.json").exists():
            shutil.rmtree(plan.work_dir, ignore_errors=True)


def _begin_or_check(plan: BuildPlan, store: Path) -> None:
    """Begin the build. If another part has begun it, compare the inputs of the two parts instead."""
    if not (plan.work_dir / "plan.json").exists() and begin_build(plan):
        return
    changed = find_changed_inputs(plan, store)
    if changed:
        raise UserError(
            f"{store}: {count_noun(len(changed), 'input')} changed since the first part began (first: "
            f"{name_text(next(iter(changed)))}). When no part is running, run the same command once without --part: "
            "this build accepts the change, and keeps the finished shards."
        )


def _finish(plan: BuildPlan, store: Path, part: Part, policy: BuildPolicy) -> PartResult:
    """Write the manifest if all shards are finished and no other process is using the store."""
    shards = len(part.shards(plan.shard_count))
    plan.refresh()
    missing = missing_shards(plan, part.count)
    existing = open_existing(store, plan)
    if existing is not None and plan.source.split in existing.splits:  # another part has just written the manifest
        return PartResult(shards, existing, {})
    if missing:
        return PartResult(shards, None, missing)
    try:
        with hold_lock(store, "build", wait_s=_JOIN_WAIT_S) as is_alone:
            # If the file system has no locks, two parts could write the manifest at the same time. On such a file
            # system, only `alexprep join` writes the manifest.
            return PartResult(shards, _assemble(plan, store, policy) if is_alone else None, {})
    except LockHeld:
        return PartResult(shards, None, {})


def _assemble(plan: BuildPlan, store: Path, policy: BuildPolicy) -> Store:
    """Write the manifest, unless another process has already written it. The caller holds the exclusive lock."""
    existing = open_existing(store, plan)
    if existing is not None and plan.source.split in existing.splits:
        return existing
    if existing is not None and existing.classes != plan.source.classes:
        raise UserError(
            f"{store}: the {len(plan.source.classes)} classes of {plan.source.split} are not the "
            f"{len(existing.classes)} classes of the store. All splits of a store must have the same classes."
        )
    remove_temporary_files(store)
    built = assemble_split(plan, store, existing, policy)
    remove_work_dir(plan)
    return built


def missing_shards(plan: BuildPlan, part_count: int) -> dict[Part, list[int]]:
    """Return the unfinished shards of each part. Parts of which all shards are finished are left out."""
    unfinished = [number for number in range(plan.shard_count) if not plan.is_finished(number)]
    numbers = sorted({shard % part_count + 1 for shard in unfinished})
    return {
        Part(number, part_count): [shard for shard in unfinished if shard % part_count + 1 == number]
        for number in numbers
    }


def begun_splits(store: Path) -> list[str]:
    """Return the splits whose build has begun and is not complete."""
    return [split for split in SPLITS if (store / split / ".build" / "plan.json").exists()]


def join_split(
    store: Path, split: str, max_bad: int | None, allow_empty_classes: bool = False
) -> tuple[Store | None, dict[Part, list[int]], Parts]:
    """Write the manifest of a split whose parts are all finished, from the files in its work folder.

    Returns (store, {}, parts) if no shard is missing. If a shard is missing, returns (None, missing shards of each
    part, parts) and writes no manifest. Raises UserError if a part or a build is running, or if the parts left out more
    than `max_bad` bad inputs.
    """
    with disk_errors(store), hold_lock(store, "build"):
        plan = _open_plan(store, split)
        parts = _read_parts(plan)
        missing = missing_shards(plan, parts.count)
        if missing:
            return None, missing, parts
        return _assemble(plan, store, BuildPolicy(True, max_bad, allow_empty_classes=allow_empty_classes)), {}, parts


def _open_plan(store: Path, split: str) -> BuildPlan:
    """Return the plan of an unfinished build, from the files in its work folder.

    The returned plan cannot read the inputs.
    """
    work_dir = store / split / ".build"
    try:
        begun = read_plan(work_dir, _RESTART)
        inputs = Listing.load(work_dir / "inputs.npz", len(begun.classes), _RESTART)
    except OSError as error:
        raise UserError(f"{work_dir}: {error}. {_RESTART}") from None
    tools = begun.tools
    source = Source(FolderReader(Path(begun.source)), split, begun.classes, inputs, begun.refused, begun.ignored)
    plan = BuildPlan(source, store / split, begun.settings, skip_bad=True)
    plan.build_id = begun.id
    if begun.digest not in (None, plan.digest):
        raise UserError(
            f"{work_dir}: settings, classes and inputs have the digest {plan.digest}, expected "
            f"{begun.digest}, as in plan.json. {_RESTART}"
        )
    extra = {}
    for name, entry in begun.extra.items():
        try:
            column = read_column(work_dir, name, entry["field"], len(inputs), _RESTART)
        except OSError as error:
            raise UserError(f"{work_dir}: {error}. {_RESTART}") from None
        if column.digest() != entry["digest"]:
            raise UserError(
                f"{work_dir}: the values of the field {name} have the digest {column.digest()}, expected "
                f"{entry['digest']}, as in plan.json. {_RESTART}"
            )
        extra[name] = column.take(np.argsort(plan.permutation))
    plan.source = replace(source, extra=extra)
    if begun.edges != plan.boundaries:
        raise UserError(f"{work_dir}/plan.json: the shard boundaries in `edges` do not fit the inputs. {_RESTART}")
    for tool, present in tool_versions().items():
        if tools.get(tool) != present:
            raise UserError(
                f"{store} holds an unfinished build by {tool} {tools.get(tool)}, but {present} is installed. "
                f"Run alexprep join with {tool} {tools.get(tool)}."
            )
    return plan


def _read_parts(plan: BuildPlan) -> Parts:
    """Return the division of a build into parts. A build that was begun without --part counts as one part."""
    try:
        parts = read_work_file(PartsFile, plan.work_dir / "parts.json", _RESTART)
        return Parts(parts.parts, parts.command)
    except FileNotFoundError:
        return Parts(1, f"alexprep build-lmdb {plan.source.reader.root} --store {plan.folder.parent}")


def shard_list(shards: Sequence[int], shown: int = 5) -> str:
    """Return the shard numbers as text for a message: `00003, 00011, …`."""
    return ", ".join(f"{shard:05d}" for shard in shards[:shown]) + (", …" if len(shards) > shown else "")

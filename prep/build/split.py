"""Builds a split, or estimates how much disk space and time a build needs.

A build makes a plan and checks it, builds the shards in worker processes, and assembles the split from the shards. A
killed build loses only the shards that were in progress. Running the same command again finishes the build, and the
fingerprint is the same as after an uninterrupted build. If a worker process crashes, the crash is counted for the input
that the process was reading. Without --on-bad skip, the build then stops. With --on-bad skip, the shard is built again,
and the input is left out after a second crash. These files hold the state of an unfinished build:

    store/train/.build/plan.json         settings, tool versions, classes, shard boundaries: no run may change these
    store/train/.build/inputs.npz        listing of the inputs, to find inputs that changed between two runs
    store/train/.build/00000.json .npy   summary of one finished shard (prep/build/shard_task.py)
    store/train/.build/deaths.json       {path of an input: number of worker processes that crashed at this input}
    store/train/.build/slow.json         {path of an input: seconds of CPU time after which its worker was ended}

Records are sorted by a keyed hash of their paths (prep/inputs/listing.py), so the record order depends only on paths
and seed. The hash mixes the classes well enough for training, which reads blocks of consecutive records
(pipeline/sampling.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prep.build.assemble import assemble_split, too_many_bad
from prep.build.plan import DEFAULT_POLICY, BuildPlan, BuildPolicy, bad_outcomes, tool_versions
from prep.build.preflight import (
    BuiltInMemory,
    ResourceEstimate,
    build_in_memory,
    build_sample,
    check_disk_space,
    check_inputs,
    free_bytes,
    needed_space_text,
    probe,
)
from prep.build.resume import (
    discard_build,
    find_changed_inputs,
    has_changed_input,
    open_existing,
    refuse_foreign_folder,
    refuse_store_in_source,
    remove_temporary_files,
    remove_work_dir,
    start_or_resume,
)
from prep.build.shard_task import ShardTask, build_shard
from prep.console import DiskFull, Progress, UserError, bytes_text, disk_error, say
from prep.extra.columns import add_columns, new_columns
from prep.files import hold_lock
from prep.inputs.names import name_text
from prep.inputs.reader import InputReader, Source, UnpackingReader
from prep.store.manifest import Settings, Store
from prep.workers import NOT_STARTED, Counts, Runner, WorkerDied


@dataclass(frozen=True)
class BuildEstimate:
    """What --dry-run prints about a build: inputs, disk space and time."""

    inputs: int
    classes: int
    # (name, reason) of each bad input: refused by the listing, found by `probe`, or not decodable in the sample.
    bad: tuple[tuple[str, str], ...]
    outcomes: tuple[Mapping[str, Any], ...]  # lines of inputs.jsonl for decoded inputs and inputs of finished shards
    done: int  # number of inputs in finished shards
    decoded: int  # number of inputs that were decoded for the estimate
    is_built: bool  # whether the store already has the split, built from the same inputs and settings
    new_fields: tuple[str, ...]  # extra fields that the build would add to a finished split
    # Estimate for the remaining inputs; None if no inputs remain or the sample has no image.
    resources: ResourceEstimate | None
    free_bytes: int


def build_split(
    source: Source,
    store: Path,
    settings: Settings,
    runner: Runner,
    progress: Progress,
    policy: BuildPolicy = DEFAULT_POLICY,
) -> Store:
    """Build one split into the folder `store` and return the store. A finished split is not built again.

    If a finished split lacks extra fields of `source`, only the columns of these fields are written.

    Raises UserError if the store or an unfinished build has other settings or inputs, if another build holds the lock,
    if `policy` does not allow the bad inputs, or if a worker process crashed. Raises DiskFull if the disk is full.
    """
    plan = BuildPlan(source, store / source.split, settings, policy.skip_bad, policy.limits)
    refuse_store_in_source(source, store)
    with disk_errors(store):
        store.mkdir(parents=True, exist_ok=True)
        with hold_lock(store, "build"):
            existing = open_existing(store, plan)
            if existing is not None and source.split in existing.splits:
                remove_temporary_files(store)
                progress.skip(len(source.inputs))
                remove_work_dir(plan)
                return add_columns(existing, source.split, new_columns(existing, source.split, plan.extra_columns()))
            runner.check_machines(store, source.reader.root, tool_versions)
            is_begun = (plan.work_dir / "plan.json").exists()  # every unfinished build has a plan.json
            if is_begun and (policy.restart or not (plan.has_finished_shards() or plan.has_recorded_faults())):
                discard_build(plan, store)
            start_or_resume(plan, store)
            remove_temporary_files(store)
            build_shards(plan, store, range(plan.shard_count), runner, progress, policy)
            plan.refresh()
            built = assemble_split(plan, store, existing, policy)
            remove_work_dir(plan)
            return built


def build_shards(
    plan: BuildPlan, store: Path, shard_numbers: Sequence[int], runner: Runner, progress: Progress, policy: BuildPolicy
) -> None:
    """Build the unfinished shards among the shards `shard_numbers`. Checks inputs and disk space first.

    Raises the same errors as build_split.
    """
    name = plan.source.split
    unfinished = [number for number in shard_numbers if not plan.is_finished(number)]
    progress.skip(plan.count_inputs(shard_numbers) - plan.count_inputs(unfinished))
    if 0 < len(unfinished) < len(shard_numbers):
        finished = len(shard_numbers) - len(unfinished)
        say(f"{name}: resuming; {finished:,} of {len(shard_numbers):,} shards are finished.")
    bad_before = plan.count_bad_inputs(shard_numbers)
    check_inputs(plan, policy, runner.jobs, unfinished)
    check_disk_space(plan, unfinished, runner)
    try:
        _run_tasks(plan, unfinished, runner, progress, policy, bad_before)
    except DiskFull as error:
        need = needed_space_text(plan, [number for number in unfinished if not plan.is_finished(number)])
        raise _disk_full(error, store, need) from error


@contextmanager
def disk_errors(store: Path) -> Iterator[None]:
    """Convert an OSError in a `with` block to DiskFull or to another UserError."""
    try:
        yield
    except OSError as error:
        reported = disk_error(error, f"{store}: {error}")
        if isinstance(reported, DiskFull):
            raise _disk_full(reported, store) from error
        raise UserError(
            f"{reported}. Correct this error, then run the same command again: finished shards are kept."
        ) from error


def estimate_build(
    source: Source,
    store: Path,
    settings: Settings,
    runner: Runner,
    policy: BuildPolicy = DEFAULT_POLICY,
    progress: Progress | None = None,
) -> BuildEstimate:
    """Estimate a build without writing anything. Raises UserError if build_split would refuse `store`.

    If `progress` is given, all inputs are decoded and counted in `progress`. Without `progress`, a sample is decoded.
    """
    plan, new_fields, unfinished = open_plan(source, store, settings, policy)
    is_built = new_fields is not None
    remaining = plan.count_inputs(unfinished)
    if remaining:
        runner.check_machines(None, source.reader.root, tool_versions)
    built = BuiltInMemory()
    if remaining and progress is not None:
        progress.skip(len(source.inputs) - remaining)
        built = build_in_memory(plan, unfinished, runner, progress)
    elif remaining:
        built = build_sample(plan.sample(unfinished), runner)
    finished = sorted(set(range(plan.shard_count)) - set(unfinished)) if not is_built else []
    summaries = [summary for number in finished if (summary := plan.shard_summary(number))]
    outcomes = [*(row for summary in summaries for row in summary["fates"]), *built.outcomes]
    bad = [] if is_built else [*source.refused]
    if not is_built and progress is None:
        bad += probe(source.reader, source.inputs, runner.jobs)
    names = {name for name, _ in bad}
    bad += [(row["source"], row["why"]) for row in bad_outcomes(outcomes) if row["source"] not in names]
    return BuildEstimate(
        inputs=len(source.inputs) + len(source.refused),
        classes=len(source.classes),
        bad=tuple(bad),
        outcomes=tuple(outcomes),
        done=len(source.inputs) - remaining,
        decoded=built.inputs,
        is_built=is_built,
        new_fields=new_fields or (),
        resources=built.estimate(remaining, runner.jobs),
        free_bytes=free_bytes(store),
    )


def open_plan(
    source: Source, store: Path, settings: Settings, policy: BuildPolicy
) -> tuple[BuildPlan, tuple[str, ...] | None, Sequence[int]]:
    """Return three values: the plan, the extra fields to add to a finished split, and the shards to build.

    The second value is None if the split is not finished.

    Writes nothing. Raises UserError if build_split would refuse `store`.
    """
    refuse_store_in_source(source, store)
    plan = BuildPlan(source, store / source.split, settings, policy.skip_bad, policy.limits)
    existing = open_existing(store, plan)
    new_fields: tuple[str, ...] | None = None
    unfinished: Sequence[int] = ()
    if existing is not None and source.split in existing.splits:
        new_fields = tuple(new_columns(existing, source.split, plan.extra_columns()))
    else:
        unfinished = range(plan.shard_count)
        is_begun = (plan.work_dir / "plan.json").exists()
        if not is_begun:
            refuse_foreign_folder(plan)
        if is_begun and not policy.restart and (plan.has_finished_shards() or plan.crash_counts()):
            changed = find_changed_inputs(plan, store)
            unfinished = [
                number
                for number in unfinished
                if not plan.is_finished(number) or has_changed_input(plan, number, changed)
            ]
    return plan, new_fields, unfinished


def _disk_full(error: Exception, store: Path, need: str = "") -> DiskFull:
    return DiskFull(
        f"{error}: the disk is full. {need}{bytes_text(free_bytes(store))} are free. "
        "Free disk space and run the same command again: finished shards are kept."
    )


def _run_tasks(
    plan: BuildPlan,
    shard_numbers: Sequence[int],
    runner: Runner,
    progress: Progress,
    policy: BuildPolicy,
    bad_before: int,
) -> None:
    """Build the shards `shard_numbers`. Raises UserError if too many inputs are bad.

    If a worker process crashes and `policy` skips bad inputs, the shard of this process is built again. If a worker
    process crashes and `policy` does not skip bad inputs, UserError is raised.
    """
    done_before = progress.done
    refused = len(plan.source.refused)

    def on_progress(counts: Counts) -> None:
        bad = refused + bad_before + counts.bad
        progress.update(done_before + counts.done, bad=bad, size_bytes=counts.bytes)
        if policy.skip_bad and policy.max_bad is not None and bad > policy.max_bad:
            raise UserError(
                f"{too_many_bad(bad, policy.max_bad)} Correct the inputs, or raise --max-bad: finished shards are kept."
            )

    again: list[int] = []
    reader = plan.source.reader
    if shard_numbers and isinstance(reader, UnpackingReader):
        reader = reader.unpacking_into(plan.work_dir / "unpacked", free_bytes(plan.folder))
    # closing() stops the workers before the caller releases the lock, even after an error.
    with closing(runner.map(build_shard, _tasks(plan, shard_numbers, reader), on_progress)) as results:
        for task, result in results:
            if isinstance(result, WorkerDied):
                _record_dead_worker(plan, task, result, policy)
                again.append(task.number)
    if again:
        progress.done = done_before + plan.count_inputs(shard_numbers) - plan.count_inputs(again)
        bad_before += plan.count_bad_inputs(set(shard_numbers) - set(again))
        _run_tasks(plan, again, runner, progress, policy, bad_before)


def _record_dead_worker(plan: BuildPlan, task: ShardTask, died: WorkerDied, policy: BuildPolicy) -> None:
    """Record the input that a worker process was reading when the process crashed or used too much CPU time.

    Raises UserError unless the shard can be built again.
    """
    if died.index == NOT_STARTED:
        raise UserError(f"A worker process {died.describe()} before reading an input. Run the same command again.")
    name, limit_s = name_text(task.inputs[died.index].path), task.limits.time_limit_s
    if died.is_too_slow:
        plan.record_slow_input(name, limit_s)
        text = f"{name}: {task.limits.too_slow()}."
        advice = "Correct this input, or pass --on-bad skip to leave it out; finished shards are kept."
    else:
        plan.record_crash(name)
        text = f"{name}: a worker process {died.describe()} at this file."
        advice = (
            "If memory ran out, run the same command again with fewer --jobs: finished shards are kept. "
            "With --on-bad skip, a file is left out after two worker processes have crashed at it."
        )
    if not policy.skip_bad:
        raise UserError(f"{text} {advice}")
    say(f"{text} The shard is built again.")


def _tasks(plan: BuildPlan, shard_numbers: Iterable[int], reader: InputReader) -> Iterator[ShardTask]:
    return (replace(plan.task(number), reader=reader) for number in shard_numbers)

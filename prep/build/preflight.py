"""Checks before a long build: inputs that are not images, disk space and estimated build time."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prep.build.plan import CRASHED_TWICE, BuildPlan, BuildPolicy, bad_outcomes
from prep.build.shard_task import ShardBuilder, ShardTask
from prep.console import DiskFull, Progress, UserError, bytes_text, count_noun, escaped, say
from prep.files import write_atomic
from prep.images.codec import BadImage
from prep.images.formats import HEAD_BYTES, unreadable_reason
from prep.images.limits import MAX_FILE_BYTES
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import InputReader
from prep.store.manifest import Settings
from prep.workers import NOT_STARTED, Counts, Runner, TaskProgress, WorkerDied

_PAGE_BYTES = 4096  # size of an LMDB page; a record of more than half a page takes whole pages
# `probe` may take this time for each input, divided by the number of worker processes: a few percent of the build time.
_PROBE_S_PER_INPUT = 0.1e-3
_MIN_PROBE_S = 2.0
_PROBE_CHUNK = 256


@dataclass(frozen=True)
class ResourceEstimate:
    """Estimated disk space and build time for a set of inputs, extrapolated from a sample of these inputs."""

    bytes: int  # bytes on the disk
    seconds: float  # build time with all worker processes; a slow source can make the build longer
    sampled: int  # number of sampled inputs that are images


def probe(
    reader: InputReader, inputs: Listing, jobs: int, indices: Sequence[int] | None = None
) -> list[tuple[str, str]]:
    """Find inputs whose size or first bytes show that they are not images. Returns (name, reason) of each such input.

    `indices` are the indices of the inputs to check; None: all inputs.

    Nothing is decoded. `probe` stops after a few percent of the time that the build would take. If the source is slow,
    `probe` therefore checks only some of the inputs. The build itself checks every input.
    """
    checked = range(len(inputs)) if indices is None else indices
    deadline = time.monotonic() + max(_MIN_PROBE_S, len(checked) * _PROBE_S_PER_INPUT / jobs)

    def probe_chunk(first: int) -> list[tuple[str, str]]:
        if time.monotonic() > deadline:
            return []
        chunk = [inputs[index] for index in checked[first : first + _PROBE_CHUNK]]
        return [(name_text(item.path), reason) for item in chunk if (reason := _obvious_fault(reader, item))]

    with ThreadPoolExecutor(8) as pool:
        chunks = pool.map(probe_chunk, range(0, len(checked), _PROBE_CHUNK))
        return [bad for bad_of_chunk in chunks for bad in bad_of_chunk]


def _obvious_fault(reader: InputReader, item: Input) -> str:
    """Return the reason why an input is no image, according to its size and first bytes.

    Returns an empty text if neither the size nor the first bytes show a fault.
    """
    if not item.size:
        return "empty file"
    if item.size > MAX_FILE_BYTES:
        return f"{item.size:,} bytes: more than {MAX_FILE_BYTES:,}"
    try:
        return unreadable_reason(reader.head(item, HEAD_BYTES))
    except BadImage as reason:
        return str(reason)
    except Exception as error:  # the library that reads an archive can raise any exception for damaged bytes
        return f"cannot be read: {escaped(str(error) or repr(error))}"


def check_inputs(plan: BuildPlan, policy: BuildPolicy, jobs: int, unfinished: Sequence[int]) -> None:
    """Raise UserError if there are more bad inputs than `policy` allows.

    The bad inputs are those that the listing refused, and those that `probe` finds in the `unfinished` shards. If
    `policy` skips bad inputs, `probe` does not run. Before the error is raised, the bad inputs are written to bad.jsonl
    in the plan's `work_dir`.
    """
    bad = list(plan.source.refused)
    if not policy.skip_bad and unfinished:
        bad += probe(plan.source.reader, plan.source.inputs, jobs, plan.sorted_input_indices(unfinished))
    if policy.allows(len(bad)):
        return
    lines = [json.dumps({"source": name, "fate": "bad", "why": why}, ensure_ascii=False) + "\n" for name, why in bad]
    write_atomic(plan.work_dir / "bad.jsonl", "".join(lines).encode())
    total = len(plan.source.inputs) + len(plan.source.refused)
    raise bad_inputs_error(bad, total, policy, plan.work_dir / "bad.jsonl")


def bad_inputs_error(
    bad: Sequence[tuple[str, str]], total: int, policy: BuildPolicy, listed_in: Path | None = None
) -> UserError:
    """Return the error for too many bad inputs.

    `bad` has (name, reason) of each bad input, and `total` is the number of all inputs.
    """
    allowed = f", more than --max-bad {policy.max_bad} allows" if policy.skip_bad else ""
    links = sum("--follow-links" in reason for _, reason in bad)
    advice = f"Pass --follow-links to follow {count_noun(links, 'link')}. " if links else ""
    return UserError(
        f"{count_noun(len(bad), 'input')} of {total:,} "
        f"{'is not an image' if len(bad) == 1 else 'are not images'}{allowed}, found before building "
        f"(first: {bad[0][0]}: {bad[0][1]}). "
        f"{f'{listed_in} lists all of them. ' if listed_in else ''}{advice}"
        "Correct the bad inputs, or pass --on-bad skip to leave them out."
    )


def check_disk_space(plan: BuildPlan, unfinished: Sequence[int], runner: Runner) -> None:
    """Raise DiskFull if the estimated size of the `unfinished` shards is more than 1.25 times the free disk space.

    Print a warning if the estimated size is 1 to 1.25 times the free disk space.
    """
    free = free_bytes(plan.folder)
    count = plan.count_inputs(unfinished)
    if fits_surely(count, plan.settings, plan.folder):
        return
    estimate = build_sample(plan.sample(unfinished), runner).estimate(count, runner.jobs)
    if estimate is None or estimate.bytes <= free:
        return
    text = (
        f"{bytes_text(estimate.bytes)} needed for {count:,} images (estimated from {estimate.sampled} of them), "
        f"{bytes_text(free)} free"
    )
    if 0.8 * estimate.bytes > free:
        raise space_error(plan.folder, text)
    say(f"{plan.folder}: {text}. The build starts anyway, since the estimate may be too high.")


def space_error(folder: Path, text: str) -> DiskFull:
    """Return the error for too little disk space. `text` says how much space is needed and how much is free."""
    return DiskFull(f"{folder}: {text}. Free disk space, or choose another --store; nothing was built.")


def fits_surely(count: int, settings: Settings, folder: Path) -> bool:
    """Return whether `count` records fit on the disk even if all of them have the largest expected size.

    If they do, the callers need not build a sample to estimate the size.
    """
    return count * _max_record_bytes(settings) < free_bytes(folder)


def _max_record_bytes(settings: Settings) -> int:
    """Return the upper bound for the size of a record in bytes, for images with an aspect ratio of up to 4:1."""
    return 3 * settings.side_px**2 * (4 if settings.keep_aspect else 1) + 8192


def needed_space_text(plan: BuildPlan, unfinished: Sequence[int]) -> str:
    """Return the first part of a message: the disk space that the `unfinished` shards need.

    The space is estimated from the finished shards. The text is empty if no record is stored yet or no shard is
    unfinished.
    """
    shards = [summary["shard"] for number in range(plan.shard_count) if (summary := plan.shard_summary(number))]
    records = sum(shard["records"] for shard in shards)
    if not records or not unfinished:
        return ""
    record_bytes = sum(shard["bytes"] for shard in shards) / records + 4096
    count = plan.count_inputs(unfinished)
    return f"About {bytes_text(record_bytes * count)} are needed for {count:,} images, "


@dataclass(frozen=True)
class BuiltInMemory:
    """Result of building records in memory, without writing them to the disk."""

    records: int = 0
    bytes: int = 0  # size of the records in an LMDB
    seconds: float = 0.0  # build time, summed over all workers
    outcomes: tuple[dict[str, Any], ...] = ()  # outcomes of the inputs, as in inputs.jsonl

    @property
    def inputs(self) -> int:
        """Number of inputs that were processed: those that gave a record, and the bad inputs."""
        return self.records + len(bad_outcomes(self.outcomes))

    def __add__(self, other: BuiltInMemory) -> BuiltInMemory:
        return BuiltInMemory(
            self.records + other.records,
            self.bytes + other.bytes,
            self.seconds + other.seconds,
            self.outcomes + other.outcomes,
        )

    def estimate(self, inputs: int, jobs: int) -> ResourceEstimate | None:
        """Extrapolate size and build time to `inputs` inputs and `jobs` workers; None if there are no records."""
        if not self.records:
            return None
        size_bytes, seconds = self.bytes * inputs // self.records, self.seconds / self.records * inputs / jobs
        return ResourceEstimate(size_bytes, seconds, self.records)


def build_sample(tasks: Sequence[ShardTask], runner: Runner) -> BuiltInMemory:
    """Build the records of `tasks` in memory. If a worker crashes during a task, this task is left out."""
    built = BuiltInMemory()
    for _, result in runner.map(_measure, tasks, lambda counts: None):
        # A crash is ignored at this point, because the build itself will report it.
        if not isinstance(result, WorkerDied):
            built += result
    return built


def build_in_memory(plan: BuildPlan, shard_numbers: Sequence[int], runner: Runner, progress: Progress) -> BuiltInMemory:
    """Build the records of all inputs of some shards in memory. Nothing is written.

    Worker processes build the records, as in a build. Inputs are taken in the order of the listing, because every
    format can be read fast in this order. An input is bad if it crashes a worker twice or takes too long. Raises the
    errors of a build that skips bad inputs.
    """
    indices, first = plan.sorted_input_indices(shard_numbers), plan.task(shard_numbers[0])
    count = max(1, min(_PROBE_CHUNK, len(indices) // (4 * runner.jobs)))

    def tasks() -> Iterator[ShardTask]:
        for number, start in enumerate(range(0, len(indices), count)):
            inputs = tuple(plan.source.inputs[index] for index in indices[start : start + count])
            yield replace(first, number=number, inputs=inputs, skip_bad=True)

    done_before, bad_before = progress.done, progress.bad
    finished: dict[int, BuiltInMemory] = {}
    crashes: Counter[str] = Counter()
    todo: Iterable[ShardTask] = tasks()
    while True:
        todo = list(_build_tasks(todo, runner, progress, finished, crashes))
        built = sum((finished[number] for number in sorted(finished)), BuiltInMemory())
        progress.update(done_before + built.inputs, bad_before + built.inputs - built.records)
        if not todo:
            return built


def _build_tasks(
    tasks: Iterable[ShardTask],
    runner: Runner,
    progress: Progress,
    finished: dict[int, BuiltInMemory],
    crashes: Counter[str],
) -> Iterator[ShardTask]:
    """Add the results of `tasks` to `finished`. Yield the tasks to try again: their worker processes did not finish."""
    done_before, bad_before = progress.done, progress.bad

    def on_progress(counts: Counts) -> None:
        progress.update(done_before + counts.done, bad=bad_before + counts.bad)

    with closing(runner.map(_build_records, tasks, on_progress)) as results:
        for task, result in results:
            if not isinstance(result, WorkerDied):
                finished[task.number] = result
                continue
            if result.index == NOT_STARTED:
                raise UserError(
                    f"A worker process {result.describe()} before reading an input. Run the same command again."
                )
            name = name_text(task.inputs[result.index].path)
            crashes[name] += 1
            reason = task.limits.too_slow() if result.is_too_slow else BadImage(CRASHED_TWICE)
            is_bad = result.is_too_slow or crashes[name] > 1
            yield replace(task, unreadable={**task.unreadable, name: reason}) if is_bad else task


def _measure(task: ShardTask, task_progress: TaskProgress) -> BuiltInMemory:
    """Build the records of a task in memory.

    The first record is also built once before the measured time begins, because its first build loads the libraries.
    """
    warm_up = replace(task, inputs=task.inputs[:1])
    list(ShardBuilder(warm_up, TaskProgress()).records())
    return _build_records(task, task_progress)


def _build_records(task: ShardTask, task_progress: TaskProgress) -> BuiltInMemory:
    started = time.monotonic()
    builder = ShardBuilder(task, task_progress)
    sizes = [len(value) for _, value in builder.records()]
    seconds = time.monotonic() - started
    size_bytes = sum(-(-(size + 16) // _PAGE_BYTES) * _PAGE_BYTES for size in sizes)
    return BuiltInMemory(len(sizes), size_bytes, seconds, tuple(builder.outcomes))


def free_bytes(path: Path) -> int:
    """Return the number of free bytes on the disk of `path`. The file or folder `path` need not exist."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free

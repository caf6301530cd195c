"""Pool of worker processes on this machine, with progress counters and crash detection.

Every worker is a fresh interpreter, because an LMDB environment must not be used across a fork. A worker has one BLAS
thread. Workers ignore Ctrl-C, which the parent handles. Workers exit when the parent ends, even if SIGKILL ends the
parent. An exception in a task is raised again in the parent. If a worker crashes, the other workers continue. The
result of the crashed task is a WorkerDied with the index of the input that the worker was processing. The caller
decides whether the task is tried again (in a build: prep/build/split.py and plan.py). A worker that uses more CPU time
for an input than the task allows is killed. The result of the killed worker's task is also a WorkerDied. If a worker
ends before its first task, the parent raises WorkerNotStarted, whose message contains the error of the worker.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from prep.console import UserError, keep_freed_memory, memory_error
from prep.worker_start import SharedIntegers, StartOutput, WorkerNotStarted, start_error, start_options

T = TypeVar("T")
R = TypeVar("R")

_KEEP_BYTES = 256_000_000  # a worker keeps this much freed memory for reuse, and returns the rest to the system
_POLL_S = 0.2
# Seconds between two checks of the workers' CPU time, and CPU seconds by which a worker may exceed its limit.
_CHECK_CPU_S, _CPU_GRACE_S = 1.0, 2.0
NOT_STARTED = -1  # TaskProgress.index of a worker that has not begun its task


class Counts(NamedTuple):
    """Progress counters of one worker, or of all workers together."""

    done: int  # number of finished inputs or records, including bad ones
    bad: int  # number of bad inputs or records
    bytes: int  # number of bytes that were written or read


class TaskProgress:
    """Current input and Counts of one worker.

    The worker writes the index and the counts into memory that the parent can read at any time. `counters` are integers
    that all workers share. The SIZE integers of this worker begin at index `first`. Without `counters` a new list of
    SIZE integers is used.
    """

    SIZE = 5  # index of the input, done, bad, bytes, and the CPU deadline in ms

    def __init__(self, counters: list[int] | SharedIntegers | None = None, first: int = 0) -> None:
        self._counters = [0] * self.SIZE if counters is None else counters
        self._first = first

    def begin(self, index: int, cpu_limit_s: float = 0) -> None:
        """Record that the worker begins input `index` of the task. The parent reports `index` if the worker crashes.

        The parent kills the worker if the worker uses more than `cpu_limit_s` plus two seconds of CPU time before it
        calls `count`. 0 means no limit.
        """
        self._counters[self._first] = index
        end_s = time.process_time() + cpu_limit_s if cpu_limit_s else 0
        self._counters[self._first + 4] = int(1000 * end_s)

    def count(self, size_bytes: int = 0, bad: bool = False) -> None:
        """Count one more finished input. `size_bytes` is the number of bytes written or read for the input."""
        self._counters[self._first + 4] = 0
        self._counters[self._first + 1] += 1
        self._counters[self._first + 2] += bad
        self._counters[self._first + 3] += size_bytes

    @property
    def index(self) -> int:
        """Index of the input that the worker began last, or NOT_STARTED."""
        return self._counters[self._first]

    @property
    def counts(self) -> Counts:
        """Counts over all tasks of this worker so far."""
        done, bad, size_bytes = (self._counters[self._first + k] for k in (1, 2, 3))
        return Counts(done, bad, size_bytes)

    @property
    def cpu_deadline_s(self) -> float:
        """CPU time of the worker process at which the limit of the current input is reached; 0 for no limit."""
        return self._counters[self._first + 4] / 1000


@dataclass(frozen=True)
class WorkerDied:
    """The result of a task during which the worker process ended."""

    index: int  # index of the input that the worker was processing (TaskProgress.index), or NOT_STARTED
    exit_code: int  # exit code of the process; −n if signal n killed the process
    is_too_slow: bool = False  # whether the parent ended the process because it used too much CPU time for the input

    def describe(self) -> str:
        """Return how the process ended, as part of a sentence: `was killed (SIGKILL)`, `ended with code 1`."""
        if self.is_too_slow:
            return "used too much CPU time and was ended"
        if self.exit_code >= 0:
            return f"ended with code {self.exit_code}"
        with suppress(ValueError):
            return f"was killed ({signal.Signals(-self.exit_code).name})"
        return f"was killed (signal {-self.exit_code})"


class Runner(Protocol):
    """An object that runs independent tasks: a WorkerPool or a ClusterRunner."""

    jobs: int

    def map(
        self, work: Callable[[T, TaskProgress], R], tasks: Iterable[T], on_progress: Callable[[Counts], None]
    ) -> Generator[tuple[T, R | WorkerDied], None, None]:
        """Run `work` on every task. Yields (task, result) pairs in the order in which the tasks finish.

        `on_progress` is called several times a second and at the end, with the counts since this call of `map` began.
        `map` raises the first exception of `work`. A UserError is raised unchanged. Any other exception is raised as a
        RuntimeError with the worker's traceback.
        """

    def check_machines(self, folder: Path | None, source: Path, versions: Callable[[], dict[str, str]]) -> None:
        """Raise UserError unless all machines that run tasks see the same files and have the same software.

        `folder` is a folder that tasks will write to, or None if tasks write nothing. `source` is the file or folder
        that tasks read. `versions` is a module-level function that returns the versions of the software that must be
        equal.
        """


class WorkerPool:
    """A Runner of `jobs` local processes. The processes start when they are needed, and end with the `with` block.

    If `preload` names a module, all processes start at the beginning of the block and import the module. The parent can
    then list the inputs while the workers load the libraries.
    """

    def __init__(self, jobs: int, preload: str = "") -> None:
        self.jobs = jobs
        self._preload = preload
        self._context = multiprocessing.get_context("spawn")
        self._counters = SharedIntegers(TaskProgress.SIZE * jobs)
        # A slot is the number of a worker, 0..jobs − 1. If a worker dies, the next worker in its place gets its slot.
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}  # slot -> process and connection
        self._start_outputs: dict[int, StartOutput] = {}  # slot -> output of a worker that has sent no result yet
        self._too_slow: set[int] = set()  # slots of workers that were ended because an input took too long
        self._checked_at = time.monotonic()

    def map(
        self, work: Callable[[T, TaskProgress], R], tasks: Iterable[T], on_progress: Callable[[Counts], None]
    ) -> Generator[tuple[T, R | WorkerDied], None, None]:
        """See Runner.map. `work` must be a module-level function.

        A task is taken from `tasks` only when a worker is free. If the generator is closed or raises an exception, busy
        workers are killed. The results of killed workers therefore do not reach a later call.
        """
        busy = dict[int, T]()
        try:
            yield from self._map(work, iter(tasks), on_progress, busy)
        finally:
            self._stop(busy)

    def check_machines(self, folder: Path | None, source: Path, versions: Callable[[], dict[str, str]]) -> None:
        """See Runner.check_machines. There is only one machine, so there is nothing to compare."""

    def _map(
        self,
        work: Callable[[T, TaskProgress], R],
        tasks: Iterator[T],
        on_progress: Callable[[Counts], None],
        busy: dict[int, T],  # slot -> running task; `map` kills the workers of these slots if it ends early
    ) -> Iterator[tuple[T, R | WorkerDied]]:
        counts_before = self._counts()
        idle_slots, tasks_left = list(range(self.jobs)), True
        while busy or tasks_left:
            new = dict(zip(idle_slots, tasks, strict=False)) if tasks_left else {}
            tasks_left = tasks_left and len(new) == len(idle_slots)
            idle_slots = [slot for slot in idle_slots if slot not in new]
            busy |= new
            if not busy:
                break
            for slot in new:
                self._connection(slot)  # start all processes before waiting for any process
            for slot, task in new.items():
                self._send(slot, (work, task))
            ready = multiprocessing.connection.wait([self._workers[slot][1] for slot in busy], _POLL_S)
            on_progress(self._counts_since(counts_before))
            self._end_slow_workers(busy)
            for slot in [slot for slot in busy if self._workers[slot][1] in ready]:
                result = self._result(slot)
                if isinstance(result, WorkerDied) and result.index == NOT_STARTED:  # the worker was killed while idle
                    self._send(slot, (work, busy[slot]))
                    continue
                idle_slots.append(slot)
                yield busy.pop(slot), result
        on_progress(self._counts_since(counts_before))

    def _send(self, slot: int, message: Any) -> None:
        TaskProgress(self._counters, TaskProgress.SIZE * slot).begin(NOT_STARTED)
        try:
            self._connection(slot).send(message)
        except ConnectionError:  # the worker died while it was idle: start another worker
            self._stop([slot])
            try:
                self._connection(slot).send(message)
            except ConnectionError:
                self._workers[slot][0].join()
                raise self._start_error(slot) from None

    def _end_slow_workers(self, slots: Iterable[int]) -> None:
        """At most once a second, kill the workers that have used more CPU time for their input than allowed."""
        if time.monotonic() < self._checked_at + _CHECK_CPU_S:
            return
        self._checked_at = time.monotonic()
        for slot in slots:
            deadline_s = TaskProgress(self._counters, TaskProgress.SIZE * slot).cpu_deadline_s
            process = self._workers[slot][0]
            if deadline_s and _cpu_time_s(process.pid) > deadline_s + _CPU_GRACE_S:
                self._too_slow.add(slot)
                process.kill()

    def _counts(self) -> Counts:
        each = [TaskProgress(self._counters, TaskProgress.SIZE * slot).counts for slot in range(self.jobs)]
        return Counts(*(sum(counts) for counts in zip(*each, strict=True)))

    def _counts_since(self, before: Counts) -> Counts:
        return Counts(*(now - then for now, then in zip(self._counts(), before, strict=True)))

    def _result(self, slot: int) -> Any:
        process, connection = self._workers[slot]
        try:
            value, error = connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            if slot in self._start_outputs and TaskProgress(self._counters, TaskProgress.SIZE * slot).index < 0:
                raise self._start_error(slot) from None
            self._forget(slot)
            is_too_slow = slot in self._too_slow
            self._too_slow.discard(slot)
            index = TaskProgress(self._counters, TaskProgress.SIZE * slot).index
            return WorkerDied(index, process.exitcode or 0, is_too_slow)
        if slot in self._start_outputs:
            self._start_outputs.pop(slot).close()
        if error is not None:
            raise error
        return value

    def _start_error(self, slot: int) -> WorkerNotStarted:
        """Return the error of a worker that has ended before its first task."""
        exit_code = self._workers[slot][0].exitcode or 0
        error = start_error(WorkerDied(NOT_STARTED, exit_code).describe(), exit_code < 0, self._start_outputs[slot])
        self._forget(slot)
        return error

    def _forget(self, slot: int) -> None:
        self._workers.pop(slot)[1].close()
        if slot in self._start_outputs:
            self._start_outputs.pop(slot).close()

    def _connection(self, slot: int) -> Connection:
        if slot not in self._workers:
            parent_end, worker_end = self._context.Pipe()
            output = StartOutput()
            args = worker_end, self._counters, slot, self._preload, output
            process = self._context.Process(target=_serve, args=args, daemon=True)
            with output.keep():
                # The resource tracker unblocks SIGINT when it starts. Start it now, before start_options blocks SIGINT.
                multiprocessing.resource_tracker.ensure_running()
                with start_options():
                    process.start()
            worker_end.close()
            self._workers[slot], self._start_outputs[slot] = (process, parent_end), output
        return self._workers[slot][1]

    def __enter__(self) -> WorkerPool:
        for slot in range(self.jobs if self._preload else 0):
            self._connection(slot)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop(list(self._workers))

    def _stop(self, slots: Iterable[int]) -> None:
        stopped = [slot for slot in list(slots) if slot in self._workers]
        for slot in stopped:
            self._workers[slot][0].kill()  # unlike SIGTERM, SIGKILL also ends a suspended process
        for slot in stopped:
            self._workers[slot][0].join()
            self._forget(slot)


def _cpu_time_s(pid: int | None) -> float:
    """Return the CPU time of all threads of a process, in user and kernel mode; 0 if the time is not known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _serve(connection: Connection, counters: SharedIntegers, slot: int, preload: str, output: StartOutput) -> None:
    """Main function of a worker: receive tasks and send results until the parent closes the connection."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    keep_freed_memory(_KEEP_BYTES, map_large_blocks=True)
    task_progress = TaskProgress(counters, TaskProgress.SIZE * slot)
    if preload:
        importlib.import_module(preload)
    with suppress(EOFError):
        while True:
            work, task = connection.recv()
            output.restore()
            task_progress.begin(0)
            outcome: tuple[Any, BaseException | None]  # (result, error)
            try:
                outcome = work(task, task_progress), None
            except UserError as error:
                outcome = None, error
            # An error in the code of `work`. Its traceback is sent as text, because pickling drops a traceback.
            except Exception as error:
                failure = RuntimeError("in a worker process:\n" + traceback.format_exc())
                outcome = None, memory_error(error, " in a worker process", "Pass fewer --jobs.") or failure
            connection.send(outcome)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

"""Who does the work: processes on this machine, and what they tell while they work.

Every worker is a fresh interpreter (an LMDB must not cross a fork) with one BLAS thread. Workers leave Ctrl-C to the
parent, and end by themselves when the parent is gone, even when it was killed. A worker that dies is told from one
that fails: its last step is known, and the others go on.
"""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, MutableSequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeVar

from prep.console import UserError, keep_freed_memory

T = TypeVar("T")
R = TypeVar("R")

_KEEP_BYTES = 256_000_000  # of freed memory a worker holds on to: the arrays of a photograph, not of a giant
_POLL_S = 0.2
NOT_STARTED = -1  # `at` of a worker that has not begun its task


class Counts(NamedTuple):
    """What all workers have done so far."""

    done: int  # inputs or records
    bad: int
    bytes: int


class TaskProgress:
    """A worker's numbers, written by it and read by the parent at any time: where it is, and its Counts."""

    SIZE = 4

    def __init__(self, numbers: MutableSequence[int] | None = None, first: int = 0) -> None:
        self._numbers = [0] * self.SIZE if numbers is None else numbers
        self._first = first

    def begin(self, index: int) -> None:
        """Input `index` of the task is next: what the parent names if the worker dies."""
        self._numbers[self._first] = index

    def count(self, size: int = 0, bad: bool = False) -> None:
        """One input more is done, and gave `size` bytes."""
        self._numbers[self._first + 1] += 1
        self._numbers[self._first + 2] += bad
        self._numbers[self._first + 3] += size

    @property
    def index(self) -> int:
        """What `begin` was last told."""
        return self._numbers[self._first]

    @property
    def counts(self) -> Counts:
        """Since the worker began."""
        return Counts(*self._numbers[self._first + 1 : self._first + self.SIZE])


@dataclass(frozen=True)
class WorkerDied:
    """A worker's process ended in the middle of a task."""

    index: int  # the index it had begun, as its TaskProgress says; NOT_STARTED where it had not begun
    exit_code: int  # negative: of the signal

    def describe(self) -> str:
        """`was killed (SIGKILL)`, `ended with code 1`."""
        if self.exit_code >= 0:
            return f"ended with code {self.exit_code}"
        with suppress(ValueError):
            return f"was killed ({signal.Signals(-self.exit_code).name})"
        return f"was killed (signal {-self.exit_code})"


class Runner(Protocol):
    """Anything that can do independent tasks: the processes below, or a cluster."""

    jobs: int

    def map(
        self, work: Callable[[T, TaskProgress], R], tasks: Iterable[T], watch: Callable[[Counts], None]
    ) -> Generator[tuple[T, R | WorkerDied], None, None]:
        """Each task with its result, as they are ready. The first exception of `work` is raised here."""


class WorkerPool:
    """A runner of `jobs` processes, started as they are needed, ended by `with`.

    With `preload`, the name of a module, all are started by `with`, and import it at once: libraries are loaded while
    the parent still lists its inputs.
    """

    def __init__(self, jobs: int, preload: str = "") -> None:
        self.jobs = jobs
        self._preload = preload
        self._context = multiprocessing.get_context("spawn")
        self._numbers = self._context.RawArray("q", TaskProgress.SIZE * jobs)
        self._workers: dict[int, tuple[BaseProcess, Connection]] = {}  # by slot

    def map(
        self, work: Callable[[T, TaskProgress], R], tasks: Iterable[T], watch: Callable[[Counts], None]
    ) -> Generator[tuple[T, R | WorkerDied], None, None]:
        """As Runner.map; `work` must be a function of a module. Takes from `tasks` only what is about to be done."""
        busy = dict[int, T]()
        try:
            yield from self._map(work, iter(tasks), watch, busy)
        finally:
            self._end(busy)  # where nobody takes the results, no worker goes on, nor answers for a later task

    def _map(
        self,
        work: Callable[[T, TaskProgress], R],
        waiting: Iterator[T],
        watch: Callable[[Counts], None],
        busy: dict[int, T],
    ) -> Iterator[tuple[T, R | WorkerDied]]:
        before = self._counts()
        idle, more = list(range(self.jobs)), True
        while busy or more:
            fresh = dict(zip(idle, waiting, strict=False)) if more else {}
            more = more and len(fresh) == len(idle)
            idle = [slot for slot in idle if slot not in fresh]
            busy |= fresh
            for slot in fresh:
                self._connection(slot)  # all start before the first is waited for
            for slot, task in fresh.items():
                self._send(slot, (work, task))
            ready = multiprocessing.connection.wait([self._workers[slot][1] for slot in busy], _POLL_S)
            watch(Counts(*(now - then for now, then in zip(self._counts(), before, strict=True))))
            for slot in [slot for slot in busy if self._workers[slot][1] in ready]:
                idle.append(slot)
                yield busy.pop(slot), self._result(slot)
        watch(Counts(*(now - then for now, then in zip(self._counts(), before, strict=True))))

    def _send(self, slot: int, message: Any) -> None:
        TaskProgress(self._numbers, TaskProgress.SIZE * slot).begin(NOT_STARTED)
        try:
            self._connection(slot).send(message)
        except ConnectionError:  # the worker died while it had nothing to do
            self._end([slot])
            try:
                self._connection(slot).send(message)
            except ConnectionError:
                raise UserError("Worker processes end as soon as they start. Try again with fewer --jobs.") from None

    def _counts(self) -> Counts:
        each = [TaskProgress(self._numbers, TaskProgress.SIZE * slot).counts for slot in range(self.jobs)]
        return Counts(*(sum(numbers) for numbers in zip(*each, strict=True)))

    def _result(self, slot: int) -> Any:
        process, connection = self._workers[slot]
        try:
            value, error = connection.recv()
        except (EOFError, ConnectionError):
            process.join()
            connection.close()
            del self._workers[slot]
            return WorkerDied(TaskProgress(self._numbers, TaskProgress.SIZE * slot).index, process.exitcode or 0)
        if error is not None:
            raise error
        return value

    def _connection(self, slot: int) -> Connection:
        if slot not in self._workers:
            multiprocessing.resource_tracker.ensure_running()  # starting it later would let SIGINT through again
            ours, theirs = self._context.Pipe()
            told = theirs, self._numbers, slot, self._preload
            process = self._context.Process(target=_serve, args=told, daemon=True)
            with _one_blas_thread(), _ctrl_c_held_back():
                process.start()
            theirs.close()
            self._workers[slot] = process, ours
        return self._workers[slot][1]

    def __enter__(self) -> WorkerPool:
        for slot in range(self.jobs if self._preload else 0):
            self._connection(slot)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._end(list(self._workers))

    def _end(self, slots: Iterable[int]) -> None:
        ended = [self._workers.pop(slot) for slot in list(slots) if slot in self._workers]
        for process, _ in ended:
            process.kill()  # idle, or in a task whose result nobody will take; also where it was stopped
        for process, connection in ended:
            process.join()
            connection.close()


def _serve(connection: Connection, numbers: MutableSequence[int], slot: int, preload: str) -> None:
    """A worker's life: tasks in, results out, until the parent closes the connection."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory(_KEEP_BYTES, map_large_blocks=True)
    tally = TaskProgress(numbers, TaskProgress.SIZE * slot)
    if preload:
        importlib.import_module(preload)
    with suppress(EOFError):
        while True:
            work, task = connection.recv()
            tally.begin(0)
            answer: tuple[Any, BaseException | None]
            try:
                answer = work(task, tally), None
            except UserError as error:
                answer = None, error
            except Exception:  # a fault of ours: its place would be lost on the way
                answer = None, RuntimeError("in a worker process:\n" + traceback.format_exc())
            connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


@contextmanager
def _ctrl_c_held_back() -> Iterator[None]:
    """Block SIGINT: processes started inside never see it, and here it comes through at the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _one_blas_thread() -> Iterator[None]:
    """Processes started inside have one BLAS thread each: the libraries read their environment when they are loaded."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

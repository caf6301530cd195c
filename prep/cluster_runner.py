"""Runs tasks on the machines of a Ray cluster, with progress counters and crash detection.

    driver (this process)     Ray worker, one for each running task       worker process
    ClusterRunner.map   ───>  _run: a WorkerPool of one process     ───>  the work itself
          ^                           │ counts, every second or more rarely
          └──────── _Counters <───────┘ whether the driver wants the task to stop

The worker process belongs to a WorkerPool (prep/workers.py), so a task runs as it does without a cluster: with one BLAS
thread and the same memory settings. If the worker process crashes, the result of the task is a WorkerDied, which has
the index of the input that was being processed. A task is lost if its node dies, or if Ray kills its Ray worker because
memory is low. A lost task is submitted again, and no input is reported as the cause of the loss. The worker process
ends when its Ray worker ends. The Ray worker ends when its node or the driver ends.
"""

from __future__ import annotations

import pickle
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from prep.cluster import connected
from prep.cluster_nodes import cause_text, check_nodes, pinned
from prep.console import UserError, usable_cores
from prep.workers import Counts, TaskProgress, WorkerDied, WorkerPool

T = TypeVar("T")
R = TypeVar("R")

_POLL_S = 0.2  # longest time for which the driver waits for the end of a task before it does other work
_REPORT_S = 1.0  # interval between progress reports of a task; each report costs several milliseconds of CPU time
_REPORTS_PER_S = 1000  # largest number of progress reports a second that all running tasks together send
_LOST_LIMIT = 5  # if one task is lost this number of times, `map` raises an error
_STOP_S = 5.0  # running tasks have this time to stop before Ray kills them
# Interval between checks of the head node, and time after which a head node that does not answer counts as lost.
_HEAD_EVERY_S, _HEAD_LOST_S = 5.0, 30.0


@dataclass
class _Running:
    """One submission of a task to Ray."""

    attempt: str  # unique name of this submission
    task: Any
    payload: bytes  # pickled (work, task)
    lost_before: int  # number of earlier submissions of the task that were lost


class ClusterRunner:
    """A Runner whose tasks run on the cluster at `address`. At most `jobs` tasks run at a time, each on one core.

    If `jobs` is None, all cores of the cluster are used. If `preload` names a module, worker processes start at the
    beginning of the `with` block and import the module. prep/cluster.py describes the addresses.
    """

    def __init__(self, address: str, jobs: int | None, preload: str = "") -> None:
        self.address, self.jobs = address, jobs or 1
        self._wanted_jobs, self._preload = jobs, preload
        self._resources = ExitStack()
        self._ray: Any = None
        self._counters: Any = None  # handle of the actor _Counters
        self._run: Any = None  # the remote function _run

    def __enter__(self) -> ClusterRunner:
        with ExitStack() as resources:
            cores = self._wanted_jobs or usable_cores()
            ray = self._ray = resources.enter_context(connected(self.address, cores=cores))
            self.jobs = self._wanted_jobs or int(ray.cluster_resources().get("CPU", 0))
            if not self.jobs:
                raise UserError(
                    f"cluster {self.address}: its nodes have no CPU cores. Start a node with: "
                    "ray start --address HOST:PORT --num-cpus N"
                )
            here = pinned(ray, ray.get_runtime_context().get_node_id(), soft=True)
            self._counters = ray.remote(_Counters).options(num_cpus=0, scheduling_strategy=here).remote()
            self._run = ray.remote(_run).options(num_cpus=1, max_retries=0)
            if self._preload:
                _start = ray.remote(_start_pool).options(num_cpus=1, max_retries=0)
                self._starting = [_start.remote(self._preload) for _ in range(self.jobs)]
            self._resources = resources.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._resources.close()

    def check_machines(self, folder: Path | None, source: Path, versions: Callable[[], dict[str, str]]) -> None:
        """Check that all nodes see the same files and have the same software versions. See Runner.check_machines.

        The error names the first node that differs from this machine, and both values.
        """
        check_nodes(self._ray, folder, source, versions)

    def map(
        self, work: Callable[[T, TaskProgress], R], tasks: Iterable[T], on_progress: Callable[[Counts], None]
    ) -> Generator[tuple[T, R | WorkerDied], None, None]:
        """Run `work` on every task. See Runner.map. `work` must be a module-level function that every node can import.

        If the generator is closed or raises, the running tasks are stopped before `map` ends.
        """
        running: dict[Any, _Running] = {}  # Ray's reference to the result -> running task
        try:
            yield from self._map(work, iter(tasks), on_progress, running)
        finally:
            self._stop(running)

    def _map(
        self,
        work: Callable[[T, TaskProgress], R],
        tasks: Iterator[T],
        on_progress: Callable[[Counts], None],
        running: dict[Any, _Running],
    ) -> Iterator[tuple[T, Any]]:
        ray, lost = self._ray, deque[_Running]()
        finished = Counts(0, 0, 0)  # sum of the counts of the tasks that have ended
        reported: dict[str, Counts] = {}  # attempt -> counts of a running task
        reading, read_at = None, 0.0
        head = _HeadNode(ray.get_runtime_context().gcs_address, self.address)
        ended: list[tuple[T, Any]] = []  # tasks with their results, which are yielded after new tasks are submitted
        while True:
            while len(running) < self.jobs and (new := _next_run(work, tasks, lost)):
                interval_s = max(_REPORT_S, self.jobs / _REPORTS_PER_S)
                ref = self._run.remote(new.payload, new.attempt, self._counters, interval_s, self._preload)
                running[ref] = new
            yield from ended
            ended.clear()
            if not running:
                break
            if reading is None and time.monotonic() > read_at + _REPORT_S:
                reading, read_at = self._counters.read.remote(), time.monotonic()
            ready, _ = ray.wait([*running, *([reading] if reading else [])], num_returns=1, timeout=_POLL_S)
            head.check()
            for ref in ready:
                if ref is reading:
                    with suppress(ray.exceptions.RayError):
                        reported = ray.get(ref)
                    reading = None
                    continue
                done = running.pop(ref)
                try:
                    result, counts, error = ray.get(ref)
                except ray.exceptions.RayTaskError as failure:
                    raise RuntimeError(f"in a Ray task:\n{failure}") from None
                except ray.exceptions.RayError as failure:
                    lost.append(_lost(done, failure))
                    continue
                finished = _sum(finished, counts)
                if error is not None:
                    raise pickle.loads(error)
                ended.append((done.task, pickle.loads(result)))
            attempts = {run.attempt for run in running.values()}
            on_progress(_sum(finished, *(counts for name, counts in reported.items() if name in attempts)))
        on_progress(finished)

    def _stop(self, running: dict[Any, _Running]) -> None:
        """Stop the running tasks, and wait until their worker processes have ended."""
        if not running:
            return
        ray, refs = self._ray, list(running)
        with suppress(ray.exceptions.RayError):
            self._counters.stop.remote([run.attempt for run in running.values()])
            _, refs = ray.wait(refs, num_returns=len(refs), timeout=_STOP_S)
            for ref in refs:
                ray.cancel(ref, force=True)
            ray.wait(refs, num_returns=len(refs), timeout=_STOP_S) if refs else None


def _next_run(work: Callable[..., Any], tasks: Iterator[Any], lost: deque[_Running]) -> _Running | None:
    """Return the next submission to start.

    Lost tasks are submitted before new tasks. Returns None if no task is left.
    """
    if lost:
        again = lost.popleft()
        return _Running(secrets.token_hex(8), again.task, again.payload, again.lost_before + 1)
    for task in tasks:
        return _Running(secrets.token_hex(8), task, pickle.dumps((work, task)), 0)
    return None


def _lost(run: _Running, failure: Exception) -> _Running:
    """Return the lost submission `run`, so that its task is submitted again.

    Raises UserError if the task was lost _LOST_LIMIT times.
    """
    if run.lost_before + 1 >= _LOST_LIMIT:
        raise UserError(
            f"A task was lost {_LOST_LIMIT} times on the cluster, the last time because: {cause_text(failure)}. "
            "If memory ran out, run the same command again with fewer --jobs."
        )
    return run


def _sum(*counts: Counts) -> Counts:
    return Counts(*(sum(values) for values in zip(*counts, strict=True)))


class _HeadNode:
    """Checks every _HEAD_EVERY_S whether the head node of the cluster still accepts connections.

    Without this check, Ray would wait for a lost head node forever.
    """

    def __init__(self, gcs_address: str, cluster: str) -> None:
        host, _, port = gcs_address.rpartition(":")
        self._host_and_port, self._cluster = (host.strip("[]"), int(port)), cluster
        self._checked_at = self._answered_at = time.monotonic()

    def check(self) -> None:
        """Raise UserError if the head node has not answered for _HEAD_LOST_S."""
        now = time.monotonic()
        if now < self._checked_at + _HEAD_EVERY_S:
            return
        self._checked_at = now
        try:
            socket.create_connection(self._host_and_port, timeout=2.0).close()
            self._answered_at = now
        except OSError as error:
            if now > self._answered_at + _HEAD_LOST_S:
                raise UserError(
                    f"cluster {self._cluster}: the head node {self._host_and_port[0]} has not answered for "
                    f"{now - self._answered_at:.0f} s ({error.strerror or error}). Start the cluster again, then run "
                    "the same command again. Finished work is kept."
                ) from None


# Functions that run on the nodes


class _Counters:
    """Actor that collects the counts of all running tasks, and tells tasks to stop."""

    def __init__(self) -> None:
        self._counts: dict[str, Counts] = {}  # attempt -> counts
        self._stopped: set[str] = set()  # attempts that must stop

    def report(self, attempt: str, counts: Counts | None) -> bool:
        """Set the counts of a task, or remove them if `counts` is None. Returns whether the task must stop."""
        if counts is None:
            self._counts.pop(attempt, None)
        else:
            self._counts[attempt] = counts
        return attempt in self._stopped

    def read(self) -> dict[str, Counts]:
        """Return {attempt: counts} of the running tasks."""
        return self._counts

    def stop(self, attempts: list[str]) -> None:
        """Stop the tasks of `attempts` when the tasks next report their counts."""
        self._stopped.update(attempts)


class _Stopped(Exception):
    """Raised in a task that the driver wants to stop."""


_pools: dict[str, WorkerPool] = {}  # preloaded module -> pool of this Ray worker


@contextmanager
def _pool(preload: str) -> Iterator[WorkerPool]:
    """Return the pool of this Ray worker. The pool has one worker process, which later tasks reuse.

    multiprocessing makes a new process import the file of the module __main__. In a Ray worker, the file of `__main__`
    is Ray's own program, which the worker process does not need. This function therefore hides `__main__.__file__`.
    """
    main = sys.modules["__main__"]
    file = main.__dict__.pop("__file__", None)
    try:
        if preload not in _pools:
            _pools[preload] = WorkerPool(1, preload).__enter__()
        yield _pools[preload]
    finally:
        if file is not None:
            main.__file__ = file


def _start_pool(preload: str) -> None:
    """Start the worker process of this Ray worker, and wait until it has imported the module `preload`."""
    with _pool(preload) as pool:
        list(pool.map(_nothing, [None], lambda counts: None))


def _nothing(task: None, task_progress: TaskProgress) -> None:
    pass


def _run(
    payload: bytes, attempt: str, counters: Any, interval_s: float, preload: str
) -> tuple[bytes, Counts, bytes | None]:
    """Run one task in the worker process of this Ray worker.

    Returns the pickled result, the counts, and the pickled error (None if there was no error).
    """
    import ray

    last = Counts(0, 0, 0)
    answers: list[Any] = []  # Ray's reference to the answer to the last report; empty before the first report
    sent_at = time.monotonic()

    def report(counts: Counts) -> None:
        nonlocal last, sent_at
        last = counts
        if time.monotonic() < sent_at + interval_s or (answers and not ray.wait(answers, timeout=0)[0]):
            return
        with suppress(ray.exceptions.RayError):
            if answers and ray.get(answers.pop()):
                raise _Stopped
        answers[:] = [counters.report.remote(attempt, counts)]
        sent_at = time.monotonic()

    try:
        with _pool(preload) as pool, closing(pool.map(_run_pickled, [payload], report)) as results:
            ((_, result),) = results
        return result if isinstance(result, bytes) else pickle.dumps(result), last, None
    except _Stopped:
        return pickle.dumps(None), last, None
    except (UserError, RuntimeError) as error:
        return b"", last, pickle.dumps(error)
    finally:
        if answers:
            counters.report.remote(attempt, None)


def _run_pickled(payload: bytes, task_progress: TaskProgress) -> bytes:
    """Unpickle the pair (work, task), and call `work` with the task.

    This function runs in the worker process, so the Ray worker itself does not import the modules of the task.
    """
    work, task = pickle.loads(payload)
    return pickle.dumps(work(task, task_progress))

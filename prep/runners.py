"""Who builds the shards: a pool of processes on this machine.

Every worker is a fresh interpreter (an LMDB must not cross a fork) with one BLAS thread. Workers leave Ctrl-C to the
parent, and end by themselves when the parent is gone, even when it was killed.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.sharedctypes import Synchronized

from prep.build import ShardTask, build_shard
from prep.console import Progress, UserError

_done: Synchronized[int]  # inputs done by all workers; set in each worker by _begin


def run_local(tasks: Sequence[ShardTask], jobs: int, report: Progress) -> None:
    """Build `tasks` in `jobs` processes; the first error ends the build, what is finished stays.

    Raises UserError as build_shard does, and where a worker was killed.
    """
    if not tasks:
        return
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    before = report.done
    with _one_blas_thread():
        pool = ProcessPoolExecutor(min(jobs, len(tasks)), context, _begin, (done,))
        try:
            with _ctrl_c_held_back():  # submitting starts the workers, which inherit that
                running: set[Future[None]] = {pool.submit(_work, task) for task in tasks}
            while running:
                finished, running = wait(running, timeout=0.2, return_when=FIRST_EXCEPTION)
                report.update(before + done.value)
                for future in finished:
                    future.result()
        except BrokenProcessPool:
            raise UserError(
                "A worker process was killed, most likely for want of memory. Give the same command again with fewer "
                "--jobs: the shards that are finished are kept."
            ) from None
        except BaseException:
            for process in list(pool._processes.values()):  # no public way to end work that is under way (3.14 has one)
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(done: Synchronized[int]) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _work(task: ShardTask) -> None:
    build_shard(task, _count)


def _count() -> None:
    with _done.get_lock():
        _done.value += 1


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

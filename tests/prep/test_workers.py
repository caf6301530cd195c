"""prep.workers: tasks in worker processes, progress counts, errors, killed workers, and the end of the parent.

Workers import this module and run its top-level functions.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from prep.console import DiskFull, UserError
from prep.worker_start import WorkerNotStarted
from prep.workers import Counts, TaskProgress, WorkerDied, WorkerPool
from tests.helpers.building import DEADLINE_S, is_alive


def square(task: int, task_progress: TaskProgress) -> tuple[int, int]:
    """Return (square of the task, process id of the worker)."""
    task_progress.begin(task)
    task_progress.count(10 * task, bad=task % 2 == 1)
    return task**2, os.getpid()


def slow_square(task: float, task_progress: TaskProgress) -> tuple[float, int]:
    time.sleep(task)
    return task**2, os.getpid()


def wait_for(task: Path | None, task_progress: TaskProgress) -> None:
    """Wait until the file `task` exists. If `task` is None, return at once."""
    deadline = time.monotonic() + 60
    while task is not None and not task.exists():
        assert time.monotonic() < deadline, f"no {task}"
        time.sleep(0.01)


def five_steps(task: int, task_progress: TaskProgress) -> None:
    for number in range(5):
        task_progress.begin(number)
        task_progress.count(100, bad=number == 4)
        time.sleep(0.15)


def fail(task: Any, task_progress: TaskProgress) -> None:
    if isinstance(task, Exception):
        raise task


def env_and_sigint_blocked(task: str, task_progress: TaskProgress) -> tuple[str | None, bool]:
    return os.environ.get(task), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def die(task: tuple[int, int, int], task_progress: TaskProgress) -> int:
    """Take `length` steps. At step `fatal_step`, die of signal `signum`, or end with exit code 3 if `signum` is 0.

    If `fatal_step` is -1, the process survives.
    """
    fatal_step, signum, length = task
    for number in range(length):
        task_progress.begin(number)
        task_progress.count(1)
        if number == fatal_step:
            os.kill(os.getpid(), signum) if signum else os._exit(3)
    return length


def die_at_once(task: int, task_progress: TaskProgress) -> int:
    if task:
        os.kill(os.getpid(), signal.SIGKILL)
    task_progress.begin(7)
    return os.getpid()


def ignore(counts: Counts) -> None:
    pass


def with_this_file() -> dict[str, str]:
    """Environment variables of a process that can import this module."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


def wait_for_end(pids: set[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"left behind: {pids}"
        time.sleep(0.01)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_each_task_comes_back_with_its_result(jobs: int) -> None:
    with WorkerPool(jobs) as workers:
        first = list(workers.map(square, iter(range(20)), ignore))
        second = list(workers.map(square, range(20, 25), ignore))
        assert list(workers.map(square, [], ignore)) == []
    results = [*first, *second]
    assert sorted((task, result[0]) for task, result in results) == [(k, k * k) for k in range(25)]
    pids = {result[1] for _, result in results}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= jobs
    wait_for_end(pids)


def test_results_are_yielded_as_they_finish(tmp_path: Path) -> None:
    """The first task ends only after the results of all other tasks have been yielded."""
    finished: list[Path | None] = []
    with WorkerPool(2) as workers:
        for task, _ in workers.map(wait_for, [tmp_path / "file", None, None, None, None], ignore):
            finished.append(task)
            if len(finished) == 4:
                (tmp_path / "file").touch()
    assert finished == [None, None, None, None, tmp_path / "file"]


def test_no_more_processes_start_than_there_are_tasks() -> None:
    with WorkerPool(50) as workers:
        pids = {result[1] for _, result in workers.map(slow_square, [0.1], ignore)}
        assert len(pids) == 1
        assert len(workers._workers) == 1


def test_a_task_is_taken_only_when_a_worker_is_free() -> None:
    """A task of a build holds all inputs of its shard. Therefore, at most `jobs` tasks are in memory at a time."""
    taken, finished, max_running = 0, 0, 0

    def tasks() -> Iterator[int]:
        nonlocal taken, max_running
        for number in range(12):
            taken += 1
            max_running = max(max_running, taken - finished)
            yield number

    with WorkerPool(2) as workers:
        for _ in workers.map(square, tasks(), ignore):
            finished += 1
            assert taken <= finished + 2
    assert (taken, finished, max_running) == (12, 12, 2)


def test_an_exception_of_the_task_iterator_is_raised() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise KeyError("none")

    with WorkerPool(1) as workers, pytest.raises(KeyError, match="none"):
        list(workers.map(square, tasks(), ignore))


@pytest.mark.parametrize("error", [UserError("user error"), DiskFull("no space"), ZeroDivisionError("a bug")])
def test_an_exception_in_a_worker_is_raised_in_the_parent(error: Exception) -> None:
    """A UserError is raised unchanged. Any other exception becomes a RuntimeError with the worker's traceback."""
    expected = type(error) if isinstance(error, UserError) else RuntimeError
    with WorkerPool(2) as workers:
        with pytest.raises(expected, match=str(error)) as raised:
            list(workers.map(fail, [0, error, 0], ignore))
        assert type(raised.value) is expected
        if isinstance(error, UserError):
            assert raised.value.args == error.args
            assert getattr(raised.value, "exit_code", None) == error.exit_code
        else:
            assert "test_workers.py" in str(raised.value) and "in fail" in str(raised.value)


def test_a_killed_worker_is_reported_and_the_other_tasks_finish() -> None:
    tasks = [(-1, 0, 4), (3, signal.SIGKILL, 9), (-1, 0, 5), (0, 0, 2), (1, signal.SIGSEGV, 6), (-1, 0, 6)]
    with WorkerPool(2) as workers:
        pairs = list(workers.map(die, tasks, ignore))
    assert sorted(task for task, _ in pairs) == sorted(tasks)
    results = dict(pairs)
    assert {task: result for task, result in results.items() if task[0] < 0} == {t: t[2] for t in tasks if t[0] < 0}
    died = {task: result for task, result in results.items() if isinstance(result, WorkerDied)}
    assert {task: result.index for task, result in died.items()} == {t: t[0] for t in tasks if t[0] >= 0}
    assert [died[tasks[k]].describe() for k in (1, 3, 4)] == [
        "was killed (SIGKILL)",
        "ended with code 3",
        "was killed (SIGSEGV)",
    ]
    assert WorkerDied(0, -63).describe() == "was killed (signal 63)"


def test_the_reported_input_of_a_killed_worker_belongs_to_its_last_task() -> None:
    """In its previous task, the worker reached input 7. The error about the fatal task must not name input 7."""
    with WorkerPool(1) as workers:
        (_, first), (_, second), (_, third) = workers.map(die_at_once, [0, 1, 0], ignore)
    assert isinstance(first, int) and isinstance(third, int) and first != third
    assert second == WorkerDied(0, -signal.SIGKILL)


def test_a_worker_killed_between_tasks_is_replaced() -> None:
    with WorkerPool(2) as workers:
        pids = {result[1] for _, result in workers.map(slow_square, [0.2, 0.2], ignore)}
        assert len(pids) == 2
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for process, _ in workers._workers.values():
            process.join(DEADLINE_S)
        results = [result for _, result in workers.map(slow_square, [0.1, 0.1, 0.1], ignore)]
    assert not any(isinstance(result, WorkerDied) for result in results), results
    assert not {result[1] for result in results} & pids


@pytest.mark.parametrize("how", ["closed", "on_progress raises", "work raises"])
def test_an_abandoned_map_sends_no_result_to_the_next(how: str) -> None:
    """If `map` ends early, busy workers are killed, so that the next call does not receive their results."""

    def refuse(counts: Counts) -> None:
        raise UserError("enough")

    with WorkerPool(2) as workers:
        if how == "closed":
            with closing(workers.map(slow_square, [0.01, 0.7, 0.6, 0.5], ignore)) as results:
                next(iter(results))
        elif how == "on_progress raises":
            with pytest.raises(UserError, match="enough"):
                list(workers.map(slow_square, [0.6, 0.7], refuse))
        else:
            with pytest.raises(RuntimeError, match="TypeError"):
                list(workers.map(slow_square, ["not a number", 0.7], ignore))  # type: ignore[list-item]
        results_after = list(workers.map(square, range(6), ignore))
    assert sorted((task, result[0]) for task, result in results_after) == [(k, k * k) for k in range(6)]


def test_on_progress_gets_the_counts_of_all_workers() -> None:
    """`map` calls on_progress several times during a task. The last call has the exact totals.

    A second call of `map` counts from 0 again.
    """
    seen: list[Counts] = []
    with WorkerPool(2) as workers:
        for _ in range(2):
            seen.clear()
            list(workers.map(five_steps, [0, 1, 2], seen.append))
            assert seen == sorted(seen)
            assert seen[-1] == (15, 3, 1500)
            assert len({counts.done for counts in seen}) > 4
            assert seen[0].done <= 4


def test_an_exception_of_on_progress_ends_the_map() -> None:
    def refuse(counts: Counts) -> None:
        raise UserError("enough")

    with WorkerPool(1) as workers, pytest.raises(UserError, match="enough"):
        list(workers.map(five_steps, range(100), refuse))


def test_workers_have_one_blas_thread_and_leave_ctrl_c_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and the signal mask of the parent do not change."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before, mask = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with WorkerPool(1) as workers:
        assert [result for _, result in workers.map(env_and_sigint_blocked, names, ignore)] == [("1", True)] * 3
    assert dict(os.environ) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


FIRST_WORKERS = """
import signal
from tests.prep import test_workers
from prep.workers import WorkerPool
with WorkerPool(2) as workers:
    seen = workers.map(test_workers.env_and_sigint_blocked, ["OMP_NUM_THREADS"] * 2, test_workers.ignore)
    print([result for _, result in seen])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_the_first_worker_of_a_process_leaves_ctrl_c_to_the_parent() -> None:
    """The pool blocks SIGINT in the parent while it starts workers, so that the workers inherit the blocked signal.

    With the first worker, multiprocessing also starts its resource tracker, and then unblocks SIGINT in the parent. In
    all workers, SIGINT must nevertheless be blocked.
    """
    ended = subprocess.run([sys.executable, "-c", FIRST_WORKERS], env=with_this_file(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[('1', True), ('1', True)]", "set()"]


def test_leaving_the_with_block_kills_busy_workers() -> None:
    began = time.monotonic()
    with WorkerPool(2) as workers:
        pids = {result[1] for _, result in workers.map(slow_square, [0.1, 0.1], ignore)}
        with pytest.raises(UserError):
            for _ in workers.map(slow_square, [0.01, 30.0], ignore):
                raise UserError("enough")
    assert time.monotonic() - began < 20
    wait_for_end(pids)


ORPHANS = """
import sys
from tests.prep import test_workers
from prep.workers import WorkerPool
with WorkerPool(2) as workers:
    for _, result in workers.map(test_workers.slow_square, [0.1, 0.1], test_workers.ignore):
        print(result[1], flush=True)
    busy = sys.argv[1] == "busy"
    for _ in workers.map(test_workers.slow_square, [60.0] * 2 if busy else [], test_workers.ignore):
        pass
    print("idle", flush=True)
    input()
"""


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_workers_end_when_their_parent_is_killed(state: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS, state],
        env=with_this_file(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = {int(parent.stdout.readline()) for _ in range(2)}
        if state == "idle":
            assert parent.stdout.readline() == "idle\n"
        else:
            time.sleep(0.2)
        assert all(map(is_alive, pids))
        parent.kill()
        parent.wait()
        began = time.monotonic()
        wait_for_end(pids)
        assert time.monotonic() - began < 10


def test_task_progress_counts_without_a_worker() -> None:
    task_progress = TaskProgress()
    task_progress.begin(4)
    task_progress.count(10)
    task_progress.count(5, bad=True)
    assert task_progress.index == 4
    assert task_progress.counts == Counts(done=2, bad=1, bytes=15)


def test_several_task_progresses_share_an_array() -> None:
    numbers = [0] * (3 * TaskProgress.SIZE)
    for slot in range(3):
        task_progress = TaskProgress(numbers, slot * TaskProgress.SIZE)
        task_progress.begin(slot)
        task_progress.count(slot, bad=slot == 2)
    assert [TaskProgress(numbers, slot * TaskProgress.SIZE).index for slot in range(3)] == [0, 1, 2]
    assert [TaskProgress(numbers, slot * TaskProgress.SIZE).counts for slot in range(3)] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 2),
    ]


def is_loaded(name: str, task_progress: TaskProgress) -> bool:
    return name in sys.modules


def test_preload_imports_a_module_before_the_first_task() -> None:
    with WorkerPool(2, preload="wave") as workers:
        pids = {process.pid for process, _ in workers._workers.values()}
        assert len(pids) == 2
        assert [result for _, result in workers.map(is_loaded, ["wave", "wave"], ignore)] == [True, True]
        assert {process.pid for process, _ in workers._workers.values()} == pids
    with WorkerPool(1) as workers:
        assert [result for _, result in workers.map(is_loaded, ["wave"], ignore)] == [False]


@pytest.mark.parametrize("preload", ["", "math"])
@pytest.mark.parametrize(
    ("script", "parts"),
    [
        (
            "#!/bin/sh\necho libm.so: not found >&2\nexit 3\n",
            ("ended with code 3", "libm.so: not found. Correct"),
        ),
        ("#!/bin/sh\nkill -9 $$\n", ("was killed (SIGKILL)", "fewer --jobs")),
        ("#!/bin/sh\necho MemoryError >&2\nexit 1\n", ("ended with code 1", "MemoryError", "fewer --jobs")),
        ("", ("ended with code 255", "Permission denied")),
    ],
    ids=["error", "killed", "memory", "not executable"],
)
def test_a_worker_that_cannot_start_says_why(
    script: str, parts: tuple[str, ...], preload: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The workers run a program that ends at once, instead of Python.

    The output of this program appears only in the error.
    """
    program, before = tmp_path / "python", multiprocessing.spawn.get_executable()
    program.write_text(script)
    program.chmod(0o755 if script else 0o644)
    multiprocessing.resource_tracker.ensure_running()
    multiprocessing.set_executable(str(program))
    try:
        with pytest.raises(WorkerNotStarted) as raised, WorkerPool(2, preload) as workers:
            if preload:
                for process, _ in workers._workers.values():
                    process.join(DEADLINE_S)
            list(workers.map(slow_square, [0.0, 0.0, 0.0], ignore))
    finally:
        multiprocessing.set_executable(os.fsdecode(before))
    text = str(raised.value)
    assert text.startswith("A worker process ") and " as it started" in text
    assert all(part in text for part in parts), text
    assert ("fewer --jobs" in text) == ("fewer --jobs" in parts)
    assert capfd.readouterr() == ("", "")


def test_a_worker_without_a_module_says_which(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerNotStarted, match=r"as it started: ModuleNotFoundError: No module named 'prep.nothing'"):
        with WorkerPool(1, "prep.nothing") as workers:
            list(workers.map(slow_square, [0.0], ignore))
    assert capfd.readouterr() == ("", "")


def test_what_a_started_worker_prints_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerPool(1) as workers:
        list(workers.map(write_to_stderr, ["one", "two"], ignore))
    assert capfd.readouterr().err == "onetwo"


def test_a_worker_without_memory_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match=r"^Memory ran out in a worker process \(no room\)\. Pass fewer --jobs\.$"):
        with WorkerPool(1) as workers:
            list(workers.map(use_up_memory, [0], ignore))


def write_to_stderr(text: str, task_progress: TaskProgress) -> None:
    os.write(2, text.encode())


def use_up_memory(task: int, task_progress: TaskProgress) -> None:
    raise MemoryError("no room")

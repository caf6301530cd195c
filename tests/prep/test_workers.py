"""prep.workers: tasks in other processes, how they end, and what is told of one that was killed.

The functions that workers run are those at the top of this file: a worker imports it.
"""

from __future__ import annotations

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
from prep.workers import Counts, TaskProgress, WorkerDied, WorkerPool
from tests.helpers.building import DEADLINE_S, is_alive


def square(task: int, tally: TaskProgress) -> tuple[int, int]:
    """Of the task, and who did it."""
    tally.begin(task)
    tally.count(10 * task, bad=task % 2 == 1)
    return task**2, os.getpid()


def slow_square(task: float, tally: TaskProgress) -> tuple[float, int]:
    time.sleep(task)
    return task**2, os.getpid()


def wait_for(task: Path | None, tally: TaskProgress) -> None:
    """Until there is such a file, where one is named."""
    deadline = time.monotonic() + 60
    while task is not None and not task.exists():
        assert time.monotonic() < deadline, f"no {task}"
        time.sleep(0.01)


def five_steps(task: int, tally: TaskProgress) -> None:
    for number in range(5):
        tally.begin(number)
        tally.count(100, bad=number == 4)
        time.sleep(0.15)


def fail(task: Any, tally: TaskProgress) -> None:
    if isinstance(task, Exception):
        raise task


def look_about(task: str, tally: TaskProgress) -> tuple[str | None, bool]:
    return os.environ.get(task), signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def die(task: tuple[int, int, int], tally: TaskProgress) -> int:
    """Of `length` steps the process does not survive number `at`; -1: it survives all."""
    at, how, length = task
    for number in range(length):
        tally.begin(number)
        tally.count(1)
        if number == at:
            os.kill(os.getpid(), how) if how else os._exit(3)
    return length


def die_at_once(task: int, tally: TaskProgress) -> int:
    if task:
        os.kill(os.getpid(), signal.SIGKILL)
    tally.begin(7)
    return os.getpid()


def ignore(counts: Counts) -> None:
    pass


def with_this_file() -> dict[str, str]:
    """The environment of a process that can import it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}


def wait_for_end(pids: set[int]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"left behind: {pids}"
        time.sleep(0.01)


@pytest.mark.parametrize("jobs", [1, 2, 3])
def test_each_task_comes_back_with_its_result(jobs: int) -> None:
    with WorkerPool(jobs) as workers:
        found = list(workers.map(square, iter(range(20)), ignore))
        again = list(workers.map(square, range(20, 25), ignore))
        assert list(workers.map(square, [], ignore)) == []
    results = [*found, *again]
    assert sorted((task, result[0]) for task, result in results) == [(k, k * k) for k in range(25)]
    pids = {result[1] for _, result in results}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= jobs
    wait_for_end(pids)


def test_results_come_as_they_are_ready(tmp_path: Path) -> None:
    """The first task does not end before the results of all others have come."""
    came: list[Path | None] = []
    with WorkerPool(2) as workers:
        for task, _ in workers.map(wait_for, [tmp_path / "file", None, None, None, None], ignore):
            came.append(task)
            if len(came) == 4:
                (tmp_path / "file").touch()
    assert came == [None, None, None, None, tmp_path / "file"]


def test_no_more_processes_than_tasks() -> None:
    with WorkerPool(50) as workers:
        pids = {result[1] for _, result in workers.map(slow_square, [0.1], ignore)}
        assert len(pids) == 1
        assert len(workers._workers) == 1


def test_tasks_are_taken_as_they_are_needed() -> None:
    """Never more under way than there are jobs: a task holds its shard's inputs."""
    taken, given, most = 0, 0, 0

    def tasks() -> Iterator[int]:
        nonlocal taken, most
        for number in range(12):
            taken += 1
            most = max(most, taken - given)
            yield number

    with WorkerPool(2) as workers:
        for _ in workers.map(square, tasks(), ignore):
            given += 1
            assert taken <= given + 2
    assert (taken, given, most) == (12, 12, 2)


def test_exception_of_the_tasks_comes_through() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise KeyError("none")

    with WorkerPool(1) as workers, pytest.raises(KeyError, match="none"):
        list(workers.map(square, tasks(), ignore))


@pytest.mark.parametrize("error", [UserError("mend it"), DiskFull("no room"), ZeroDivisionError("of ours")])
def test_exception_of_the_work_comes_through(error: Exception) -> None:
    """What the user can mend as it is; a fault of ours with its place."""
    expected = type(error) if isinstance(error, UserError) else RuntimeError
    with WorkerPool(2) as workers:
        with pytest.raises(expected, match=str(error)) as told:
            list(workers.map(fail, [0, error, 0], ignore))
        assert type(told.value) is expected
        if isinstance(error, UserError):
            assert told.value.args == error.args
            assert getattr(told.value, "exit_code", None) == error.exit_code
        else:
            assert "test_workers.py" in str(told.value) and "in fail" in str(told.value)


def test_worker_that_is_killed_is_told_and_the_others_go_on() -> None:
    tasks = [(-1, 0, 4), (3, signal.SIGKILL, 9), (-1, 0, 5), (0, 0, 2), (1, signal.SIGSEGV, 6), (-1, 0, 6)]
    with WorkerPool(2) as workers:
        found = list(workers.map(die, tasks, ignore))
    assert sorted(task for task, _ in found) == sorted(tasks)
    told = dict(found)
    assert {task: result for task, result in told.items() if task[0] < 0} == {t: t[2] for t in tasks if t[0] < 0}
    died = {task: result for task, result in told.items() if isinstance(result, WorkerDied)}
    assert {task: result.index for task, result in died.items()} == {t: t[0] for t in tasks if t[0] >= 0}
    assert [died[tasks[k]].describe() for k in (1, 3, 4)] == [
        "was killed (SIGKILL)",
        "ended with code 3",
        "was killed (SIGSEGV)",
    ]
    assert WorkerDied(0, -63).describe() == "was killed (signal 63)"


def test_place_of_death_is_of_this_task() -> None:
    """Not of the one before, which may have been longer."""
    with WorkerPool(1) as workers:
        (_, first), (_, second), (_, third) = workers.map(die_at_once, [0, 1, 0], ignore)
    assert isinstance(first, int) and isinstance(third, int) and first != third
    assert second == WorkerDied(0, -signal.SIGKILL)


def test_worker_that_is_killed_between_tasks_is_replaced() -> None:
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


@pytest.mark.parametrize("how", ["closed", "watch raises", "work raises"])
def test_map_that_is_left_leaves_nothing_to_the_next(how: str) -> None:
    """Nobody takes what a worker was doing then: it must not go on, nor answer in the place of another task."""

    def refuse(counts: Counts) -> None:
        raise UserError("enough")

    with WorkerPool(2) as workers:
        if how == "closed":
            with closing(workers.map(slow_square, [0.01, 0.7, 0.6, 0.5], ignore)) as results:
                next(iter(results))
        elif how == "watch raises":
            with pytest.raises(UserError, match="enough"):
                list(workers.map(slow_square, [0.6, 0.7], refuse))
        else:
            with pytest.raises(RuntimeError, match="TypeError"):
                list(workers.map(slow_square, ["no number", 0.7], ignore))  # type: ignore[list-item]
        found = list(workers.map(square, range(6), ignore))
    assert sorted((task, result[0]) for task, result in found) == [(k, k * k) for k in range(6)]


def test_watch_sees_every_step_of_all_workers() -> None:
    """While a task is under way, and exactly at the end; a second map begins at nothing."""
    seen: list[Counts] = []
    with WorkerPool(2) as workers:
        for _ in range(2):
            seen.clear()
            list(workers.map(five_steps, [0, 1, 2], seen.append))
            assert seen == sorted(seen)
            assert seen[-1] == (15, 3, 1500)
            assert len({counts.done for counts in seen}) > 4
            assert seen[0].done <= 4


def test_exception_of_watch_ends_the_map() -> None:
    def refuse(counts: Counts) -> None:
        raise UserError("enough")

    with WorkerPool(1) as workers, pytest.raises(UserError, match="enough"):
        list(workers.map(five_steps, range(100), refuse))


def test_workers_have_one_blas_thread_and_leave_ctrl_c_to_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment and the signal mask of the parent stay as they were."""
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    before, mask = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with WorkerPool(1) as workers:
        assert [result for _, result in workers.map(look_about, names, ignore)] == [("1", True)] * 3
    assert dict(os.environ) == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask


FIRST = """
import signal
from tests.prep import test_workers
from prep.workers import WorkerPool
with WorkerPool(2) as workers:
    print([result for _, result in workers.map(test_workers.look_about, ["OMP_NUM_THREADS"] * 2, test_workers.ignore)])
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_first_worker_of_a_process_leaves_ctrl_c_to_the_parent() -> None:
    """multiprocessing starts its resource tracker with the first one, and lets SIGINT through after that."""
    ended = subprocess.run([sys.executable, "-c", FIRST], env=with_this_file(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["[('1', True), ('1', True)]", "set()"]


def test_leaving_ends_workers_in_the_middle_of_a_task() -> None:
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


@pytest.mark.parametrize("what", ["busy", "idle"])
def test_workers_end_when_their_parent_is_killed(what: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ORPHANS, what],
        env=with_this_file(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        pids = {int(parent.stdout.readline()) for _ in range(2)}
        if what == "idle":
            assert parent.stdout.readline() == "idle\n"
        else:
            time.sleep(0.2)
        assert all(map(is_alive, pids))
        parent.kill()
        parent.wait()
        began = time.monotonic()
        wait_for_end(pids)
        assert time.monotonic() - began < 10


def test_tally_without_a_worker() -> None:
    tally = TaskProgress()
    tally.begin(4)
    tally.count(10)
    tally.count(5, bad=True)
    assert tally.index == 4
    assert tally.counts == Counts(done=2, bad=1, bytes=15)


def test_tallies_share_an_array() -> None:
    numbers = [0] * (3 * TaskProgress.SIZE)
    for slot in range(3):
        tally = TaskProgress(numbers, slot * TaskProgress.SIZE)
        tally.begin(slot)
        tally.count(slot, bad=slot == 2)
    assert [TaskProgress(numbers, slot * TaskProgress.SIZE).index for slot in range(3)] == [0, 1, 2]
    assert [TaskProgress(numbers, slot * TaskProgress.SIZE).counts for slot in range(3)] == [
        (1, 0, 0),
        (1, 0, 1),
        (1, 1, 2),
    ]


def loaded(name: str, tally: TaskProgress) -> bool:
    return name in sys.modules


def test_workers_with_a_module_load_it_before_there_is_work() -> None:
    with WorkerPool(2, preload="wave") as workers:
        pids = {process.pid for process, _ in workers._workers.values()}
        assert len(pids) == 2
        assert [result for _, result in workers.map(loaded, ["wave", "wave"], ignore)] == [True, True]
        assert {process.pid for process, _ in workers._workers.values()} == pids
    with WorkerPool(1) as workers:
        assert [result for _, result in workers.map(loaded, ["wave"], ignore)] == [False]

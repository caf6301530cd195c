"""Tests of builds that are killed at any disk operation or moment, that a signal stops, or whose worker dies.

If the command is repeated, it must finish the build with the fingerprint of an uninterrupted build. No process and no
temporary file may be left.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.build.shard_task import ShardTask, build_shard
from prep.build.split import build_split
from prep.console import Progress, UserError
from prep.images.codec import decode_image
from prep.inputs.folder import FolderReader
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from prep.workers import TaskProgress, WorkerPool
from tests.helpers.building import (
    PPM,
    SKIP,
    STRICT,
    BuildCommand,
    build,
    make_pictures,
    process_group,
    run_interrupted_builds,
)

Start = Callable[..., BuildCommand]


def tree(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """320 images, which fill five shards. A worker takes a few milliseconds for each image."""
    return make_pictures(tmp_path_factory.mktemp("slow") / "photos", 320, (220, 260), distinct=6)


@pytest.fixture(scope="module")
def slow_store(slow: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return build(slow, tmp_path_factory.mktemp("slow_store") / "store")


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts a build command. After the test, processes that are still running are killed."""
    started: list[BuildCommand] = []

    def run(photos: Path, store: Path, *words: str) -> BuildCommand:
        started.append(BuildCommand(photos, store, *words))
        return started[-1]

    yield run
    for command in started:
        with suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)
        command.process.communicate()


# Killed at every disk operation


@pytest.fixture(scope="module", params=["kill", "restart", "restart-reverse"])
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Kill each of several builds before a different disk operation, and run each build again.

    The fixture is (folder of the stores, JSON objects that interrupted_builds.py has printed).
    """
    work = tmp_path_factory.mktemp("interrupted")
    photos = make_pictures(work / "photos", 66, (32, 34))  # 66 images fill two shards
    build(photos, work / "whole")
    return work, run_interrupted_builds(photos, work, request.param)


def test_a_build_killed_at_any_disk_operation_is_finished_by_the_same_command(ended: tuple[Path, Any]) -> None:
    work, ends = ended
    assert len(ends) >= 14
    assert {end["code"] for end in ends[:-1]} == {9}
    assert [end for end in ends if end["again"] != 0 or end["torn"]] == []
    whole = Store.open(work / "whole")
    for end in ends:
        again = Store.open(work / f"{end['at']:03d}")
        assert again.fingerprint == whole.fingerprint
        assert again.splits == whole.splits


def test_a_build_killed_at_any_disk_operation_leaves_no_file_behind(ended: tuple[Path, Any]) -> None:
    """Each store has the same files as the store of an uninterrupted build."""
    work, ends = ended
    expected = tree(work / "whole")
    found = {end["at"]: tree(work / f"{end['at']:03d}") for end in ends}
    assert {at: set(files) ^ set(expected) for at, files in found.items() if files != expected} == {}


# Killed at any moment


def kill_and_finish(start: Start, photos: Path, store: Path, delay_s: float, finish: Callable[[Path], Store]) -> Store:
    """Kill a build with SIGKILL after `delay_s`, and finish it at once with `finish`."""
    command = start(photos, store)
    time.sleep(delay_s)
    command.kill()
    command.process.wait()
    built = finish(store)
    command.end()
    return built


def test_a_build_killed_at_random_moments_is_finished_by_the_same_command(
    start: Start, slow: Path, slow_store: Store, tmp_path: Path
) -> None:
    """Ten build commands are killed. To save time, the test process itself finishes each build."""
    rng = np.random.default_rng(9)
    for number, delay_s in enumerate(rng.uniform(0.4, 2.2, 10)):
        store = tmp_path / str(number)
        built = kill_and_finish(start, slow, store, float(delay_s), lambda store: build(slow, store))
        assert built.splits == slow_store.splits, delay_s
        assert tree(store) == tree(slow_store.root), delay_s


@pytest.mark.soak
def test_a_build_killed_at_two_hundred_random_moments_is_finished(
    start: Start, slow: Path, slow_store: Store, tmp_path: Path
) -> None:
    """Every build runs as a command in its own process.

    Every tenth build is killed five times, and the remaining builds are killed once.
    """
    rng = np.random.default_rng(200)

    def finish(store: Path) -> Store:
        code, _, stderr = start(slow, store).end()
        assert code == 0, stderr
        return Store.open(store)

    began = time.monotonic()
    finish(tmp_path / "measured")
    takes_s = time.monotonic() - began
    for number in range(200):
        store = tmp_path / str(number)
        for _ in range(4 if number % 10 == 0 else 0):
            command = start(slow, store)
            time.sleep(rng.uniform(0, takes_s))
            command.kill()
            command.process.wait()
        built = kill_and_finish(start, slow, store, float(rng.uniform(0, takes_s)), finish)
        assert built.splits == slow_store.splits, number
        assert tree(store) == tree(slow_store.root), number


def test_a_build_killed_again_and_again_keeps_its_finished_shards(
    start: Start, slow: Path, slow_store: Store, tmp_path: Path
) -> None:
    """The command is killed at its start, during the first shards, after one shard, and after three shards."""
    store = tmp_path / "store"
    moments: list[tuple[str, Callable[[BuildCommand], bool]]] = [
        ("plan", lambda command: (command.work_dir / "plan.json").exists()),
        ("shard in progress", lambda command: any(command.work_dir.glob("*.tmp/data.mdb"))),
        ("first shard", lambda command: len(command.shard_summaries()) >= 1),
        ("third shard", lambda command: len(command.shard_summaries()) >= 3),
    ]
    for what, reached in moments:
        command = start(slow, store)
        command.wait_for(what, lambda command=command, reached=reached: reached(command))
        command.kill()
        code, _, _ = command.end()
        assert code == -signal.SIGKILL
        assert not (store / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in command.shard_summaries()}
    databases = [store / "train" / path.stem / "data.mdb" for path in kept]
    written = [path.stat().st_mtime_ns for path in databases]
    assert 3 <= len(kept) <= 5
    command = start(slow, store)
    code, _, stderr = command.end()
    assert code == 0, stderr
    assert Store.open(store).splits == slow_store.splits
    assert [path.stat().st_mtime_ns for path in databases] == written  # the finished shards are unchanged
    assert tree(store) == tree(slow_store.root)


# Stopped by signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_build_which_can_be_resumed(
    start: Start, slow: Path, slow_store: Store, tmp_path: Path, number: int, code: int
) -> None:
    """SIGTERM is sent to the parent process alone, as by `kill`. SIGINT is sent to all processes, as by Ctrl-C."""
    store = tmp_path / "store"
    command = start(slow, store)
    command.wait_for_shards(1)
    if number == signal.SIGINT:
        os.killpg(command.process.pid, number)
    else:
        command.process.send_signal(number)
    returned, stdout, stderr = command.end()
    assert returned == code, stderr
    assert stdout == ""
    assert stderr.strip().splitlines()[-1] == "Interrupted. Run the same command again to continue from here."
    assert "Traceback" not in stderr
    assert not (store / "manifest.json").exists()
    progress = Progress(320, "pictures")
    assert build(slow, store, progress=progress).splits == slow_store.splits
    assert progress.skipped >= 64


def test_ctrl_c_is_handled_while_the_workers_start(start: Start, tmp_path: Path) -> None:
    """A terminal also sends SIGINT to the workers. The workers must ignore SIGINT even while they start."""
    # With 3,000 images, the build cannot end before the signal is sent.
    ends, slow = [], make_pictures(tmp_path / "photos", 3000, (220, 260), distinct=6)
    for delay_s in (0.05, 0.2, 0.35):
        command = start(slow, tmp_path / str(delay_s))
        command.wait_for(
            "worker", lambda pid=command.process.pid: any("spawn_main" in w for w in process_group(pid).values())
        )
        time.sleep(delay_s)
        os.killpg(command.process.pid, signal.SIGINT)
        ends.append(command.end())
    assert ends == [(130, "", "Interrupted. Run the same command again to continue from here.\n")] * len(ends)


def test_a_signal_does_not_wait_for_the_shards_in_progress(start: Start, tmp_path: Path) -> None:
    """Each shard has 64 large images. SIGTERM must end the build before the first shard is finished."""
    photos = make_pictures(tmp_path / "photos", 128, (1700, 1800), distinct=1)
    command = start(photos, tmp_path / "store")
    command.wait_for("shard in progress", lambda: any(command.work_dir.glob("*.tmp/data.mdb")))
    command.process.send_signal(signal.SIGTERM)
    code, _, stderr = command.end()
    assert code == 143, stderr
    assert command.shard_summaries() == []
    assert list(command.work_dir.glob("*.json")) == [command.work_dir / "plan.json"]


def test_a_second_command_on_the_same_store_is_refused(
    start: Start, slow: Path, slow_store: Store, tmp_path: Path
) -> None:
    """The second command prints a one-line error, and the first build continues."""
    first = start(slow, tmp_path / "store")
    first.wait_for("plan", lambda: (first.work_dir / "plan.json").exists())
    first.process.send_signal(signal.SIGSTOP)
    for words in ([], ["--restart"]):
        code, stdout, stderr = start(slow, tmp_path / "store", *words).end()
        assert (code, stdout, stderr.count("\n")) == (1, "", 1), stderr
        assert "another build is at work" in stderr
    first.process.send_signal(signal.SIGCONT)
    code, _, stderr = first.end()
    assert code == 0, stderr
    assert Store.open(tmp_path / "store").splits == slow_store.splits


# Workers that die


def test_a_killed_worker_is_reported_in_one_line(start: Start, slow: Path, slow_store: Store, tmp_path: Path) -> None:
    """A worker gets SIGKILL, as when memory runs out. The error names the file that the worker was reading."""
    store = tmp_path / "store"
    command = start(slow, store, "--jobs", "1")
    command.wait_for_shards(1)
    command.wait_for("shard in progress", lambda: any(command.work_dir.glob("*.tmp/data.mdb")))
    time.sleep(0.03)  # building the shard takes 0.2 s
    (worker,) = [pid for pid, line in process_group(command.process.pid).items() if "spawn_main" in line]
    os.kill(worker, signal.SIGKILL)
    code, _, stderr = command.end()
    assert code == 1, stderr
    assert "Traceback" not in stderr
    assert stderr.count("\n") == 1
    name, _, rest = stderr.removeprefix("Error: ").partition(": ")
    assert (slow / name).is_file()
    assert rest.startswith("a worker process was killed (SIGKILL) at this file.")
    assert "fewer --jobs" in rest
    assert build(slow, store).splits == slow_store.splits


class CrashingReader(FolderReader):
    """Kills the process that reads image number 100. Reading any other image takes 10 ms."""

    def read(self, item: Any) -> bytes:
        time.sleep(0.01)
        if item.path.endswith(b"_100.JPEG"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


def test_a_file_that_kills_its_worker_is_named(slow: Path, slow_store: Store, tmp_path: Path) -> None:
    source = list_source(slow, "train")
    crashing = type(source)(CrashingReader(slow), "train", source.classes, source.inputs)
    for _ in range(2):
        with WorkerPool(1) as workers, pytest.raises(UserError, match=r"^n\d/n\d_100\.JPEG: .*killed \(SIGKILL\)"):
            build_split(crashing, tmp_path / "store", PPM, workers, Progress(320, "pictures"))
    assert build(slow, tmp_path / "store").splits == slow_store.splits


def test_a_file_that_kills_its_worker_twice_is_left_out_with_on_bad_skip(
    slow: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After the first crash, the build tries the file again, because a lack of memory may be the cause.

    In this build, the file also crashes the second worker.
    """
    source = list_source(slow, "train")
    crashing = type(source)(CrashingReader(slow), "train", source.classes, source.inputs)
    progress = Progress(320, "pictures")
    with WorkerPool(2) as workers:
        store = build_split(crashing, tmp_path / "store", PPM, workers, progress, SKIP)
    split = store.split("train")
    assert (split.records, split.account["bad"]) == (319, {"killed the process that read it, twice": 1})
    assert (progress.done, progress.bad) == (320, 1)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(
        "_100.JPEG: a worker process was killed (SIGKILL) at this file" in line for line in said
    )


def test_a_crash_of_an_earlier_run_counts(slow: Path, tmp_path: Path) -> None:
    source = list_source(slow, "train")
    crashing = type(source)(CrashingReader(slow), "train", source.classes, source.inputs)
    with WorkerPool(2) as workers, pytest.raises(UserError, match=r"_100\.JPEG: .*--on-bad skip"):
        build_split(crashing, tmp_path / "store", PPM, workers, Progress(320, "pictures"), STRICT)
    with WorkerPool(2) as workers:
        store = build_split(crashing, tmp_path / "store", PPM, workers, Progress(320, "pictures"), SKIP)
    assert store.split("train").account["bad"] == {"killed the process that read it, twice": 1}


def test_no_worker_goes_on_after_a_failed_build(slow: Path, tmp_path: Path) -> None:
    """The workers are stopped before the lock is released, although the caller keeps the pool open."""
    source = list_source(slow, "train")
    crashing = type(source)(CrashingReader(slow), "train", source.classes, source.inputs)
    with WorkerPool(2) as workers:
        with pytest.raises(UserError) as raised:
            build_split(crashing, tmp_path / "store", PPM, workers, Progress(320, "pictures"))
        before = tree(tmp_path / "store")
        time.sleep(1)
        assert tree(tmp_path / "store") == before
    assert "killed" in str(raised.value)  # up to this line, `raised` keeps the generator of the results alive


def test_a_shard_that_is_built_twice_is_complete(slow: Path, tmp_path: Path) -> None:
    """If a killed build leaves workers behind, two workers may write the same shard at the same time.

    The shard must be complete, because each worker writes to its own temporary files.
    """
    source = list_source(slow, "train")
    (tmp_path / ".build").mkdir()
    inputs = tuple(source.inputs[k] for k in range(20))
    task = ShardTask(0, 0, inputs, source.reader, "train", tmp_path, PPM, False)
    build_shard(task, TaskProgress())
    first = (tmp_path / ".build" / "00000.json").read_bytes()
    build_shard(task, TaskProgress())
    assert (tmp_path / ".build" / "00000.json").read_bytes() == first
    assert sorted(path.name for path in tmp_path.iterdir()) == [".build", "00000"]
    assert decode_image((slow / os.fsdecode(inputs[0].path)).read_bytes()).pixels.ndim == 3

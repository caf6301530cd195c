"""Tests of builds in parts (`build-lmdb --part`). The tests run parts in any order, repeatedly or at the same time, and
kill parts.

Every finished store must equal the store of a build without parts: manifest, files and fingerprint.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result

from prep.build import parts
from prep.build.parts import Part, PartResult, join_split
from prep.build.plan import BuildPlan
from prep.build.resume import begin_build, find_changed_inputs
from prep.build.shard_task import build_shard
from prep.console import Progress, UserError
from prep.files import hold_lock
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from prep.workers import TaskProgress
from tests.helpers.building import PPM, BuildCommand, build
from tests.prep.build.parts.part_builds import IMAGES, WORDS, alexprep, assert_same, run_part, tree

Start = Callable[..., BuildCommand]


@pytest.fixture
def start() -> Iterator[Start]:
    """A function that starts a build command. After the test, the fixture kills processes that are still running."""
    started: list[BuildCommand] = []

    def run(photos: Path, store: Path, *words: str) -> BuildCommand:
        started.append(BuildCommand(photos, store, "--jobs", "1", *words))
        return started[-1]

    yield run
    for command in started:
        with suppress(ProcessLookupError):
            os.killpg(command.process.pid, signal.SIGKILL)
        command.process.communicate()


# Order and repetition


@pytest.mark.parametrize("seed", range(3))
def test_parts_in_any_order_with_repetitions_give_the_same_store(
    photos: Path, whole: Store, tmp_path: Path, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    count = (1, 3, 11)[seed]  # the build has eight shards, so three of 11 parts have no shard
    numbers = [*rng.permutation(np.repeat(np.arange(1, count + 1), 2)).tolist()]
    last = max(numbers.index(number) for number in set(numbers))  # after the run with this index, every part has run
    for position, number in enumerate(numbers):
        result = run_part(photos, tmp_path / "store", number, count)
        has_run = set(numbers[: position + 1])
        missing = {part.number for part in result.missing}
        assert missing == {number for number in range(1, min(count, 8) + 1) if number not in has_run}
        is_complete = not missing
        assert (result.store is not None) == is_complete == (tmp_path / "store" / "manifest.json").exists()
    assert last < len(numbers)
    assert_same(tmp_path / "store", whole)


def test_a_finished_part_is_not_built_again(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_part(photos, store, 2, 3)
    databases = sorted((store / "train").glob("0*/data.mdb"))
    assert [path.parent.name for path in databases] == ["00001", "00004", "00007"]
    written = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in databases]
    run_part(photos, store, 2, 3)
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in databases] == written


def test_a_build_without_parts_finishes_what_parts_began(photos: Path, whole: Store, tmp_path: Path) -> None:
    store = tmp_path / "store"
    run_part(photos, store, 2, 3)
    progress = Progress(IMAGES, "pictures")
    build(photos, store, progress=progress)
    assert progress.skipped == Part(2, 3).count_inputs(IMAGES) > 100
    assert_same(store, whole)


def test_parts_finish_what_a_build_without_parts_began(
    photos: Path, whole: Store, tmp_path: Path, start: Start
) -> None:
    command = start(photos, tmp_path / "store")
    command.wait_for_shards(2)
    command.kill()
    command.end()
    assert {result.exit_code for result in _run_all(photos, tmp_path / "store", 2)} == {0}
    assert_same(tmp_path / "store", whole)


def _run_all(photos: Path, store: Path, count: int) -> list[Result]:
    words = ("build-lmdb", photos, "--store", store, *WORDS, "--jobs", "1")
    return [alexprep(*words, "--part", f"{number}/{count}") for number in range(1, count + 1)]


def test_parts_of_train_and_val_have_the_classes_of_a_build_without_parts(photo_folder: Path, tmp_path: Path) -> None:
    """The split val has no class folders. Its labels refer to classes of train, and train is not in the store yet."""
    words = ("build-lmdb", photo_folder, *WORDS, "--jobs", "1", "--store")
    assert alexprep(*words, tmp_path / "whole").exit_code == 0
    for number in (2, 1):
        result = alexprep(*words, tmp_path / "parts", "--part", f"{number}/2")
        assert result.exit_code == 0, result.output
    whole, in_parts = Store.open(tmp_path / "whole"), Store.open(tmp_path / "parts")
    assert in_parts.fingerprint == whole.fingerprint
    assert (in_parts.classes, in_parts.splits) == (whole.classes, whole.splits)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


# Parts that run at the same time, and parts that are killed


def test_parts_at_the_same_time_give_the_same_store(photos: Path, whole: Store, tmp_path: Path, start: Start) -> None:
    commands = [start(photos, tmp_path / "store", "--part", f"{number}/3") for number in (1, 2, 3)]
    for command in commands:
        code, _, stderr = command.end()
        assert code == 0, stderr
    assert_same(tmp_path / "store", whole)


def test_killed_parts_are_finished_by_the_same_commands(
    photos: Path, whole: Store, tmp_path: Path, start: Start
) -> None:
    """Three times, two parts are started together and killed at a random moment. Then each part runs to its end."""
    store, rng = tmp_path / "store", np.random.default_rng(4)
    for _ in range(3):
        commands = [start(photos, store, "--part", f"{number}/2") for number in (1, 2)]
        time.sleep(float(rng.uniform(0.5, 1.5)))
        for command in commands:
            command.kill()
        for command in commands:
            command.end()
    for number in (1, 2):
        code, _, stderr = start(photos, store, "--part", f"{number}/2").end()
        assert code == 0, stderr
    assert_same(store, whole)


def test_one_of_several_commands_that_end_at_the_same_time_writes_the_manifest(
    photos: Path, whole: Store, all_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four threads simulate four commands. All threads see at the same time that all shards are finished.

    Each thread opens the lock files itself, so the threads exclude each other as processes do.
    """
    assembled, at_once = [], threading.Barrier(4)
    real, real_missing = parts.assemble_split, parts.missing_shards

    def assemble(*arguments: object) -> Store:
        assembled.append(threading.get_ident())
        return real(*arguments)  # type: ignore[arg-type]

    def missing(plan: BuildPlan, count: int) -> dict[Part, list[int]]:
        found = real_missing(plan, count)
        at_once.wait(60)
        return found

    monkeypatch.setattr(parts, "assemble_split", assemble)
    monkeypatch.setattr(parts, "missing_shards", missing)
    results: list[PartResult] = []
    work = [lambda number=number: results.append(run_part(photos, all_shards, number, 4)) for number in range(1, 5)]
    threads = [threading.Thread(target=function) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(results) == 4 and len(assembled) == 1
    assert all(not result.missing for result in results)
    assert any(result.store is not None for result in results)
    assert_same(all_shards, whole)


def test_only_one_of_two_parts_that_begin_at_the_same_time_begins_the_build(photos: Path, tmp_path: Path) -> None:
    source = list_source(photos, "train")
    plans = [BuildPlan(source, tmp_path / "train", PPM, False) for _ in range(2)]
    assert [begin_build(plan) for plan in plans] == [True, False]
    assert find_changed_inputs(plans[1], tmp_path) == {}
    assert plans[1].build_id == plans[0].build_id != ""
    assert tree(tmp_path / "train") == [".build", ".build/inputs.npz", ".build/plan.json"]


def test_a_shard_of_a_discarded_build_does_not_count_as_finished(photos: Path, tmp_path: Path) -> None:
    """A process of a killed build can finish its shard after a build with other settings has begun."""
    source = list_source(photos, "train")
    old = BuildPlan(source, tmp_path / "train", PPM.__class__(**{**vars(PPM), "side_px": 48}), False)
    begin_build(old)
    late = old.task(3)
    shutil.rmtree(tmp_path / "train")
    new = BuildPlan(source, tmp_path / "train", PPM, False)
    begin_build(new)
    build_shard(late, TaskProgress())
    assert (tmp_path / "train" / ".build" / "00003.json").exists()
    assert not new.is_finished(3)
    build_shard(new.task(3), TaskProgress())
    assert new.is_finished(3)


def test_a_shard_that_two_processes_build_at_the_same_time_is_always_complete(photos: Path, tmp_path: Path) -> None:
    """Two threads simulate two processes on different machines, which can have the same process id."""
    source = list_source(photos, "train")
    plan = BuildPlan(source, tmp_path / "train", PPM, False)
    begin_build(plan)
    build_shard(plan.task(0), TaskProgress())
    database = tmp_path / "train" / "00000" / "data.mdb"
    files = [database, *(plan.work_dir / name for name in ("00000.npy", "00000.json"))]
    expected = [path.read_bytes() for path in files]
    threads = [
        threading.Thread(target=lambda: [build_shard(plan.task(0), TaskProgress()) for _ in range(6)]) for _ in range(2)
    ]
    inode = database.stat().st_ino
    for thread in threads:
        thread.start()
    inodes, readings = {inode}, 0
    while any(thread.is_alive() for thread in threads):
        assert [path.read_bytes() for path in files] == expected
        inodes.add(database.stat().st_ino)
        readings += 1
    assert len(inodes) > 2 and readings > 10  # the file was replaced several times while it was read
    assert tree(tmp_path / "train") == sorted(
        [
            ".build",
            ".build/inputs.npz",
            ".build/plan.json",
            "00000",
            *(str(path.relative_to(tmp_path / "train")) for path in files),
        ]
    )


# Refusals


def test_the_same_part_is_not_built_twice_at_the_same_time(photos: Path, tmp_path: Path) -> None:
    run_part(photos, tmp_path, 1, 3)
    with hold_lock(tmp_path / "train" / ".build", "build", name="part-2-of-3.lock"):
        with pytest.raises(UserError, match="another build of part 2/3 is at work"):
            run_part(photos, tmp_path, 2, 3)
        run_part(photos, tmp_path, 3, 3)
    assert run_part(photos, tmp_path, 2, 3).store is not None


def test_parts_do_not_wait_for_each_other(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_BEGIN_WAIT_S", 0.2)
    monkeypatch.setattr(parts, "_JOIN_WAIT_S", 0.2)
    run_part(photos, tmp_path, 1, 2)
    with hold_lock(tmp_path, "build", shared=True):  # the test holds the shared lock that another part would hold
        result = run_part(photos, tmp_path, 2, 2)
    assert result == PartResult(4, None, {})  # there is no store yet, because the other part will write the manifest
    assert run_part(photos, tmp_path, 1, 2).store is not None


def test_a_part_and_a_build_without_parts_exclude_each_other(
    photos: Path, whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_BEGIN_WAIT_S", 0.2)
    run_part(photos, tmp_path / "store", 1, 2)
    before = tree(tmp_path / "store")
    with hold_lock(tmp_path / "store", "build"), pytest.raises(UserError, match="another build is at work"):
        run_part(photos, tmp_path / "store", 2, 2)
    with hold_lock(tmp_path / "store", "build", shared=True):  # the test holds the lock that a part would hold
        with pytest.raises(UserError, match="another build is at work"):
            build(photos, tmp_path / "store")
        with pytest.raises(UserError, match="another build is at work"):
            join_split(tmp_path / "store", "train", None)
    assert tree(tmp_path / "store") == before


def test_a_part_waits_while_another_part_writes_the_manifest(photos: Path, tmp_path: Path) -> None:
    run_part(photos, tmp_path, 1, 3)
    results: list[PartResult] = []
    with hold_lock(tmp_path, "build"):
        thread = threading.Thread(target=lambda: results.append(run_part(photos, tmp_path, 2, 3)))
        thread.start()
        time.sleep(0.5)
        assert not results
    thread.join(60)
    assert [part.number for part in results[0].missing] == [3]


def test_an_input_that_changed_between_two_parts_is_refused(photos: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(photos, tmp_path / "photos")
    store = tmp_path / "store"
    run_part(copy, store, 1, 2)
    source = list_source(copy, "train")
    plan = BuildPlan(source, store / "train", PPM, False)
    changed = copy / os.fsdecode(plan.task(1).inputs[0].path)  # this input belongs to part 2
    os.utime(changed, ns=(0, 1))
    with pytest.raises(UserError, match=f"1 input changed since the first part began.*{changed.name}.*without --part"):
        run_part(copy, store, 2, 2)
    assert len(build(copy, store).split("train").shards) == 8


def test_parts_on_a_file_system_without_locks_leave_the_end_to_join(
    photos: Path, whole: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, two parts could complete the store at the same time, and remove each other's temporary files."""

    def flock(handle: object, kind: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("prep.files.fcntl.flock", flock)
    store = tmp_path / "store"
    assert run_part(photos, store, 2, 2).store is None
    # A temporary folder that belongs to another running part.
    (store / "train" / ".build" / f"00000.{os.getpid()}-01234567.tmp").mkdir()
    finished = run_part(photos, store, 1, 2)
    assert finished.store is None and not finished.missing
    assert (store / "train" / ".build" / f"00000.{os.getpid()}-01234567.tmp").exists()
    joined = alexprep("join", "--store", store, "--no-lock")
    assert joined.exit_code == 0, joined.stderr
    assert Store.open(store).splits == whole.splits

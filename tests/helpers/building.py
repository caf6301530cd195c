"""Builds for tests: runners in the process of the test, small images, and a build command that a test can kill."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from threadpoolctl import threadpool_limits

from prep.build.plan import BuildPolicy
from prep.build.shard_task import build_shard
from prep.build.split import build_split
from prep.console import Progress
from prep.inputs.sources import list_source
from prep.store.manifest import Settings, Store
from prep.workers import Runner, TaskProgress

Records = Callable[[Path, str], list[tuple[bytes, Any]]]

PPM = Settings(32, False, "ppm", 90, "area", 0)
STRICT, SKIP = BuildPolicy(), BuildPolicy(skip_bad=True)
CLASSES = ("n1", "n2", "n3")
DEADLINE_S = 240.0  # time limit of each wait; the longest wait takes 8 s on an idle machine, and 40 s on a busy machine


class Stopped(Exception):
    """Raised by StoppingRunner to leave a build unfinished."""


class InlineRunner:
    """Runs the tasks of a build in the process of the test.

    Most tests use this runner. As in a worker process, tasks run with one BLAS thread.
    """

    jobs = 1

    def check_machines(self, folder: Path | None, source: Path, versions: Callable[[], dict[str, str]]) -> None:
        pass

    def map(self, work: Any, tasks: Iterable[Any], on_progress: Any) -> Iterator[tuple[Any, Any]]:
        task_progress = TaskProgress()
        with threadpool_limits(1, "blas"):
            for task in tasks:
                result = work(task, task_progress)
                on_progress(task_progress.counts)
                yield task, result


class StoppingRunner(InlineRunner):
    """Runs tasks, and raises Stopped when `after` shards are built."""

    def __init__(self, after: int = 1) -> None:
        self.after = after

    def map(self, work: Any, tasks: Iterable[Any], on_progress: Any) -> Iterator[tuple[Any, Any]]:
        for done, pair in enumerate(super().map(work, tasks, on_progress), 1):
            yield pair
            if work is build_shard and done == self.after:
                raise Stopped


class UnusedRunner(InlineRunner):
    """A runner that makes the test fail if the build gives it a task."""

    def map(self, work: Any, tasks: Iterable[Any], on_progress: Any) -> Iterator[tuple[Any, Any]]:
        for task in tasks:
            raise AssertionError(f"there is nothing to run: {task}")
        yield from ()


def build(
    folder: Path,
    store: Path,
    settings: Settings = PPM,
    policy: BuildPolicy = STRICT,
    *,
    split: str = "train",
    runner: Runner | None = None,
    progress: Progress | None = None,
) -> Store:
    known = Store.open(store).classes if (store / "manifest.json").exists() else ()
    source = list_source(folder, split, store_classes=known)
    progress = progress or Progress(len(source.inputs), "pictures")
    return build_split(source, store, settings, runner or InlineRunner(), progress, policy)


def make_pictures(folder: Path, count: int, sizes: tuple[int, int], distinct: int = 24) -> Path:
    """Make `count` JPEGs in three class folders. To save time, the JPEGs are copies of `distinct` images."""
    rng = np.random.default_rng(count)
    contents = []
    for _ in range(distinct):
        height, width = (int(n) for n in rng.integers(*sizes, size=2))
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        out = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(out, "JPEG")
        contents.append(out.getvalue())
    for name in CLASSES:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        name = CLASSES[int(rng.integers(3))]
        (folder / name / f"{name}_{number}.JPEG").write_bytes(contents[number % distinct])
    return folder


def image_paths(folder: Path) -> list[str]:
    """Return CLASS/FILE for each file in the subfolders of `folder`, sorted."""
    return sorted(f"{path.parent.name}/{path.name}" for path in folder.glob("*/*"))


def record_sources(records: Sequence[tuple[bytes, Any]]) -> list[str]:
    return [datum.source.decode() for _, datum in records]


def decoded(datum: Any) -> npt.NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(datum.data)))


def modification_times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def snapshot(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Return {path: (mode, modification time, content)} of a folder and of everything in it."""
    return {
        str(path): (status.st_mode, status.st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in (folder, *folder.rglob("*"))
        for status in [path.stat()]
    }


COMMAND = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell script ignores SIGINT by default
from prep.cli import main
main()
"""


class BuildCommand:
    """A running `alexprep build-lmdb` command with two workers, in its own process group."""

    def __init__(self, images: Path, store: Path, *words: str) -> None:
        program = [sys.executable, "-c", COMMAND, "build-lmdb", str(images), "--store", str(store)]
        self.work_dir = store / "train" / ".build"
        self.process = subprocess.Popen(
            [*program, "--side", "32", "--format", "ppm", "--jobs", "2", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for(self, what: str, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not reached():
            assert self.process.poll() is None, f"ended before {what}: {self.process.communicate()[1]}"
            assert time.monotonic() < deadline, f"no {what}"
            time.sleep(0.002)

    def wait_for_shards(self, count: int) -> None:
        self.wait_for(f"{count} finished shards", lambda: len(self.shard_summaries()) >= count)

    def shard_summaries(self) -> list[Path]:
        """Return the paths of the summaries of the finished shards."""
        return sorted(self.work_dir.glob("[0-9]*.json"))

    def kill(self) -> None:
        """Send SIGKILL to the parent process alone. The workers must then end by themselves."""
        self.process.send_signal(signal.SIGKILL)

    def end(self) -> tuple[int, str, str]:
        """Wait until all processes of the group have ended. Returns (exit code, standard output, standard error)."""
        stdout, stderr = self.process.communicate(timeout=DEADLINE_S)
        deadline = time.monotonic() + DEADLINE_S
        while left := process_group(self.process.pid):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.01)
        return self.process.returncode, stdout, stderr


def run_interrupted_builds(photos: Path, work: Path, mode: str) -> list[dict[str, Any]]:
    """Run interrupted_builds.py: for n = 0, 1, 2…, interrupt build n before its disk operation n, and run it again.

    Returns the JSON objects that the program prints.
    """
    program = [sys.executable, str(Path(__file__).with_name("interrupted_builds.py")), str(photos), str(work), mode]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # the same setting as in a worker process
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def process_group(leader: int) -> dict[int, str]:
    """Return {pid: command line} of the living processes of a process group."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, pgrp = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(pgrp) == leader and state not in "ZX":
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def is_alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


_CAPABILITY_VERSION = (
    0x20080522  # _LINUX_CAPABILITY_CAPABILITY_VERSION_3: two sets of (effective, permitted, inheritable) 32-bit masks
)


@contextmanager
def no_root_rights() -> Iterator[None]:
    """Clear the effective capabilities of this thread, and of threads that it starts, during a `with` block.

    Without these capabilities, a test that runs as root cannot read files that have no read permission.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header, before = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, before) == 0
    without = (ctypes.c_uint32 * 6)(*before)
    without[0] = without[3] = 0
    assert libc.capset(header, without) == 0
    try:
        yield
    finally:
        assert libc.capset(header, before) == 0

"""Helpers for tests of builds in parts and on a cluster, and file readers that are slow or crash."""

from __future__ import annotations

import importlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from prep.build.parts import Part, PartResult, build_part
from prep.build.plan import BuildPolicy
from prep.cli import main
from prep.cluster import ray_module
from prep.console import Progress
from prep.inputs.folder import FolderReader
from prep.inputs.reader import Source
from prep.inputs.sources import list_source
from prep.store.manifest import Store
from tests.helpers.building import PPM, STRICT, InlineRunner

IMAGES = 450  # these images fill eight shards
WORDS = ("--side", "32", "--format", "ppm")


def alexprep(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def run_part(photos: Path, store: Path, number: int, count: int, policy: BuildPolicy = STRICT) -> PartResult:
    source = list_source(photos, "train")
    part, progress = Part(number, count), Progress(0, "pictures")
    return build_part(source, store, PPM, InlineRunner(), progress, policy, part, f"alexprep build-lmdb {photos}")


def tree(store: Path) -> list[str]:
    return sorted(str(path.relative_to(store)) for path in store.rglob("*"))


def assert_same(store: Path, whole: Store) -> None:
    """Assert that two stores have equal manifests, the same files, and the same bytes in their shards."""
    opened = Store.open(store)
    assert opened.fingerprint == whole.fingerprint
    assert opened.splits == whole.splits
    assert tree(store) == tree(whole.root)
    for path in opened.shard_paths("train"):
        assert (Path(path) / "data.mdb").read_bytes() == (
            whole.root / Path(path).relative_to(store) / "data.mdb"
        ).read_bytes()


class SlowReader(FolderReader):
    """A reader that waits 10 ms before it reads an image."""

    def read(self, item: Any) -> bytes:
        time.sleep(0.01)
        return super().read(item)


@dataclass(frozen=True)
class MarkingReader(SlowReader):
    """A reader that lets a test kill a node while the node builds a shard.

    On the node with the environment variable ALEXNET_DOOMED, a process that reads its tenth image creates the file
    `marker`, and then waits until it is killed.
    """

    marker: Path

    def read(self, item: Any) -> bytes:
        if "ALEXNET_DOOMED" in os.environ:
            _read_here.append(item.path)
            if len(_read_here) == 10:
                self.marker.touch()
                time.sleep(120)
        return super().read(item)


_read_here: list[bytes] = []


class CrashingReader(SlowReader):
    """A reader that kills its process when it reads image number 100."""

    def read(self, item: Any) -> bytes:
        if item.path.endswith(b"_100.JPEG"):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


def source_with(reader: FolderReader) -> Source:
    listed = list_source(reader.root, "train")
    return Source(reader, "train", listed.classes, listed.inputs)


class ActingProgress(Progress):
    """A Progress that keeps a list of the reported numbers of finished inputs.

    As soon as `is_time()` is true, the object calls `act()` once.
    """

    def __init__(self, is_time: Callable[[], bool] = lambda: False, act: Callable[[], object] = lambda: None) -> None:
        super().__init__(IMAGES, "pictures")
        self.is_time, self.act, self.has_acted, self.all_done = is_time, act, False, list[int]()

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        super().update(done, bad, size_bytes)
        self.all_done.append(done)
        if not self.has_acted and self.is_time():
            self.has_acted = True
            self.act()


def start_cluster() -> Any:
    """Start a cluster with a head node and a second node. Each node has one core."""
    ray_module()  # this call sets Ray's variables before Ray is imported
    cluster = importlib.import_module("ray.cluster_utils").Cluster()
    try:
        add_node(cluster, num_cpus=1, include_dashboard=False)
        add_node(cluster, num_cpus=1)
    except BaseException:
        cluster.shutdown()
        raise
    return cluster


def add_node(cluster: Any, **options: Any) -> Any:
    """Add a node to a cluster of ray.cluster_utils.

    Ray gives a node 30 s to start, which can be too short on a busy machine. Starting a node is therefore tried four
    times.
    """
    for tries_left in reversed(range(4)):
        try:
            return cluster.add_node(object_store_memory=100_000_000, **options)
        except Exception:
            if not tries_left:
                raise
    raise AssertionError

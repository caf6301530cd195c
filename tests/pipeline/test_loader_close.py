"""Closed loaders leave no file, thread or memory, and their batches stay valid."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from pipeline.loader import Batch, eval_loader, train_loader
from pipeline.records import Records
from prep.console import UserError
from prep.store import lmdb_shard
from prep.store.manifest import Store
from tests.conftest import TRAIN_RECORDS, VAL_RECORDS
from tests.pipeline.streaming import batches_equal, take_batches


@pytest.mark.parametrize("times", [50, pytest.param(1000, marks=pytest.mark.soak)])
def test_closed_loaders_leave_no_files_threads_or_memory(numbered_store: Path, times: int) -> None:
    """Each loader is closed after 0 to 2 batches, while it prefetches more.

    The memory of the process may grow by less than 24 MB, the size of twenty batches.
    """
    script = (
        "import gc, os, sys, threading\n"
        "from pipeline.loader import eval_loader, train_loader\n"
        "def resources():\n"
        "    gc.collect()\n"
        "    kb = int(next(l for l in open('/proc/self/status') if l.startswith('VmRSS')).split()[1])\n"
        "    tasks = len(os.listdir('/proc/self/task'))\n"
        "    return len(os.listdir('/proc/self/fd')), threading.active_count(), tasks, kb\n"
        "def use(times):\n"
        "    for k in range(times):\n"
        "        make = train_loader if k % 2 else eval_loader\n"
        "        loader = make(sys.argv[1], 2, threads=1)\n"
        "        batches = [batch for _, batch in zip(range(k % 3), loader)]\n"
        "        loader.close()\n"
        "use(40)\n"
        "before = resources()\n"
        "use(int(sys.argv[2]))\n"
        "print(*before, *resources())\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, str(numbered_store), str(times)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    files, threads, tasks, kb, files_after, threads_after, tasks_after, kb_after = map(int, process.stdout.split())
    assert (files_after, threads_after, tasks_after) == (files, threads, tasks)
    assert kb_after - kb < 24_000


@pytest.mark.parametrize("make", [train_loader, eval_loader])
def test_a_closed_loader_that_is_still_referenced_holds_no_file(numbered_store: Path, make) -> None:
    """With the C library, the loader maps its files and closes them. Without the C library, it keeps its files open."""

    def used_files() -> int:
        links = [Path(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")]
        is_used = [os.path.realpath(numbered_store) in str(link.readlink()) for link in links if link.is_symlink()]
        return sum(is_used) + Path("/proc/self/maps").read_text().count(os.path.realpath(numbered_store))

    gc.collect()
    loader = make(numbered_store, 4)
    next(iter(loader))
    assert used_files() == 1
    loader.close()
    assert used_files() == 0 and loader.records in (TRAIN_RECORDS, VAL_RECORDS)


def test_unclosed_loaders_may_be_collected_and_the_process_may_end_while_they_prefetch(numbered_store: Path) -> None:
    """The process closes no loader. It would crash if a loader unmapped files while a thread still reads them."""
    script = (
        "import gc, sys\n"
        "from pipeline.loader import train_loader\n"
        "kept = []\n"
        "for k in range(12):\n"
        "    loader = train_loader(sys.argv[1], 12, threads=2)\n"
        "    iterator = iter(loader)\n"
        "    next(iterator)\n"
        "    if k % 4 == 3: kept.append(iterator if k % 8 == 3 else loader)\n"
        "    del loader, iterator\n"
        "    gc.collect()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(numbered_store)], check=True, timeout=120)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_outlive_their_loader(numbered_store: Path, dtype: str) -> None:
    with train_loader(numbered_store, 12, seed=1, dtype=dtype) as loader:
        kept = take_batches(loader, 6)
        copies = [Batch(batch.images.clone(), batch.labels.clone()) for batch in kept]
    gc.collect()
    for seed in range(2, 5):
        with train_loader(numbered_store, 12, seed=seed, dtype=dtype) as loader:
            take_batches(loader, 4)
    del loader
    gc.collect()
    assert batches_equal(kept, copies)


def test_batches_may_be_kept_and_changed_in_place(numbered_store: Path) -> None:
    with train_loader(numbered_store, 12, seed=1) as loader:
        kept = take_batches(loader, 10)
    with train_loader(numbered_store, 12, seed=1) as loader:
        for batch, before in zip((b for _ in range(4) for b in loader), kept, strict=False):
            assert batches_equal([batch], [before])
            batch.images.zero_()
            batch.labels.zero_()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_closed_loader_raises_value_error(numbered_store: Path, after: int) -> None:
    for loader in (train_loader(numbered_store, 4), eval_loader(numbered_store, 4)):
        iterator = iter(loader)
        for _ in range(after):
            next(iterator)
        loader.close()
        loader.close()
        with pytest.raises(ValueError, match="closed"):
            next(iterator)
        with pytest.raises(ValueError, match="closed"):
            next(iter(loader))


def test_several_loaders_and_readers_of_one_store_work_at_the_same_time(numbered_store: Path) -> None:
    with train_loader(numbered_store, 6, seed=1) as loader:
        expected = take_batches(loader, 6)
    path = Path(Store.open(numbered_store).shard_paths("train")[0])
    records = list(lmdb_shard.read(path))
    with train_loader(numbered_store, 6, seed=1) as first, train_loader(numbered_store, 6, seed=1) as second:
        batches, reading = [], lmdb_shard.read(path)
        for a, b in zip(first, second, strict=True):
            batches.append(a)
            assert batches_equal([a], [b]) and next(reading) == records[len(batches) - 1]
            if len(batches) == 3:
                with train_loader(numbered_store, 6, seed=1, split="train") as third:
                    assert batches_equal(take_batches(third, 2), expected[:2])
        assert batches_equal(batches, expected)
        first.close()
        assert list(reading) == records[len(batches) :]
        assert batches_equal(take_batches(second, 1), [second_epoch(numbered_store)])


def second_epoch(store: Path) -> Batch:
    with train_loader(store, 6, seed=1) as loader:
        loader.seek(1)
        return take_batches(loader, 1)[0]


def in_forked_child(work: Callable[[], object]) -> tuple[int, str]:
    """Run `work` in a forked child, which then ends without exit handlers.

    Returns the wait status of the child, and the text of the exception that `work` raised, or "".
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            os.write(write_end, f"{type(error).__name__}: {error}".encode())
            code = 0
        finally:
            os._exit(code)
    os.close(write_end)
    with open(read_end) as text:
        said = text.read()
    return os.waitpid(child, 0)[1], said


@pytest.mark.parametrize("make", [train_loader, eval_loader])
@pytest.mark.parametrize("started", [False, True])
def test_a_loader_in_a_forked_child_says_so_at_once_and_is_closed_without_harm(
    numbered_store: Path, make: Any, started: bool
) -> None:
    """A torch DataLoader with workers iterates over its data set in forked children.

    In earlier versions of this project, a torch DataLoader around a loader waited for its first batch forever.
    """
    with make(numbered_store, 4, threads=1) as loader:
        iterator = iter(loader)
        if started:
            next(iterator)
        for use in (lambda: next(iter(loader)), lambda: next(iterator)):
            status, said = in_forked_child(use)
            assert status == 0 and said.startswith(f"UserError: this loader was made in process {os.getpid()} and")
            assert "Make the loader in the process that iterates over it" in said
        assert in_forked_child(loader.close) == (0, "")
        assert len(list(iterator)) == len(loader) - started  # the parent's loader continues


def test_a_forked_child_may_open_the_same_store(numbered_store: Path) -> None:
    with train_loader(numbered_store, 6, seed=1, threads=1) as loader:
        expected = [batch.images.numpy().copy() for batch in take_batches(loader, 2)]

        def work() -> None:  # compares with NumPy instead of torch, because torch's threads do not survive a fork
            with train_loader(numbered_store, 6, seed=1, threads=1) as own:
                for batch, images in zip(own, expected, strict=False):
                    assert np.array_equal(batch.images.numpy(), images)

        assert in_forked_child(work) == (0, "")


def test_a_forked_child_ends_without_a_crash(numbered_store: Path) -> None:
    """Before the child ends, it deletes its copy of the parent's loader."""
    script = (
        "import os, signal, sys\n"
        "from pipeline.loader import train_loader\n"
        "loader = train_loader(sys.argv[1], 4, threads=1)\n"
        "next(iter(loader))\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    signal.alarm(60)\n"
        "    del loader\n"
        "    sys.exit(7)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(numbered_store)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(ended.stdout) == 7 << 8 and ended.stderr == ""


def test_pickling_or_copying_a_loader_says_so(numbered_store: Path) -> None:
    with train_loader(numbered_store, 4, threads=1) as loader:
        for copied in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(UserError, match=r"^a loader cannot be pickled or copied: "):
                copied(loader)
    records = pickle.loads(pickle.dumps(Records(Store.open(numbered_store), "train")))
    assert len(records) == TRAIN_RECORDS and records[0].label in range(len(records.store.classes))


def test_a_loader_closed_by_another_thread_during_next_says_so(numbered_store: Path) -> None:
    """Another thread closes the loader exactly while the consumer waits for a batch."""
    with train_loader(numbered_store, batch_size=8) as loader:
        iterator = iter(loader)
        next(iterator)
        prefetcher = loader._prefetcher

        class ClosedDuringTheWait:
            def get(self) -> None:
                thread = threading.Thread(target=loader.close)
                thread.start()
                thread.join()

            def put(self, item: None) -> None:
                pass

            def empty(self) -> bool:
                return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefetcher, "_wake", ClosedDuringTheWait())
            with pytest.raises(ValueError, match="the loader is closed"):
                prefetcher.get(100)


def test_a_torch_dataloader_round_a_loader_says_so(numbered_store: Path) -> None:
    with train_loader(numbered_store, batch_size=8) as loader:
        dataset: Any = loader
        with pytest.raises(UserError, match=r"only batches in their order.*DataLoader around a loader is not needed"):
            next(iter(DataLoader(dataset, batch_size=None)))

"""prep.check.verify on LMDB files that are truncated or overwritten, or that crash the process that reads them.

Two worker processes do all checks. A file that crashes a worker must be reported like any other fault.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.check.verify_shard import Fault
from prep.workers import WorkerDied, WorkerPool
from tests.helpers.damaged_stores import (
    PAGE_BYTES,
    MakeStore,
    faults_of,
    lengthen_first_record,
    overwrite,
    read_records,
    replace_records,
    the_fault,
)


def faults_of_the_shard(store: Path, workers: WorkerPool) -> list[Fault]:
    """Return the faults of a store that has one shard. Asserts that each fault names the shard."""
    faults = faults_of(store, workers)
    assert faults and {fault.where for fault in faults} == {"train/00000"}
    return faults


def test_a_file_truncated_anywhere_is_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(64)
    file = store / "train" / "00000" / "data.mdb"
    whole = file.read_bytes()
    rng = np.random.default_rng(20)
    cuts = [0, 1, PAGE_BYTES - 1, PAGE_BYTES, 2 * PAGE_BYTES, len(whole) - PAGE_BYTES, len(whole) - 1]
    for length in [*cuts, *rng.integers(0, len(whole), 20 - len(cuts)).tolist()]:
        file.write_bytes(whole[:length])
        assert len(faults_of_the_shard(store, workers)) == 1
    file.write_bytes(whole)
    assert faults_of(store, workers) == []


@pytest.mark.parametrize("content", ["zeros", "random", "of another page"])
def test_an_overwritten_page_is_a_fault(content: str, copy_store: MakeStore, workers: WorkerPool) -> None:
    """The test overwrites one page at a time: the second header page, which is in use, and some of the other pages."""
    store = copy_store(64)
    file = store / "train" / "00000" / "data.mdb"
    whole = file.read_bytes()
    rng = np.random.default_rng(4)
    pages = len(whole) // PAGE_BYTES
    for page in [1, 2, 3, 4, *range(5, pages, 6)]:
        other = rng.integers(pages - 1)
        page_now = {"zeros": bytes(PAGE_BYTES), "random": rng.bytes(PAGE_BYTES), "of another page": b""}[content]
        if not page_now:
            other = (page + 7) % pages
            page_now = whole[other * PAGE_BYTES : (other + 1) * PAGE_BYTES]
        file.write_bytes(whole[: page * PAGE_BYTES] + page_now + whole[(page + 1) * PAGE_BYTES :])
        faults_of_the_shard(store, workers)
    file.write_bytes(whole)
    assert faults_of(store, workers) == []


def newest_header(content: bytes) -> int:
    """Return the offset of the header page with the higher transaction number. LMDB ignores the other header page."""
    return max((0, PAGE_BYTES), key=lambda at: int.from_bytes(content[at + 144 : at + 152], "little"))


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (16, b"\0\0\0\0"),  # magic
        (20, b"\x09"),  # version
        (120, (63).to_bytes(8, "little")),  # number of entries, which DALI uses as the number of records
        (128, (3).to_bytes(8, "little")),  # root
        (128, b"\xff" * 8),
        (136, (10**6).to_bytes(8, "little")),  # last page
        (144, bytes(8)),  # transaction number; with number 0, LMDB uses the other header page, which is empty
    ],
    ids=["magic", "version", "entries", "root", "no-root", "last-page", "transaction"],
)
def test_a_damaged_header_is_a_fault(offset: int, content: bytes, copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(64)
    file = store / "train" / "00000" / "data.mdb"
    overwrite(file, newest_header(file.read_bytes()) + offset, content)
    faults_of_the_shard(store, workers)


class CrashingPool(WorkerPool):
    """A pool in which the worker that reads the first shard is killed at record 7."""

    def map(self, work: Any, tasks: Any, on_progress: Any) -> Any:
        first, *others = tasks
        yield first, WorkerDied(7, -9)
        yield from super().map(work, others, on_progress)


def test_a_shard_that_crashes_its_reader_is_a_fault_and_the_others_are_checked(copy_store: MakeStore) -> None:
    store = copy_store(150)
    folder = store / "train" / "00002"
    records = read_records(folder)
    replace_records(folder, [(records[0][0], b"damaged"), *records[1:]])
    with CrashingPool(1) as pool:
        crashing, other = faults_of(store, pool)
    assert (crashing.where, crashing.key) == ("train/00000", "")
    assert "was killed (SIGKILL)" in crashing.what and "at record 7" in crashing.what
    assert (other.where, other.key) == ("train/00002", records[0][0].decode())


def test_a_record_longer_than_its_file_is_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(64)
    lengthen_first_record(store)
    assert the_fault(store, workers, "a record of 200,000,000 bytes").where == "train/00000"


def test_missing_and_additional_shards_are_faults(copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(150)
    shutil.copytree(store / "train" / "00001", store / "train" / "00003")
    assert the_fault(store, workers, "does not name").where == "train/00003"
    shutil.rmtree(store / "train" / "00003")
    (store / "train" / "00002" / "data.mdb").unlink()
    assert the_fault(store, workers, "No such file").where == "train/00002"
    shutil.rmtree(store / "train" / "00002")
    assert the_fault(store, workers, "No such file").where == "train/00002"

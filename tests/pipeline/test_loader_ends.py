"""How a stream ends: at a damaged record, closed, forgotten, or with its process; and what it leaves."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import lmdb
import pytest

from pipeline.loader import Batch, EvalLoader, TrainLoader, eval_loader, train_loader
from pipeline.sampling import epoch_permutation
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Store, StoreError
from tests.conftest import RECORDS, VAL
from tests.helpers.streaming import same, take

# ---- damage


@pytest.fixture
def broken(numbered: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(numbered, tmp_path / "store"))


def change(store: Path, split: str, place: int, what) -> tuple[str, str]:
    """Give record `place` the value `what(value)`; returns its key and its source."""
    folder = Store.open(store).shard_paths(split)[0]
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        key, value = list(txn.cursor())[place]
        txn.put(key, what(value))
    return key.decode(), Datum.decode(value).source.decode()


def flip_a_bit_of_the_jpeg(value: bytes) -> bytes:
    at = value.index(b"\xff\xd8\xff") + 1
    return value[:at] + bytes([value[at] ^ 4]) + value[at + 1 :]


def give_another_label(value: bytes) -> bytes:
    return replace(Datum.decode(value), label=RECORDS).encode()


def cut_off(value: bytes) -> bytes:
    return value[:300]


DAMAGE = {"flipped bit": flip_a_bit_of_the_jpeg, "label": give_another_label, "cut off": cut_off}


def stopped_with(loader: TrainLoader | EvalLoader) -> tuple[str, int]:
    """What the loader raises before its pass ends, and how many images it has served by then."""
    served = 0
    try:
        for batch in loader:
            served += len(batch.labels)
    except StoreError as error:
        return str(error), served
    pytest.fail("the pass went through")


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("place", [0, 5, VAL - 1])
@pytest.mark.parametrize("views", [1, 10])
def test_a_damaged_record_stops_an_evaluation_and_is_named(broken: Path, damage: str, place: int, views: int) -> None:
    key, source = change(broken, "val", place, DAMAGE[damage])
    with eval_loader(broken, 2, views=views) as loader:
        said, served = stopped_with(loader)
    assert served <= place
    assert f"{broken}/val/00000, key {key}" in said and f"alexprep verify --store {broken}" in said
    assert "\n" not in said and "Critical error" not in said
    assert damage == "cut off" or f"source {source}:" in said


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_stops_training_and_is_named(broken: Path, damage: str) -> None:
    place = int(epoch_permutation(RECORDS, 0, 0)[17])
    key, _ = change(broken, "train", place, DAMAGE[damage])
    with train_loader(broken, 4) as loader:
        said, _ = stopped_with(loader)
        assert said.startswith(f"{broken}/train/00000, key {key}") and "alexprep verify" in said
        assert (loader.epoch, loader.step) <= (0, 4)


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        ("train", "flipped bit"),
        ("train", "label"),
        ("train", "cut off"),
        ("val", "flipped bit"),
        ("val", "label"),
        ("val", "cut off"),
    ],
)
def test_a_stream_that_a_damaged_record_stopped_does_not_go_on_without_it(broken: Path, damage: str, kind: str) -> None:
    place = int(epoch_permutation(RECORDS, 0, 0)[17])
    change(broken, kind, 17 if kind == "val" else place, DAMAGE[damage])
    with train_loader(broken, 4) if kind == "train" else eval_loader(broken, 4) as loader:
        for _ in range(3):
            stopped_with(loader)


@pytest.mark.parametrize("views", [1, 10])
def test_a_loader_is_closed_by_the_error_that_leaves_its_block(broken: Path, views: int) -> None:
    """Files must not be unmapped under what DALI still decodes. In a process of its own, 20 times."""
    change(broken, "val", 0, flip_a_bit_of_the_jpeg)
    script = (
        "import sys\n"
        "from pipeline.loader import eval_loader\n"
        "from prep.store.manifest import StoreError\n"
        "for _ in range(20):\n"
        "    try:\n"
        "        with eval_loader(sys.argv[1], 8, views=int(sys.argv[2]), threads=1) as loader:\n"
        "            list(loader)\n"
        "    except StoreError as error:\n"
        "        print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(broken), str(views)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("key 00000000") == 20


def test_what_cannot_be_decoded_though_its_checksum_is_right_stops_the_stream(broken: Path) -> None:
    change(broken, "val", 3, lambda value: replace(Datum.decode(value), data=bytes(3000)).encode())
    with eval_loader(broken, 4) as loader:
        said, _ = stopped_with(loader)
    assert f"{broken}/val/00000, key 00000003, source " in said and "cannot be decoded" in said
    assert f"alexprep verify --store {broken}" in said
    assert "\n" not in said and "Critical error" not in said


@pytest.mark.parametrize("kind", ["ppm", "ppm-whole"])
def test_pixels_that_are_fewer_than_they_should_be_are_named(
    stores: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """With a right checksum."""
    store = Path(shutil.copytree(stores[kind], tmp_path / "store"))
    key, source = change(store, "val", 4, lambda v: replace(Datum.decode(v), data=Datum.decode(v).data[:-3]).encode())
    with eval_loader(store, 2) as loader, pytest.raises(StoreError) as stopped:
        list(loader)
    assert f"key {key}, source {source}:" in str(stopped.value) and "bytes of pixels" in str(stopped.value)


def test_a_shard_that_was_cut_off_is_named_without_a_crash(broken: Path) -> None:
    """In a process of its own: reading past the end of a mapped file ends it."""
    file = broken / "val" / "00000" / "data.mdb"
    with open(file, "r+b") as handle:
        handle.truncate(file.stat().st_size // 2)
    script = "import sys\nfrom pipeline.loader import eval_loader\nlist(eval_loader(sys.argv[1], 4))\n"
    ended = subprocess.run(
        [sys.executable, "-c", script, str(broken)], capture_output=True, text=True, check=False, timeout=120
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"prep.store.manifest.StoreError: {broken}/val/00000")
    assert f"alexprep verify --store {broken}" in ended.stderr


@pytest.mark.parametrize("how", ["fewer", "more"])
def test_a_shard_of_another_number_of_records_is_named(broken: Path, how: str) -> None:
    folder = Store.open(broken).shard_paths("val")[0]
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        txn.delete(b"00000004") if how == "fewer" else txn.put(b"00000099", txn.get(b"00000004"))
    with eval_loader(broken, 4) as loader, pytest.raises(StoreError, match=r"2[24] records, the manifest says 23"):
        list(loader)


def test_a_shard_that_is_missing_is_named(broken: Path) -> None:
    shutil.rmtree(broken / "val" / "00000")
    with pytest.raises(StoreError, match="val/00000"), eval_loader(broken, 4) as loader:
        list(loader)


# ---- resources


@pytest.mark.parametrize("times", [100, pytest.param(1000, marks=pytest.mark.soak)])
def test_loaders_that_were_closed_leave_nothing(numbered: Path, times: int) -> None:
    """Some closed before the first batch, all with others on their way: no file, no thread, and less than 24 MB more
    memory, twenty batches."""
    script = (
        "import gc, os, sys, threading\n"
        "from pipeline.loader import eval_loader, train_loader\n"
        "def held():\n"
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
        "before = held()\n"
        "use(int(sys.argv[2]))\n"
        "print(*before, *held())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(numbered), str(times)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    files, threads, tasks, kb, files_after, threads_after, tasks_after, kb_after = map(int, ended.stdout.split())
    assert (files_after, threads_after, tasks_after) == (files, threads, tasks)
    assert kb_after - kb < 24_000


@pytest.mark.parametrize("make", [train_loader, eval_loader])
def test_a_closed_loader_holds_no_file_though_it_is_kept(numbered: Path, make) -> None:
    def held() -> int:
        links = [Path(f"/proc/self/fd/{handle}") for handle in os.listdir("/proc/self/fd")]
        return sum(os.path.realpath(numbered) in str(link.readlink()) for link in links if link.is_symlink())

    gc.collect()
    loader = make(numbered, 4)
    next(iter(loader))
    assert held() == 1
    loader.close()
    assert held() == 0 and loader.records in (RECORDS, VAL)


def test_loaders_may_be_forgotten_and_the_process_may_end_with_streams_at_work(numbered: Path) -> None:
    """None of these is closed: what DALI still decodes must not be unmapped under it."""
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
    subprocess.run([sys.executable, "-W", "error", "-c", script, str(numbered)], check=True, timeout=120)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batches_outlive_their_loader(numbered: Path, dtype: str) -> None:
    with train_loader(numbered, 12, seed=1, dtype=dtype) as loader:
        kept = take(loader, 6)
        copies = [Batch(batch.images.clone(), batch.labels.clone()) for batch in kept]
    gc.collect()
    for seed in range(2, 5):
        with train_loader(numbered, 12, seed=seed, dtype=dtype) as loader:
            take(loader, 4)
    del loader
    gc.collect()
    assert same(kept, copies)


def test_batches_may_be_kept_and_changed(numbered: Path) -> None:
    with train_loader(numbered, 12, seed=1) as loader:
        kept = take(loader, 10)
    with train_loader(numbered, 12, seed=1) as loader:
        for batch, before in zip((b for _ in range(4) for b in loader), kept, strict=False):
            assert same([batch], [before])
            batch.images.zero_()
            batch.labels.zero_()


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_closed_loader_says_so(numbered: Path, after: int) -> None:
    for loader in (train_loader(numbered, 4), eval_loader(numbered, 4)):
        iterator = iter(loader)
        for _ in range(after):
            next(iterator)
        loader.close()
        loader.close()
        with pytest.raises(ValueError, match="closed"):
            next(iterator)
        with pytest.raises(ValueError, match="closed"):
            next(iter(loader))


def test_loaders_and_readers_of_one_store_do_not_disturb_each_other(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=1) as loader:
        wanted = take(loader, 6)
    path = Path(Store.open(numbered).shard_paths("train")[0])
    records = list(lmdb_shard.read(path))
    with train_loader(numbered, 6, seed=1) as first, train_loader(numbered, 6, seed=1) as second:
        found, reading = [], lmdb_shard.read(path)
        for a, b in zip(first, second, strict=True):
            found.append(a)
            assert same([a], [b]) and next(reading) == records[len(found) - 1]
            if len(found) == 3:
                with train_loader(numbered, 6, seed=1, split="train") as third:
                    assert same(take(third, 2), wanted[:2])
        assert same(found, wanted)
        first.close()
        assert list(reading) == records[len(found) :]
        assert same(take(second, 1), [second_epoch(numbered)])


def second_epoch(store: Path) -> Batch:
    with train_loader(store, 6, seed=1) as loader:
        loader.seek(1)
        return take(loader, 1)[0]

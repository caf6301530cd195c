"""The loaders: every image of an evaluation once, epochs, repeatability, resumption, worlds, damage, refusals.

Each picture of `numbered` has its own number in its label, so a batch's labels say which records it holds.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from conftest import Build
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.loader import GRAPH_VERSION, Batch, EvalLoader, TrainLoader, eval_loader, train_loader
from pipeline.order import epoch_order
from pipeline.placement import Placement
from prep import shard
from prep.console import UserError
from prep.datum import Datum
from prep.manifest import Store, StoreError

RECORDS, VAL = 37, 23


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, build: Build) -> Path:
    """A store of 37 training and 23 validation pictures whose labels are their numbers."""
    source = tmp_path_factory.mktemp("numbered")
    rng = np.random.default_rng(0)
    for split, n in (("train", RECORDS), ("val", VAL)):
        (source / split).mkdir()
        for k in range(n):
            picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).resize((260 + k, 256)).save(source / split / f"{k:03d}.jpg")
    labels = source / "numbers.txt"
    labels.write_text("".join(f"{k:03d}.jpg {k}\n" for k in range(RECORDS)))
    return build(source, "--labels", str(labels))


def labels_of(loader: TrainLoader | EvalLoader) -> list[list[int]]:
    return [batch.labels.tolist() for batch in loader]


def labels_in_store(store: Path, split: str) -> list[int]:
    paths = Store.open(store).shard_paths(split)
    return [Datum.decode(value).label for path in paths for _, value in shard.read(Path(path))]


def take(loader: TrainLoader, batches: int) -> list[Batch]:
    """So many batches, through as many epochs as it takes."""
    endless = (batch for _ in itertools.count() for batch in loader)
    return list(itertools.islice(endless, batches))


def same(some: list[Batch], others: list[Batch]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) for a, b in zip(some, others, strict=True)
    )


def joined(ranks: list[list[Batch]]) -> list[Batch]:
    """What the loaders of a world serve, step by step, in the order of their ranks."""
    steps = zip(*ranks, strict=True)
    return [Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True))) for batches in steps]


# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 7, VAL, VAL + 5])
@pytest.mark.parametrize("views", [1, 10])
def test_evaluation_serves_every_image_once_each_time(numbered: Path, batch_size: int, views: int) -> None:
    with eval_loader(numbered, batch_size, views=views) as loader:
        for _ in range(3 if views == 1 else 2):
            batches = list(loader)
            assert [len(batch.labels) for batch in batches[:-1]] == [batch_size] * (len(loader) - 1)
            assert [label for batch in batches for label in batch.labels.tolist()] == labels_in_store(numbered, "val")
            for batch in batches:
                wanted = (len(batch.labels), 10, 3, 224, 224) if views == 10 else (len(batch.labels), 3, 224, 224)
                assert tuple(batch.images.shape) == wanted
                assert batch.images.dtype == torch.float32 and batch.labels.dtype == torch.int64


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("left_after", [0, 1, 2, 5, 8])
def test_a_pass_that_is_left_early_does_not_shift_the_next(numbered: Path, views: int, left_after: int) -> None:
    with eval_loader(numbered, 3, views=views) as loader:
        for _ in range(3):
            early = list(itertools.islice(loader, left_after))
            assert len(early) == left_after
        whole = list(loader)
        assert [label for batch in whole for label in batch.labels.tolist()] == labels_in_store(numbered, "val")
        assert same(early, whole[:left_after])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, VAL, 30])
@pytest.mark.parametrize("batch_size", [4, VAL + 5])
def test_a_world_evaluates_every_image_once(numbered: Path, world_size: int, batch_size: int) -> None:
    with eval_loader(numbered, VAL) as loader:
        wanted = next(iter(loader))
    images, labels, sizes = [], [], []
    for rank in range(world_size):
        with eval_loader(numbered, batch_size, shard=rank, world_size=world_size, threads=1) as loader:
            for _ in range(2):
                batches = list(loader)
                assert len(batches) == len(loader)
        images += [batch.images for batch in batches]
        labels += [batch.labels for batch in batches]
        sizes.append(sum(len(batch.labels) for batch in batches))
    assert torch.equal(torch.cat(labels), wanted.labels) and torch.equal(torch.cat(images), wanted.images)
    assert max(sizes) - min(sizes) <= 1


# ---- epochs


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 1), (37, 1), (4, 3), (1, 1)])
def test_an_epoch_has_whole_batches_of_distinct_records_in_its_order(
    numbered: Path, batch_size: int, world_size: int
) -> None:
    stored = labels_in_store(numbered, "train")
    step = batch_size * world_size
    with train_loader(numbered, batch_size, seed=6, world_size=world_size, shard=world_size - 1) as loader:
        assert len(loader) == RECORDS // step and loader.left_out == RECORDS % step
        for epoch in range(2):
            assert loader.epoch == epoch
            order = [stored[number] for number in epoch_order(RECORDS, 6, epoch)]
            ends = [step * (k + 1) for k in range(RECORDS // step)]
            assert labels_of(loader) == [order[end - batch_size : end] for end in ends]


def test_no_record_is_served_twice_in_an_epoch_and_all_are_served_in_time(numbered: Path) -> None:
    with train_loader(numbered, 10) as loader:
        epochs = [[label for batch in labels_of(loader) for label in batch] for _ in range(12)]
    assert all(len(set(epoch)) == len(epoch) == RECORDS - loader.left_out == 30 for epoch in epochs)
    counts = Counter(itertools.chain(*epochs))
    assert len(counts) == RECORDS and min(counts.values()) >= 5
    assert len({tuple(epoch) for epoch in epochs}) == 12


def test_same_seed_gives_the_same_bits_for_any_number_of_threads(numbered: Path) -> None:
    def first(seed: int, threads: int) -> list[Batch]:
        with train_loader(numbered, 12, seed=seed, threads=threads) as loader:
            return take(loader, 5)

    one = first(5, 1)
    for threads in (1, 2, 4):
        assert same(one, first(5, threads))
    other = first(6, 1)
    assert not any(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


# ---- resumption


PLACES = [0, 1, 2, 3, 4, 7]


def test_a_state_continues_to_the_bit_in_a_new_process(numbered: Path, tmp_path: Path) -> None:
    """Before the first batch, within an epoch, at its end, and in those after it; an epoch has three batches.

    The process imports pipeline.loader and nothing of ours before it.
    """
    with train_loader(numbered, 10, seed=2**63) as loader:
        states = [loader.state_dict()]
        served = []
        for batch in (batch for _ in range(4) for batch in loader):
            served.append(batch)
            states.append(loader.state_dict())
    (tmp_path / "states.json").write_text(json.dumps([states[place] for place in PLACES]))
    script = (
        "import itertools, json, sys, torch\n"
        "from pipeline.loader import train_loader\n"
        "for state in json.load(open(sys.argv[2] + '/states.json')):\n"
        "    with train_loader(sys.argv[1], 10, seed=2**63) as loader:\n"
        "        loader.load_state_dict(state)\n"
        "        batches = [tuple(b) for _ in range(2) for b in loader]\n"
        "        place = 3 * state['epoch'] + state['step']\n"
        "        torch.save((batches, loader.state_dict()), f'{sys.argv[2]}/{place}.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(numbered), str(tmp_path)], check=True, timeout=120)
    for place in PLACES:
        batches, state = torch.load(tmp_path / f"{place}.pt")
        assert len(batches) == 6 - place % 3
        assert same([Batch(*batch) for batch in batches], served[place : place + len(batches)])
        assert state == states[place + len(batches)]


def test_a_state_is_small_and_is_the_same_after_json(numbered: Path) -> None:
    with train_loader(numbered, 10, seed=2**64 - 1, augmentation=Augmentation(mean="image", strength=0.3)) as loader:
        take(loader, 4)
        state = loader.state_dict()
        assert (state["epoch"], state["step"]) == (1, 1)
        text = json.dumps(state)
        assert json.loads(text) == state and len(text) < 1000
        loader.load_state_dict(json.loads(text))
        assert loader.state_dict() == state


def test_a_state_may_be_loaded_while_iterating(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 8)
    with train_loader(numbered, 6, seed=3) as loader:
        start = loader.state_dict()
        for count, _ in enumerate(loader, 1):
            if count == 2:
                middle = loader.state_dict()
            if count == 4:
                break
        loader.load_state_dict(middle)
        assert same(list(loader), batches[2:6])
        loader.load_state_dict(start)
        assert same(take(loader, 8), batches)


def test_an_iterator_serves_from_where_the_stream_stands_after_a_state_was_loaded(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 6)
    with train_loader(numbered, 6, seed=3) as loader:
        start = loader.state_dict()
        iterator = iter(loader)
        next(iterator), next(iterator)
        loader.load_state_dict(start)
        assert same([next(iterator)], batches[:1])


def test_the_stream_may_be_left_and_taken_up_within_an_epoch(numbered: Path) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 9)
    with train_loader(numbered, 6, seed=3) as loader:
        assert same(list(itertools.islice(loader, 2)), batches[:2])
        assert same(list(loader), batches[2:6])
        assert same(list(itertools.islice(loader, 3)), batches[6:9])


@pytest.mark.parametrize(("epoch", "step"), [(0, 3), (2, 0), (0, 0)])
def test_a_stream_may_be_put_anywhere(numbered: Path, epoch: int, step: int) -> None:
    with train_loader(numbered, 6, seed=3) as loader:
        batches = take(loader, 15)
        loader.seek(epoch, step)
        assert same(take(loader, 3), batches[6 * epoch + step :][:3])


@pytest.mark.parametrize(("epoch", "step"), [(-1, 0), (0, 6), (0, -1)])
def test_a_place_that_is_not_there_is_refused(numbered: Path, epoch: int, step: int) -> None:
    with train_loader(numbered, 6) as loader, pytest.raises(UserError, match="steps 0 to 5"):
        loader.seek(epoch, step)


IDENTITY = {
    "graph_version": GRAPH_VERSION + 1,
    "store_fingerprint": "0" * 64,
    "split": "val",
    "seed": 3,
    "augmentation": {},
    "layout": "NHWC",
    "dtype": "float16",
}


def test_a_state_says_what_it_is_of(numbered: Path) -> None:
    with train_loader(numbered, 10) as loader:
        assert set(loader.state_dict()) == {*IDENTITY, "batch_size", "world_size", "shard", "epoch", "step"}


@pytest.mark.parametrize(("name", "other"), IDENTITY.items())
@pytest.mark.parametrize("step", [0, 2])
def test_a_state_of_something_else_is_refused_by_name(numbered: Path, name: str, other: object, step: int) -> None:
    with train_loader(numbered, 10, seed=2) as loader:
        for state in ({**loader.state_dict(), "step": step, name: other}, {**loader.state_dict(), "step": step}):
            if state[name] != other:
                del state[name]
            with pytest.raises(UserError, match=f"another {name.replace('_', ' ')}"):
                loader.load_state_dict(state)
            assert (loader.epoch, loader.step) == (0, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"layout": "NHWC"},
        {"dtype": "bfloat16"},
        {"augmentation": Augmentation(shared_by=2)},
        {"split": "val"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_loader_of_other_settings_gives_another_state(numbered: Path, options: dict) -> None:
    with train_loader(numbered, 10) as loader, train_loader(numbered, 10, **options) as other:
        with pytest.raises(UserError, match="stream state of another"):
            loader.load_state_dict(other.state_dict())
        with pytest.raises(UserError, match="stream state of another"):
            other.load_state_dict(loader.state_dict())


@pytest.mark.parametrize(
    ("mine", "theirs", "named"),
    [((10, 1), (11, 1), "batch size"), ((4, 3), (4, 2), "world size"), ((6, 1), (6, 2), "world size")],
)
def test_the_records_of_a_step_may_change_only_between_epochs(
    numbered: Path, mine: tuple[int, int], theirs: tuple[int, int], named: str
) -> None:
    with (
        train_loader(numbered, mine[0], world_size=mine[1]) as loader,
        train_loader(numbered, theirs[0], world_size=theirs[1]) as other,
    ):
        next(iter(other))
        with pytest.raises(UserError, match=f"another {named} within an epoch"):
            loader.load_state_dict(other.state_dict())
        other.seek(3)
        loader.load_state_dict(other.state_dict())
        assert (loader.epoch, loader.step) == (3, 0)


# ---- worlds


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 5), (3, 12)])
@pytest.mark.parametrize("shared_by", [1, 3])
def test_a_world_serves_what_one_loader_of_its_size_would(
    numbered: Path, world_size: int, batch_size: int, shared_by: int
) -> None:
    how = Augmentation(shared_by=shared_by)
    with train_loader(numbered, world_size * batch_size, seed=8, augmentation=how) as loader:
        wanted = take(loader, 5)
        left_out = loader.left_out
    ranks = []
    for rank in range(world_size):
        with train_loader(
            numbered, batch_size, seed=8, augmentation=how, shard=rank, world_size=world_size, threads=1
        ) as loader:
            ranks.append(take(loader, 5))
            assert loader.left_out == left_out
    assert same(joined(ranks), wanted)


@pytest.mark.parametrize("batches", [2, 4, 7])
def test_a_state_of_one_loader_continues_with_two_of_half_its_batch(numbered: Path, batches: int) -> None:
    with train_loader(numbered, 8, seed=8) as loader:
        take(loader, batches)
        state = json.loads(json.dumps(loader.state_dict()))
        wanted = take(loader, 5)
    ranks = []
    for rank in range(2):
        with train_loader(numbered, 4, seed=8, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(take(loader, 5))
            after = loader.state_dict()
    assert same(joined(ranks), wanted)
    with train_loader(numbered, 8, seed=8) as loader:
        loader.load_state_dict(after)
        loader.load_state_dict({**after, "step": 0, "epoch": 0})
        take(loader, batches)
        assert same(take(loader, 5), wanted)


def test_between_epochs_a_world_may_take_over_with_the_same_batch(numbered: Path) -> None:
    with train_loader(numbered, 8, seed=8) as loader:
        list(loader)
        state = loader.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0)
    with train_loader(numbered, 16, seed=8) as loader:
        loader.load_state_dict(state)
        wanted = list(loader)
    ranks = []
    for rank in range(2):
        with train_loader(numbered, 8, seed=8, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(list(loader))
    assert len(wanted) == 2 and same(joined(ranks), wanted)


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
    assert damage == "cut off" or f"made of {source}:" in said


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_stops_training_and_is_named(broken: Path, damage: str) -> None:
    place = int(epoch_order(RECORDS, 0, 0)[17])
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
    place = int(epoch_order(RECORDS, 0, 0)[17])
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
        "from prep.manifest import StoreError\n"
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
    assert f"{broken}/val/00000, key 00000003, made of " in said and "cannot be decoded" in said
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
    assert f"key {key}, made of {source}:" in str(stopped.value) and "bytes of pixels" in str(stopped.value)


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
    assert ended.stderr.splitlines()[-1].startswith(f"prep.manifest.StoreError: {broken}/val/00000")
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
    records = list(shard.read(path))
    with train_loader(numbered, 6, seed=1) as first, train_loader(numbered, 6, seed=1) as second:
        found, reading = [], shard.read(path)
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


# ---- waits


def test_the_time_goes_to_waiting_or_holding(numbered: Path) -> None:
    with train_loader(numbered, 6) as loader:
        began = time.perf_counter()
        for _ in take(loader, 20):
            pass
        waits, elapsed = loader.waits(), time.perf_counter() - began
        assert waits.batches == 20 and waits.waited_s > 0 and waits.held_s >= 0
        assert waits.waited_s + waits.held_s == pytest.approx(elapsed, rel=0.1, abs=0.02)
        assert loader.waits().batches == 0


def test_a_slow_consumer_holds_the_loader(numbered: Path) -> None:
    with train_loader(numbered, 2) as loader:
        began = time.perf_counter()
        for _ in itertools.islice(loader, 5):
            time.sleep(0.1)
        waits, elapsed = loader.waits(), time.perf_counter() - began
        assert waits.batches == 5
        assert 0.5 <= waits.held_s <= elapsed
        assert waits.waited_s + waits.held_s == pytest.approx(elapsed, rel=0.1, abs=0.02)
        began = time.perf_counter()
        take(loader, 3)
        waits, elapsed = loader.waits(), time.perf_counter() - began
        assert waits.batches == 3 and waits.waited_s + waits.held_s == pytest.approx(elapsed, rel=0.1, abs=0.02)


def test_an_evaluation_counts_its_batches(numbered: Path) -> None:
    with eval_loader(numbered, 10) as loader:
        list(loader)
        list(loader)
        assert loader.waits().batches == 6


# ---- refusals


def test_a_batch_larger_than_the_split_is_refused_with_both_numbers(numbered: Path) -> None:
    with pytest.raises(UserError, match=r"37 records in train, a batch takes 64.*at most 37"):
        train_loader(numbered, 64)
    with pytest.raises(UserError, match=r"37 records in train, a batch takes 20, 2 of them 40.*at most 18"):
        train_loader(numbered, 20, world_size=2)


@pytest.mark.parametrize("make", [train_loader, eval_loader])
@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"shard": 1}, {"shard": -1}, {"shard": 2, "world_size": 2}])
def test_a_batch_or_shard_that_cannot_be_is_refused(numbered: Path, make, wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        make(numbered, **{"batch_size": 4, **wrong})


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(numbered: Path, seed: int) -> None:
    with pytest.raises(UserError, match="seed"):
        train_loader(numbered, 4, seed=seed)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UserError, match="device"):
        Placement.of(device)


def test_views_are_one_or_ten(numbered: Path) -> None:
    with pytest.raises(UserError, match="views 5"):
        eval_loader(numbered, views=5)


def test_a_split_that_is_not_there_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match="no split test"):
        eval_loader(stores["jpeg"], split="test")

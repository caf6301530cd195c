"""What the loaders serve: every image of an evaluation once, epochs, worlds of loaders; waits, and what is refused."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.loader import Batch, eval_loader, train_loader
from pipeline.placement import Placement
from pipeline.sampling import epoch_permutation
from prep.console import UserError
from prep.store.manifest import StoreError
from tests.conftest import RECORDS, VAL
from tests.helpers.streaming import joined, labels_in_store, labels_of, same, take

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
            order = [stored[number] for number in epoch_permutation(RECORDS, 6, epoch)]
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


# ---- waits


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The loaders' clock, in seconds: it stands still until a test moves it."""
    now = [1000.0]
    monkeypatch.setattr("pipeline.loader_base.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_the_time_goes_to_waiting_or_holding(
    numbered: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each batch takes 3 s to come, and its consumer 5 s."""
    with train_loader(numbered, 6) as loader:

        def slowly(serve: Callable[[], object] = loader._prefetcher.next) -> object:
            clock[0] += 3
            return serve()

        monkeypatch.setattr(loader._prefetcher, "next", slowly)
        for _ in itertools.islice((batch for _ in itertools.count() for batch in loader), 20):
            clock[0] += 5
        assert loader.wait_times() == (20, 60, 100)
        assert loader.wait_times() == (0, 0, 0)
        clock[0] += 7
        take(loader, 2)
        assert loader.wait_times() == (2, 6, 7)


def test_a_slow_consumer_holds_the_loader(numbered: Path) -> None:
    """By the real clock: never more than the time that went by."""
    with train_loader(numbered, 2) as loader:
        began = time.perf_counter()
        for _ in itertools.islice(loader, 5):
            time.sleep(0.1)
        waits = loader.wait_times()
        assert waits.batches == 5 and waits.consumer_wait_s > 0 and waits.loader_wait_s >= 0.5
        assert waits.consumer_wait_s + waits.loader_wait_s <= time.perf_counter() - began


def test_an_evaluation_counts_its_batches(numbered: Path) -> None:
    with eval_loader(numbered, 10) as loader:
        list(loader)
        list(loader)
        assert loader.wait_times().batches == 6


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
        Placement.parse(device)


def test_views_are_one_or_ten(numbered: Path) -> None:
    with pytest.raises(UserError, match="views 5"):
        eval_loader(numbered, views=5)


def test_a_split_that_is_not_there_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match="no split test"):
        eval_loader(stores["jpeg"], split="test")

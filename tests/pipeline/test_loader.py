"""Loaders: evaluation passes, epochs, several ranks, wait times, and arguments that are refused."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.device import Placement
from pipeline.loader import Batch, eval_loader, train_loader
from pipeline.sampling import epoch_permutation
from prep.console import UserError
from prep.store.manifest import StoreError
from tests.conftest import TRAIN_RECORDS, VAL_RECORDS
from tests.pipeline.streaming import batches_equal, concatenate_ranks, labels_by_batch, stored_labels, take_batches

# ---- evaluation


@pytest.mark.parametrize("batch_size", [1, 7, VAL_RECORDS, VAL_RECORDS + 5])
@pytest.mark.parametrize("views", [1, 10])
def test_an_evaluation_serves_every_image_once_in_each_pass(numbered_store: Path, batch_size: int, views: int) -> None:
    with eval_loader(numbered_store, batch_size, views=views) as loader:
        for _ in range(3 if views == 1 else 2):
            batches = list(loader)
            assert [len(batch.labels) for batch in batches[:-1]] == [batch_size] * (len(loader) - 1)
            assert [label for batch in batches for label in batch.labels.tolist()] == stored_labels(
                numbered_store, "val"
            )
            for batch in batches:
                expected = (len(batch.labels), 10, 3, 224, 224) if views == 10 else (len(batch.labels), 3, 224, 224)
                assert tuple(batch.images.shape) == expected
                assert batch.images.dtype == torch.float32 and batch.labels.dtype == torch.int64


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize("batches_taken", [0, 1, 2, 5, 8])
def test_a_pass_that_is_not_finished_does_not_shift_the_next(
    numbered_store: Path, views: int, batches_taken: int
) -> None:
    with eval_loader(numbered_store, 3, views=views) as loader:
        for _ in range(3):
            part = list(itertools.islice(loader, batches_taken))
            assert len(part) == batches_taken
        whole = list(loader)
        assert [label for batch in whole for label in batch.labels.tolist()] == stored_labels(numbered_store, "val")
        assert batches_equal(part, whole[:batches_taken])


@pytest.mark.timeout(60)
def test_two_iterators_over_one_evaluation_loader_may_take_turns(numbered_store: Path) -> None:
    with eval_loader(numbered_store, 3) as loader:
        expected = [batch.labels.tolist() for batch in loader]
        first, second = iter(loader), iter(loader)
        turns = [first] * 5 + [second] * 2 + [first, second, first]
        served: dict[int, list[list[int]]] = {id(first): [], id(second): []}
        for iterator in turns:
            served[id(iterator)].append(next(iterator).labels.tolist())
        assert served[id(first)] == expected[:7] and served[id(second)] == expected[:3]
        assert [batch.labels.tolist() for batch in second] == expected[3:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5, VAL_RECORDS, 30])
@pytest.mark.parametrize("batch_size", [4, VAL_RECORDS + 5])
def test_several_ranks_together_evaluate_every_image_once(
    numbered_store: Path, world_size: int, batch_size: int
) -> None:
    with eval_loader(numbered_store, VAL_RECORDS) as loader:
        expected = next(iter(loader))
    images, labels, sizes, lengths = [], [], [], set()
    for rank in range(world_size):
        with eval_loader(numbered_store, batch_size, shard=rank, world_size=world_size, threads=1) as loader:
            for _ in range(2):
                batches = list(loader)
                assert len(batches) == len(loader)
        images += [batch.images for batch in batches]
        labels += [batch.labels for batch in batches]
        sizes.append(sum(len(batch.labels) for batch in batches))
        lengths.add(len(batches))
        assert all(0 < len(batch.labels) <= batch_size for batch in batches)
    assert torch.equal(torch.cat(labels), expected.labels) and torch.equal(torch.cat(images), expected.images)
    assert max(sizes) - min(sizes) <= 1
    assert len(lengths) == 1 or world_size > VAL_RECORDS


# ---- epochs


@pytest.mark.parametrize(("batch_size", "world_size"), [(10, 1), (37, 1), (4, 3), (1, 1)])
def test_an_epoch_has_full_batches_of_distinct_records_in_the_order_of_its_permutation(
    numbered_store: Path, batch_size: int, world_size: int
) -> None:
    stored = stored_labels(numbered_store, "train")
    step = batch_size * world_size
    with train_loader(numbered_store, batch_size, seed=6, world_size=world_size, shard=world_size - 1) as loader:
        assert len(loader) == TRAIN_RECORDS // step and loader.left_out == TRAIN_RECORDS % step
        for epoch in range(2):
            assert loader.epoch == epoch
            order = [stored[number] for number in epoch_permutation(TRAIN_RECORDS, 6, epoch)]
            ends = [step * (k + 1) for k in range(TRAIN_RECORDS // step)]
            assert labels_by_batch(loader) == [order[end - batch_size : end] for end in ends]


def test_the_permutation_of_an_epoch_is_computed_once(numbered_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of an epoch, several threads read batches of two epochs at the same time."""
    computed = []

    def permutation(records: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
        computed.append(epoch)
        time.sleep(0.05)  # meanwhile, other threads ask for the same epoch
        return epoch_permutation(records, seed, epoch)

    monkeypatch.setattr("pipeline.sampling.epoch_permutation", permutation)
    with train_loader(numbered_store, 4) as loader:
        take_batches(loader, 4 * len(loader))
    assert len(computed) == len(set(computed)) and set(computed) >= {0, 1, 2, 3}


def test_no_record_is_served_twice_in_an_epoch_and_all_are_served_within_twelve_epochs(numbered_store: Path) -> None:
    with train_loader(numbered_store, 10) as loader:
        epochs = [[label for batch in labels_by_batch(loader) for label in batch] for _ in range(12)]
    assert all(len(set(epoch)) == len(epoch) == TRAIN_RECORDS - loader.left_out == 30 for epoch in epochs)
    counts = Counter(itertools.chain(*epochs))
    assert len(counts) == TRAIN_RECORDS and min(counts.values()) >= 5
    assert len({tuple(epoch) for epoch in epochs}) == 12


def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(numbered_store: Path) -> None:
    def first(seed: int, threads: int) -> list[Batch]:
        with train_loader(numbered_store, 12, seed=seed, threads=threads) as loader:
            return take_batches(loader, 5)

    one = first(5, 1)
    for threads in (1, 2, 4):
        assert batches_equal(one, first(5, threads))
    other = first(6, 1)
    assert not any(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


# ---- ranks


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 4), (3, 5), (3, 12)])
@pytest.mark.parametrize("shared_by", [1, 3])
def test_several_ranks_serve_what_one_loader_with_their_total_batch_size_serves(
    numbered_store: Path, world_size: int, batch_size: int, shared_by: int
) -> None:
    augmentation = Augmentation(shared_by=shared_by)
    with train_loader(numbered_store, world_size * batch_size, seed=8, augmentation=augmentation) as loader:
        expected = take_batches(loader, 5)
        left_out = loader.left_out
    ranks = []
    for rank in range(world_size):
        with train_loader(
            numbered_store, batch_size, seed=8, augmentation=augmentation, shard=rank, world_size=world_size, threads=1
        ) as loader:
            ranks.append(take_batches(loader, 5))
            assert loader.left_out == left_out
    assert batches_equal(concatenate_ranks(ranks), expected)


# ---- wait times


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that replaces the clock of the loaders. The clock counts seconds. Only the test advances the clock."""
    now = [1000.0]
    monkeypatch.setattr("pipeline.loader_base.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_wait_times_of_consumer_and_loader_add_up_to_the_time_that_passed(
    numbered_store: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader takes 3 s for each batch, and the consumer takes 5 s."""
    with train_loader(numbered_store, 6) as loader:

        def take_3_s(number: int, get: Callable[[int], object] = loader._prefetcher.get) -> object:
            clock[0] += 3
            return get(number)

        monkeypatch.setattr(loader._prefetcher, "get", take_3_s)
        for _ in itertools.islice((batch for _ in itertools.count() for batch in loader), 20):
            clock[0] += 5
        assert loader.wait_times() == (20, 60, 100)
        assert loader.wait_times() == (0, 0, 0)
        clock[0] += 7
        take_batches(loader, 2)
        assert loader.wait_times() == (2, 6, 7)


def test_the_loader_waits_for_a_slow_consumer(numbered_store: Path) -> None:
    """The test uses the real clock. The wait times of loader and consumer add up to at most the elapsed time."""
    with train_loader(numbered_store, 2) as loader:
        began = time.perf_counter()
        for _ in itertools.islice(loader, 5):
            time.sleep(0.1)
        waits = loader.wait_times()
        assert waits.batches == 5 and waits.consumer_wait_s > 0 and waits.loader_wait_s >= 0.5
        assert waits.consumer_wait_s + waits.loader_wait_s <= time.perf_counter() - began


def test_wait_times_count_the_batches_of_an_evaluation(numbered_store: Path) -> None:
    with eval_loader(numbered_store, 10) as loader:
        list(loader)
        list(loader)
        assert loader.wait_times().batches == 6


# ---- refusals


def test_a_batch_larger_than_the_split_is_refused_with_both_numbers(numbered_store: Path) -> None:
    with pytest.raises(UserError, match=r"37 records in train, a batch takes 64.*at most 37"):
        train_loader(numbered_store, 64)
    with pytest.raises(
        UserError, match=r"37 records in train, a batch takes 20, a step of 2 ranks takes 40.*at most 18"
    ):
        train_loader(numbered_store, 20, world_size=2)


@pytest.mark.parametrize("make", [train_loader, eval_loader])
@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"shard": 1}, {"shard": -1}, {"shard": 2, "world_size": 2}])
def test_a_batch_size_or_rank_out_of_range_is_refused(numbered_store: Path, make, arguments: dict[str, int]) -> None:
    with pytest.raises(UserError, match="expected"):
        make(numbered_store, **{"batch_size": 4, **arguments})


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(numbered_store: Path, seed: int) -> None:
    with pytest.raises(UserError, match="seed"):
        train_loader(numbered_store, 4, seed=seed)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UserError, match="device"):
        Placement.parse(device)


def test_a_number_of_views_other_than_one_or_ten_is_refused(numbered_store: Path) -> None:
    with pytest.raises(UserError, match="views 5"):
        eval_loader(numbered_store, views=5)


def test_a_split_that_the_store_lacks_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match="no split test"):
        eval_loader(stores["jpeg"], split="test")

"""Mixtures of stores: shares of the stores, record order, batches, states, damage, and stores that differ."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest

from pipeline import Augmentation, RecordDataset, train_loader
from pipeline.sampling import epoch_permutation, mixed_order
from pipeline.selection.fields import FIELDS
from pipeline.selection.mixture import Mixture, compare_stores
from prep.console import UserError, WrongArgument
from prep.store.manifest import Store, StoreError
from tests.pipeline.selection.conftest import RECORDS
from tests.pipeline.streaming import batches_equal, concatenate_ranks, take_batches


def pairs(stores: list[Path], *shares: float) -> list[tuple[str | Path, float]]:
    return list(zip(stores, shares, strict=True))


def test_an_epoch_takes_the_passes_of_each_store_in_turn() -> None:
    """The records of a store come in one permutation after another. A permutation may continue in the next epoch."""
    sizes, counts, epochs = (7, 100, 3), (20, 30, 60), 12
    orders = [mixed_order(sizes, counts, 5, epoch) for epoch in range(epochs)]
    first = 0
    for store, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        own = [order[(order >= first) & (order < first + size)] - first for order in orders]
        assert [len(part) for part in own] == [count] * epochs
        passes = [epoch_permutation(size, 5, number, store) for number in range(-(-epochs * count // size))]
        assert np.concatenate(own).tolist() == np.concatenate(passes)[: epochs * count].tolist()
        first += size
    assert np.array_equal(mixed_order(sizes, counts, 5, 3), orders[3])
    assert not np.array_equal(mixed_order(sizes, counts, 6, 3), orders[3])


def test_the_stores_of_an_epoch_are_in_random_order() -> None:
    """Chi-squared test over 400 epochs: each position of an epoch has a record of store 1 with probability 1/4."""
    of_store_1 = np.array([mixed_order((50, 50), (15, 5), 0, epoch) >= 50 for epoch in range(400)])
    chi2 = ((of_store_1.sum(0) - 100) ** 2 / (400 * 0.25 * 0.75)).sum() * (19 / 20)
    assert chi2 < 43.8  # 99.9 % quantile of chi-squared, 19 degrees of freedom


def test_two_stores_of_the_same_size_have_different_orders() -> None:
    order = mixed_order((64, 64), (64, 64), 1, 0)
    assert not np.array_equal(order[order < 64], order[order >= 64] - 64)


@pytest.mark.parametrize(
    ("shares", "counts"), [((1, 1), (9, 8)), ((12, 5), (12, 5)), ((0.5, 0.25), (11, 6)), ((1, 1e9), None)]
)
def test_shares_are_rounded_to_records_of_an_epoch(
    two: list[Path], shares: Any, counts: tuple[int, ...] | None
) -> None:
    """The largest remainder is rounded up: 17 · (2/3, 1/3) is (11.33, 5.67), which gives (11, 6)."""
    if counts is None:
        with pytest.raises(WrongArgument, match=r"share 1 of store .*: an epoch of 17 records takes no record of"):
            Mixture.open(pairs(two, *shares), "train")
    else:
        assert Mixture.open(pairs(two, *shares), "train").counts == counts


def test_batches_of_a_mixture_have_the_records_of_their_stores(two: list[Path]) -> None:
    """Without mean and noise, an image is a crop of its record, at the position that the field `draws` gives."""
    sets, plain = [RecordDataset(store) for store in two], Augmentation(mean="none", colour="off")
    mixed: dict[str, Any] = {
        "stores": pairs(two, 0.5, 0.25),
        "batch_size": 4,
        "fields": FIELDS,
        "augmentation": plain,
        "threads": 1,
    }
    places = []
    with train_loader(**mixed) as loader:
        assert (loader.records, len(loader), loader.left_out) == (17, 4, 1)
        for batch in (batch for _ in range(3) for batch in loader):
            assert batch["index"].shape == (4, 2)
            for k, (store, number) in enumerate(batch["index"].tolist()):
                record, draws = sets[store][number], batch["draws"]
                assert (record.label, record.source) == (int(batch["labels"][k]), batch["keys"][k])
                y, x = draws["offset"][k].tolist()
                crop = record.image[y : y + 224, x : x + 224]
                crop = crop[:, ::-1] if draws["flip"][k] else crop
                assert np.array_equal(batch["images"][k].numpy(), crop.transpose(2, 0, 1))
                places.append((0, 12)[store] + number)
        with pytest.raises(UserError, match=r"has no dataset\. Open one store: pipeline\.RecordDataset"):
            _ = loader.dataset
    orders = [mixed_order(RECORDS, (11, 6), 0, epoch)[:16] for epoch in range(3)]
    assert places == np.concatenate(orders).tolist()


def test_the_mean_of_a_mixture_is_that_of_its_first_store(two: list[Path]) -> None:
    with train_loader(stores=pairs(two, 1, 1), batch_size=1) as mixed, train_loader(two[0], 1) as first:
        assert mixed.channel_stats() == first.channel_stats() and mixed.classes == ("a", "b")


def test_a_mixture_resumes_bit_for_bit_with_another_number_of_ranks(two: list[Path]) -> None:
    stores = pairs(two, 1, 2)
    with train_loader(stores=stores, batch_size=6, seed=4, threads=1) as loader:
        take_batches(loader, 3)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = take_batches(loader, 5)
    assert [count for _, count in state["stores"]] == [6, 11]
    ranks = []
    for rank in range(2):
        with train_loader(stores=stores, batch_size=3, seed=4, threads=1, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(take_batches(loader, 5))
    assert batches_equal(concatenate_ranks(ranks), expected)
    for other in (pairs(two, 1, 1), pairs(two[:1], 1), pairs(two[::-1], 2, 1), pairs([*two, two[0]], 6, 11, 1)):
        with train_loader(stores=other, batch_size=6, seed=4, threads=1) as loader:
            with pytest.raises(UserError, match="stream state with another stores"):
                loader.load_state_dict(state)
    with train_loader(two[0], 6, seed=4, threads=1) as loader, pytest.raises(UserError, match="another stores"):
        loader.load_state_dict(state)


def test_a_damaged_record_is_named_with_its_store(two: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(two[1], tmp_path / "copy"))
    (folder,) = Store.open(copy).shard_paths("train")
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        key, value = list(txn.cursor())[2]
        txn.put(key, value[:9000] + bytes([value[9000] ^ 1]) + value[9001:])
    with train_loader(stores=pairs([two[0], copy], 1, 1), batch_size=1, check=True, threads=1) as loader:
        with pytest.raises(StoreError, match=rf"{copy}/train/00000, key 00000002, source .*verify --store {copy}"):
            list(loader)


def test_stores_that_differ_are_refused_with_the_first_difference(two: list[Path], store: Path) -> None:
    first = Store.open(two[0])
    settings = first.settings
    for other, message in (
        (replace(first, classes=("a", "c")), r"class 1 is 'b' in .*, and 'c' in .*\. All stores need the same classes"),
        (replace(first, classes=("a",)), r"class 1 is 'b' in .*, and missing in"),
        (
            replace(first, settings=replace(settings, side_px=288)),
            r"has a side of 256 px, .* has a side of 288 px\. All",
        ),
    ):
        with pytest.raises(WrongArgument, match=message):
            compare_stores(first, other)
    with pytest.raises(WrongArgument, match=r"has records of format ppm, .* has records of format jpeg\. All stores"):
        train_loader(stores=pairs([two[0], store], 1, 1), batch_size=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"store": "x"}, "stores with store: expected only one of these arguments. Leave out store or stores"),
        ({"subset": ["a"]}, "stores with subset"),
        ({"weights": "balanced"}, "stores with weights"),
        ({"service": "s"}, "stores with service"),
        ({"stores": []}, r"stores \[\]: expected at least one pair \(path, share\)"),
        ({"stores": [("x", 0)]}, "share 0 of store x: expected a finite number of more than 0"),
        ({"stores": [("x", float("inf"))]}, "share inf of store x"),
        ({"stores": None}, "no store: expected the folder of a store, or pairs"),
    ],
)
def test_arguments_that_a_mixture_does_not_allow_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongArgument, match=message):
        train_loader(**{"stores": [("x", 1.0)], **arguments})

"""Subsets and weights: records of an epoch, states, distribution of weighted draws, and refused values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import eval_loader, train_loader
from pipeline.sampling import epoch_permutation, weighted_draws
from pipeline.selection.subset import record_labels, record_weights, subset_numbers
from prep.console import UserError, WrongArgument
from prep.store.manifest import Store, StoreError
from tests.conftest import CLASSES, TRAIN_RECORDS
from tests.pipeline.streaming import batches_equal, concatenate_ranks, stored_labels, take_batches

INDEX: Any = ("index", "labels")
NUMBERS = [30, 2, 3, 5, 36, 7, 11, 13, 17, 19, 23, 29]


def epochs(store: Path, count: int, batch_size: int = 4, **options: Any) -> list[list[int]]:
    """Return the record numbers of the first `count` epochs."""
    with train_loader(store, batch_size, threads=1, fields=INDEX, **options) as loader:
        return [[n for batch in loader for n in batch["index"].tolist()] for _ in range(count)]


def test_the_labels_of_a_split_are_those_of_its_records(store: Path, numbered_store: Path) -> None:
    for folder, split in ((store, "train"), (store, "val"), (numbered_store, "train")):
        assert record_labels(Store.open(folder), split).tolist() == stored_labels(folder, split)


def test_an_epoch_of_a_subset_is_the_shuffle_of_its_records(numbered_store: Path) -> None:
    """Record k of an epoch is element P[k] of the sorted subset, where P is the result of epoch_permutation."""
    chosen = sorted(NUMBERS)
    expected = [[chosen[k] for k in epoch_permutation(12, 6, epoch)] for epoch in range(2)]
    mask = np.isin(np.arange(TRAIN_RECORDS), NUMBERS)
    for subset in (NUMBERS, np.array(NUMBERS, np.uint8), mask, mask.tolist()):
        assert epochs(numbered_store, 2, seed=6, subset=subset) == expected
    with train_loader(numbered_store, 5, subset=NUMBERS, threads=1) as loader:
        assert (loader.records, len(loader), loader.left_out, len(loader.dataset)) == (12, 2, 2, TRAIN_RECORDS)


@pytest.mark.parametrize("names", [CLASSES[1], [CLASSES[2], CLASSES[0]], np.array(CLASSES[:1])])
def test_class_names_choose_the_records_of_these_classes(store: Path, names: Any) -> None:
    """The labels stay indices into the classes of the store."""
    wanted = [names] if isinstance(names, str) else list(names)
    for split, make in (("train", train_loader), ("val", eval_loader)):
        labels = stored_labels(store, split)
        expected = [n for n, label in enumerate(labels) if CLASSES[label] in wanted]
        with make(store, 1, subset=names, fields=INDEX, threads=1) as loader:
            assert loader.classes == CLASSES and loader.records == len(expected)
            served = [(int(batch["index"]), int(batch["labels"])) for batch in loader]
        assert sorted(served) == [(n, labels[n]) for n in expected]
        assert split == "train" or served == sorted(served)


@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_ranks_serve_the_subset_in_the_order_of_the_store(numbered_store: Path, world_size: int) -> None:
    served, expected = [], sorted(NUMBERS[1:9:2])
    with eval_loader(numbered_store, 23, split="val", threads=1) as loader:
        images = next(iter(loader)).images
    for rank in range(world_size):
        with eval_loader(
            numbered_store, 3, subset=NUMBERS[1:9:2], shard=rank, world_size=world_size, fields=("index", "images")
        ) as loader:
            for batch in loader:
                served += batch["index"].tolist()
                assert batch["images"].equal(images[batch["index"]])
    assert served == expected


def test_a_subset_of_all_records_is_the_stream_without_subset(numbered_store: Path) -> None:
    with (
        train_loader(numbered_store, 10, threads=1) as plain,
        train_loader(numbered_store, 10, threads=1, subset=range(TRAIN_RECORDS)) as loader,
    ):
        assert loader.state_dict() == plain.state_dict()
        assert batches_equal(take_batches(loader, 4), take_batches(plain, 4))


SELECTIONS: list[dict[str, Any]] = [
    {"subset": NUMBERS},
    {"weights": "balanced", "subset": NUMBERS},
    {"weights": np.arange(TRAIN_RECORDS)},
]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda selection: "+".join(selection))
def test_a_state_resumes_with_the_same_selection_only(numbered_store: Path, selection: dict[str, Any]) -> None:
    with train_loader(numbered_store, 4, seed=3, threads=1, **selection) as loader:
        take_batches(loader, len(loader) + 1)
        state = json.loads(json.dumps(loader.state_dict()))
        expected = take_batches(loader, len(loader) + 2)
    ranks = []
    for rank in range(2):
        options: dict[str, Any] = {"seed": 3, "threads": 1, "shard": rank, "world_size": 2}
        with train_loader(numbered_store, 2, **options, **selection) as loader:
            loader.load_state_dict(state)
            ranks.append(take_batches(loader, len(expected)))
    assert batches_equal(concatenate_ranks(ranks), expected)
    others: list[dict[str, Any]] = [other for other in SELECTIONS if other is not selection]
    others += [{}, {"subset": NUMBERS[1:]}, {"weights": np.arange(TRAIN_RECORDS)[::-1]}]
    for other in others:
        with train_loader(numbered_store, 4, seed=3, threads=1, **other) as loader:
            with pytest.raises(UserError, match=r"another (subset|weights)"):
                loader.load_state_dict(state)
            with (
                pytest.raises(UserError, match=r"another (subset|weights)"),
                train_loader(numbered_store, 4, seed=3, threads=1, **selection) as first,
            ):
                first.load_state_dict(loader.state_dict())


def test_only_loaders_with_the_same_selection_share_a_stream_of_a_service(
    numbered_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[Any] = []

    def source(service: str, key: Any, *_: object) -> None:
        keys.append(key)
        raise UserError("no service")

    monkeypatch.setattr("pipeline.service.source.WindowSource", source)
    for selection in ({}, *SELECTIONS, *SELECTIONS, {"subset": NUMBERS[1:]}):
        with pytest.raises(UserError, match="no service"):
            train_loader(numbered_store, 4, service="s", **selection)
    for subset in (None, NUMBERS[1:9:2]):
        with pytest.raises(UserError, match="no service"):
            eval_loader(numbered_store, 4, service="s", subset=subset)
    assert keys[1:4] == keys[4:7] and len(set(keys)) == 7
    assert keys[0].records == keys[-2].records == "" and keys[7].records != keys[1].records != ""


# ---- weights


def test_weighted_draws_invert_the_cumulative_sum() -> None:
    """The expected draws are found by a linear search in Python. NumPy's Philox generator gives the uniform numbers."""
    weights = np.random.default_rng(4).random(50) ** 4
    weights[[0, 7, 49]] = 0
    weights /= weights.max()
    words = np.array([2**40 + 5, 3, 0], np.uint64).view(np.uint32).tolist()
    uniform = np.random.Generator(np.random.Philox(np.random.SeedSequence([12, *words]))).random(50)
    sums, total = [], 0.0
    for weight in weights.tolist():
        total += weight
        sums.append(total)
    expected = [next(i for i, c in enumerate(sums) if c > u * total) for u in uniform.tolist()]
    draws = weighted_draws(weights, 2**40 + 5, 3)
    assert draws.dtype == np.int64 and draws.tolist() == expected
    assert not np.array_equal(draws, weighted_draws(weights, 2**40 + 5, 4))


def test_records_are_drawn_in_proportion_to_their_weights() -> None:
    """Chi-squared over 300 epochs of 40 draws. Items of weight 0 are never drawn. Neighboring draws are independent."""
    weights = np.arange(40) % 8 / 7
    draws = np.array([weighted_draws(weights, 1, epoch) for epoch in range(300)])
    counts, expected = np.bincount(draws.ravel(), minlength=40), draws.size * weights / weights.sum()
    positive = weights > 0
    assert not counts[~positive].any()
    chi2 = ((counts - expected)[positive] ** 2 / expected[positive]).sum()
    assert chi2 < 65.3  # 99.9 % quantile of chi-squared, 34 degrees of freedom
    values = weights[draws]
    for first, second in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        correlation = np.corrcoef(first.ravel(), second.ravel())[0, 1]
        assert abs(correlation) < 3.3 / np.sqrt(first.size)


@pytest.mark.parametrize("subset", [None, [n for n in range(30) if n % 4]])
def test_balanced_weights_draw_each_class_equally_often(store: Path, subset: list[int] | None) -> None:
    opened, labels = Store.open(store), np.array(stored_labels(store, "train"))
    numbers = subset_numbers(opened, "train", subset)
    weights = record_weights(opened, "train", numbers, "balanced")
    own = labels if subset is None else labels[subset]
    counts = {label: int((own == label).sum()) for label in range(3)}
    assert weights is not None
    assert np.allclose(weights, [min(counts.values()) / counts[label] for label in own.tolist()])
    served = epochs(store, 1, 2, weights="balanced", subset=subset)[0]
    expected = weighted_draws(weights, 0, 0)
    assert served == (expected if subset is None else np.array(subset)[expected])[: len(served)].tolist()


def test_weights_are_given_for_all_records_and_used_for_the_subset(numbered_store: Path) -> None:
    weights = np.arange(TRAIN_RECORDS) ** 2.0
    served = epochs(numbered_store, 3, 3, seed=8, subset=NUMBERS, weights=weights)
    chosen = np.sort(NUMBERS)
    scaled = weights[chosen] / 36.0**2
    assert served == [chosen[weighted_draws(scaled, 8, epoch)].tolist() for epoch in range(3)]
    assert served == epochs(numbered_store, 3, 3, seed=8, subset=NUMBERS, weights=(weights * 4).tolist())


# ---- refusals


def test_class_names_and_balanced_weights_need_the_records(store: Path, tmp_path: Path) -> None:
    """With a service, the folder of a store may lack the shards.

    The loader then accepts a subset of record numbers, for which it reads no shard.
    """
    shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns("[0-9]*"))
    for selection in ({"subset": CLASSES[:1]}, {"weights": "balanced"}):
        with pytest.raises(StoreError, match="train/00000"):
            train_loader(tmp_path / "store", 4, service="s", **selection)
    opened = Store.open(tmp_path / "store")
    assert subset_numbers(opened, "train", [3, 1]).tolist() == [1, 3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"subset": ["n00000011", "n0000022"]}, r"has no class 'n0000022'\. Did you mean n00000022"),
        ({"subset": "cat"}, r"has no class 'cat'\. loader\.classes has the names"),
        ({"subset": [0, 30]}, r"record 30, split train has the records 0 to 29"),
        ({"subset": [-1, 3]}, r"record -1, split train has the records 0 to 29"),
        ({"subset": [4, 5, 4]}, r"record 4 is given twice\. To repeat records"),
        ({"subset": [True] * 29}, r"mask of 29 bools, split train has 30 records"),
        ({"subset": [False] * 30}, "subset selects no record of split train"),
        ({"subset": []}, "subset selects no record of split train"),
        ({"subset": [0.5]}, r"subset of float64 \(1,\): expected class names, record numbers, or a mask of 30 bools"),
        ({"subset": [[1], [2]]}, r"subset of int64 \(2, 1\)"),
        ({"subset": list(range(9)), "batch_size": 10}, "9 records in the subset of train, a batch takes 10"),
        ({"weights": "balance"}, "weights 'balance': expected balanced, or 30 numbers"),
        ({"weights": [1.0] * 29}, r"weights of shape \(29,\), split train has 30 records"),
        ({"weights": [1.0] * 29 + [-0.5]}, r"weight -0\.5 of record 29: expected a finite number of at least 0"),
        ({"weights": [1.0] * 29 + [float("nan")], "subset": [3, 29]}, "weight nan of record 29"),
        ({"weights": [1.0] * 29 + [0.0], "subset": [29]}, "all weights are 0"),
    ],
)
def test_a_wrong_subset_or_weight_is_refused(store: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_loader(store, **{"batch_size": 1, "threads": 1, **arguments})
    with pytest.raises(WrongArgument, match="subset selects no record of split val"):
        eval_loader(store, subset=[], threads=1)

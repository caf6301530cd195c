"""Loaders with several views of each record, for mixtures and weighted draws: batches, and states within an epoch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import Augmentation, RecordDataset, TrainLoader, train_loader
from pipeline.sampling import mixed_order, weighted_draws
from pipeline.selection.fields import FIELDS
from tests.pipeline.selection.conftest import RECORDS
from tests.pipeline.streaming import batches_equal, concatenate_ranks, take_batches

VIEWS, BATCH, SEED = 3, 4, 9
WEIGHTS = np.arange(RECORDS[0]) % 5 / 4


@pytest.fixture(params=["mixture", "weights"])
def selection(request: pytest.FixtureRequest, two: list[Path]) -> dict[str, Any]:
    """Arguments of train_loader: a mixture of the two stores, or the first store with weights."""
    if request.param == "mixture":
        return {"stores": [(two[0], 1.0), (two[1], 2.0)]}
    return {"store": two[0], "weights": WEIGHTS}


def load(selection: dict[str, Any], batch_size: int = BATCH, **options: Any) -> TrainLoader[Any]:
    return train_loader(batch_size=batch_size, seed=SEED, views=VIEWS, threads=1, **selection, **options)


def test_each_view_is_a_crop_of_the_selected_record(two: list[Path], selection: dict[str, Any]) -> None:
    """View v of record k in a batch is the crop at `offset[k, v]`, mirrored if `flip[k, v]` is 1."""
    sets, epochs = [RecordDataset(store) for store in two], 2
    if "stores" in selection:
        order = [mixed_order(RECORDS, (6, 11), SEED, epoch)[:16] for epoch in range(epochs)]
    else:
        order = [weighted_draws(WEIGHTS, SEED, epoch) for epoch in range(epochs)]
    expected = np.concatenate(order).tolist()
    served, positions = [], set()
    with load(selection, fields=FIELDS, augmentation=Augmentation(mean="none", colour="off")) as loader:
        for batch in (batch for _ in range(epochs) for batch in loader):
            assert batch["images"].shape == (BATCH, VIEWS, 3, 224, 224) and batch["labels"].shape == (BATCH,)
            for k, place in enumerate(batch["index"].tolist()):
                store, number = place if isinstance(place, list) else (0, place)
                record = sets[store][number]
                assert (record.label, record.source) == (int(batch["labels"][k]), batch["keys"][k])
                for v in range(VIEWS):
                    y, x = batch["draws"]["offset"][k, v].tolist()
                    crop = record.image[y : y + 224, x : x + 224]
                    crop = crop[:, ::-1] if batch["draws"]["flip"][k, v] else crop
                    assert np.array_equal(batch["images"][k, v].numpy(), crop.transpose(2, 0, 1))
                    positions.add((y, x))
                served.append((0, RECORDS[0])[store] + number)
    assert served == expected
    assert len(positions) > 0.9 * VIEWS * len(served)


@pytest.mark.parametrize("preset", ["alexnet", "resnet", "simclr"])
def test_a_state_within_an_epoch_resumes_with_another_number_of_ranks(selection: dict[str, Any], preset: str) -> None:
    settings = replace(Augmentation.preset(preset), size_px=64)
    with load(selection, augmentation=settings) as loader:
        take_batches(loader, len(loader) + 1)
        state = json.loads(json.dumps(loader.state_dict()))
        assert (state["epoch"], state["step"], state["views"]) == (1, 1, VIEWS)
        expected = take_batches(loader, len(loader))
    assert not torch.equal(expected[0].images[:, 0], expected[0].images[:, 1])
    ranks = []
    for rank in range(2):
        with load(selection, BATCH // 2, augmentation=settings, shard=rank, world_size=2) as loader:
            loader.load_state_dict(state)
            ranks.append(take_batches(loader, len(expected)))
    assert batches_equal(concatenate_ranks(ranks), expected)

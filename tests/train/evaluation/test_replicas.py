"""Tests of evaluation by several replicas: exact counts for any number of ranks, and probabilities in store order.

The ranks are threads, which exchange values over gloo as processes do. The tests with processes are in
tests/train/replicas/test_evaluate_command.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.loader import EvalLoader, eval_loader
from pipeline.records import Records
from prep.console import Progress
from prep.store.manifest import Store
from tests.helpers.small_training import SMALL_ALEXNET
from tests.train.replicas.ranks import run_ranks
from train.config.recipes import SHORT
from train.evaluation.evaluate import EvalResult, evaluate
from train.model.alexnet import AlexNet
from train.replicas.group import ALONE, ReplicaGroup


def evaluate_part(store: Path, group: ReplicaGroup, batch_size: int, views: int) -> tuple[EvalResult, np.ndarray]:
    """Evaluate one rank's share of the split val with a small random network.

    Returns the result for the whole split. On rank 0, also returns the probabilities of all images.
    """
    classes, generator = len(Store.open(store).classes), torch.Generator().manual_seed(4)
    network = AlexNet(classes, replace(SHORT, init="he"), ("cpu", "cpu"), SMALL_ALEXNET)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    with eval_loader(store, batch_size, views=views, shard=group.rank, world_size=group.size, threads=1) as loader:
        progress = Progress(loader.own_records, "images")
        rows = np.zeros((loader.own_records, classes), np.float32)
        result = evaluate(network, loader, progress, probabilities=rows, group=group)
        assert progress.done == loader.own_records
    return result, group.stack_on_first(rows)


@pytest.mark.parametrize(
    ("ranks", "views", "is_numbered"),
    [(2, 1, True), (5, 10, False), (14, 1, False)],
    ids=["uneven parts", "ten views", "ranks without images"],
)
def test_any_number_of_ranks_counts_every_image_once(
    numbered_store: Path, store: Path, monkeypatch: pytest.MonkeyPatch, ranks: int, views: int, is_numbered: bool
) -> None:
    opened = Store.open(numbered_store if is_numbered else store)
    records, images = Records(opened, "val"), opened.split("val").records  # 23 records (numbered_store), or 12 (store)
    alone, expected_rows = evaluate_part(opened.root, ALONE, 5, views)
    outcomes = run_ranks(monkeypatch, ranks, lambda group: evaluate_part(opened.root, group, 4, views))
    for rank, outcome in enumerate(outcomes):
        assert not isinstance(outcome, BaseException), outcome
        result, rows = outcome
        assert result == outcomes[0][0]  # all ranks have the same result, bit for bit
        assert result.misses == alone.misses and result.images == alone.images == images
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
        assert len(rows) == (0 if rank else images)
    assert 0 < alone.misses[0] < images and (0 < alone.misses[1] < alone.misses[0]) == is_numbered
    np.testing.assert_allclose(outcomes[0][1], expected_rows, rtol=1e-4, atol=1e-6)
    of_label = outcomes[0][1][np.arange(images), [records[k].label for k in range(images)]].astype(float)
    records.close()
    assert alone.loss == pytest.approx(-np.log(of_label).mean(), rel=1e-5)


def test_a_rank_that_serves_too_few_images_is_an_error_on_every_rank(
    numbered_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = EvalLoader.__iter__

    def skip_a_batch(self: EvalLoader) -> object:
        return (batch for k, batch in enumerate(serve(self)) if k or self.shard != 1)

    monkeypatch.setattr(EvalLoader, "__iter__", skip_a_batch)
    for outcome in run_ranks(monkeypatch, 2, lambda group: evaluate_part(numbered_store, group, 4, 1)):
        assert isinstance(outcome, RuntimeError) and "19 images were served, but the split has 23" in str(outcome)

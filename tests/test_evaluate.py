"""Error rates against a count by hand; ten views against an average of softmaxes; every image counted once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment import Augmentation
from pipeline.loader import EvalLoader, eval_loader
from prep.console import Progress
from train.architecture import ALEXNET, Widths
from train.evaluate import evaluate, wrong
from train.model import AlexNet
from train.recipes import SHORT

SMALL = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 12, 12))


def test_wrong_counts_misses_of_the_best_and_the_five_best() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    assert wrong(scores, torch.tensor([0, 2, 1])).tolist() == [2, 1]
    assert wrong(scores[:, :3], torch.tensor([0, 2, 1])).tolist() == [1, 0]  # fewer classes than five


@pytest.fixture(scope="module")
def model(stores: dict[str, Path]) -> AlexNet:
    torch.manual_seed(0)
    net = AlexNet(3, replace(SHORT, init="he"), ("cpu", "cpu"), SMALL)
    with torch.no_grad():
        net.fc8.weight.mul_(50)  # opinions strong enough for views to differ
    return net


@pytest.mark.parametrize("views", [1, 10])
def test_rates_equal_a_count_by_hand(stores: dict[str, Path], model: AlexNet, views: int) -> None:
    with eval_loader(stores["jpeg"], 3, views=views) as loader:
        report = Progress(loader.records, "images")
        found = evaluate(model, loader, report)
        assert model.training  # the mode it was in
        model.eval()
        misses, loss, images = 0, 0.0, 0
        for batch in loader:
            for pictures, label in zip(*batch, strict=True):
                with torch.no_grad():
                    logits = model(pictures.reshape(views, 3, 224, 224)).double().numpy()
                p = np.exp(logits - logits.max(1, keepdims=True))
                p = (p / p.sum(1, keepdims=True)).mean(0)
                misses += p.argmax() != label
                loss -= np.log(p[label])
                images += 1
        model.train()
    assert images == found.images == report.done == loader.records
    assert found.top1_error == misses / images
    assert found.top5_error == 0
    assert found.loss == pytest.approx(loss / images, rel=1e-4)


def test_windows_of_a_square_average_their_softmax(stores: dict[str, Path], model: AlexNet) -> None:
    """256 px give 2 × 2 windows; the batches, of 5, 5 and 2, are not the count of the windows."""
    with eval_loader(stores["jpeg"], 5, views="square", augmentation=Augmentation(mean="image")) as loader:
        found = evaluate(model, loader, Progress(loader.records, "images"))
        with torch.no_grad():
            maps = [(model.eval().dense(images).double(), labels) for images, labels in loader]
    model.train()
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*maps, strict=True))  # (12, 3, 2, 2)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p.mean((2, 3))
    assert logits.shape == (12, 3, 2, 2) and np.abs(logits - logits[:, :, :1, :1]).max() > 0.01
    assert found.images == 12 and found.top1_error == (p.argmax(1) != labels).mean()
    assert found.loss == pytest.approx(-np.log(p[np.arange(12), labels]).mean(), rel=1e-4)


def test_a_loader_that_serves_too_few_images_is_caught(
    stores: dict[str, Path], model: AlexNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = EvalLoader.__iter__
    monkeypatch.setattr(EvalLoader, "__iter__", lambda self: (batch for k, batch in enumerate(serve(self)) if k))
    with eval_loader(stores["jpeg"], 2) as loader, pytest.raises(RuntimeError, match="images were served"):
        evaluate(model, loader, Progress(1, "images"))

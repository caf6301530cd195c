"""Tests of the evaluation: error rates, results for several views, and confidence intervals.

The expected values come from a plain count, an average of softmaxes, and SciPy.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

from pipeline.augment import Augmentation
from pipeline.loader import EvalLoader, eval_loader
from prep.console import Progress
from train.config.architecture import ALEXNET, Widths
from train.config.recipes import SHORT
from train.evaluation.evaluate import (
    EvalResult,
    average_probabilities,
    error_rates,
    evaluate,
    top_k_misses,
    wilson_interval,
)
from train.model.alexnet import AlexNet

SMALL = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 12, 12))


def test_top_k_misses_counts_labels_outside_the_top_one_and_the_top_five() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3], [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]])
    assert top_k_misses(scores, torch.tensor([0, 2, 1])).tolist() == [2, 1]
    # With three classes, every label is among the top five, so there are no top-5 misses.
    assert top_k_misses(scores[:, :3], torch.tensor([0, 2, 1])).tolist() == [1, 0]


def test_of_equal_scores_the_lower_class_ranks_higher_and_nan_is_a_miss() -> None:
    """torch.topk orders equal scores arbitrarily, so the error rates of a network with constant outputs would vary."""
    labels = torch.tensor([0, 1, 4, 5, 9])
    assert top_k_misses(torch.zeros(5, 10), labels).tolist() == [4, 2]
    assert top_k_misses(torch.full((5, 10), torch.nan), labels).tolist() == [5, 5]
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 4, (300, 9)), rng.integers(0, 9, 300)
    order = np.argsort(-scores, axis=1, kind="stable")
    expected = [(order[:, :k] != labels[:, None]).all(1).sum() for k in (1, 5)]
    assert top_k_misses(torch.from_numpy(scores).float(), torch.from_numpy(labels)).tolist() == expected


@pytest.fixture(scope="module")
def network() -> AlexNet:
    """A small random network whose predictions differ between views."""
    torch.manual_seed(0)
    network = AlexNet(3, replace(SHORT, init="he"), ("cpu", "cpu"), SMALL)
    with torch.no_grad():
        network.fc8.weight.mul_(50)
    return network


@pytest.mark.parametrize("views", [1, 10])
def test_error_rates_and_loss_equal_a_plain_count(stores: dict[str, Path], network: AlexNet, views: int) -> None:
    with eval_loader(stores["jpeg"], 3, views=views) as loader:
        progress = Progress(loader.records, "images")
        probabilities = np.zeros((loader.records, 3), np.float32)
        result = evaluate(network, loader, progress, probabilities=probabilities)
        assert network.training  # evaluate() restores the training mode
        network.eval()
        misses, loss, images, by_hand = 0, 0.0, 0, []
        for batch in loader:
            for crops, label in zip(*batch, strict=True):
                with torch.no_grad():
                    logits = network(crops.reshape(views, 3, 224, 224)).double().numpy()
                p = np.exp(logits - logits.max(1, keepdims=True))
                p = (p / p.sum(1, keepdims=True)).mean(0)
                by_hand.append(p)
                misses += p.argmax() != label
                loss -= np.log(p[label])
                images += 1
        network.train()
    assert images == result.images == progress.done == loader.records
    assert result.top1_error == misses / images
    assert result.top5_error == 0
    assert result.loss == pytest.approx(loss / images, rel=1e-4)
    assert result.misses == (misses, 0)
    np.testing.assert_allclose(probabilities, by_hand, atol=1e-5)


def test_dense_evaluation_averages_the_softmax_over_the_windows_of_a_square(
    stores: dict[str, Path], network: AlexNet
) -> None:
    """A square of 256 px has 4 windows. The batches have 5, 5 and 2 images, so that no batch has 4 images."""
    with eval_loader(stores["jpeg"], 5, views="square", augmentation=Augmentation(mean="image")) as loader:
        result = evaluate(network, loader, Progress(loader.records, "images"))
        with torch.no_grad():
            maps = [(network.eval().dense(images).double(), labels) for images, labels in loader]
    network.train()
    # `logits` has the shape (12, 3, 2, 2): images, classes, rows and columns of windows.
    logits, labels = (torch.cat(parts).numpy() for parts in zip(*maps, strict=True))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    p = p.mean((2, 3))
    assert logits.shape == (12, 3, 2, 2) and np.abs(logits - logits[:, :, :1, :1]).max() > 0.01
    assert result.images == 12 and result.top1_error == (p.argmax(1) != labels).mean()
    assert result.loss == pytest.approx(-np.log(p[np.arange(12), labels]).mean(), rel=1e-4)


def test_a_loader_that_serves_too_few_images_is_an_error(
    stores: dict[str, Path], network: AlexNet, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve = EvalLoader.__iter__
    monkeypatch.setattr(EvalLoader, "__iter__", lambda self: (batch for k, batch in enumerate(serve(self)) if k))
    with eval_loader(stores["jpeg"], 2) as loader, pytest.raises(RuntimeError, match="images were served"):
        evaluate(network, loader, Progress(1, "images"))


@pytest.mark.parametrize(("misses", "images"), [(0, 12), (1, 12), (34, 297), (21_345, 50_000), (7, 7)])
def test_intervals_equal_scipys(misses: int, images: int) -> None:
    expected = binomtest(misses, images).proportion_ci(0.95, method="wilson")
    assert wilson_interval(misses, images) == pytest.approx(tuple(expected), abs=1e-12)
    result = EvalResult(misses / images, 0.0, 0.0, images)
    assert result.misses == (misses, 0) and result.intervals[0] == wilson_interval(misses, images)


def test_error_rates_of_a_weighted_average_of_probabilities() -> None:
    first = np.array([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], np.float32)
    second = np.array([[0.2, 0.8], [0.1, 0.9], [0.3, 0.7]], np.float32)
    labels = np.array([0, 0, 1])
    np.testing.assert_allclose(average_probabilities([first, second]), (first.astype(float) + second) / 2)
    weighted = average_probabilities([first, second], [6.0, 2.0])
    np.testing.assert_allclose(weighted, 0.75 * first.astype(float) + 0.25 * second)
    assert error_rates(average_probabilities([first, second]), labels).misses == (1, 0)
    result = error_rates(weighted, labels)
    assert result.misses == (1, 0) and result.images == 3  # the label of the second image has only probability 0.475
    assert result.loss == pytest.approx(-np.log([0.725, 0.475, 0.775]).mean(), rel=1e-6)


def test_the_loss_of_a_probability_of_zero_is_finite() -> None:
    assert np.isfinite(error_rates(np.array([[0.0, 1.0]]), np.array([0])).loss)

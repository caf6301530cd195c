"""Captured activations are compared with results of torch functions. Also tests the command `features`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.loader import eval_loader
from prep.console import UserError
from prep.store.manifest import Store
from tests.helpers.alextrain import json_lines, refusal
from train.evaluation.features import compute_activations
from train.model.alexnet import AlexNet
from train.runs.loading import load_trained


@pytest.fixture(scope="module")
def network(small_run: Path) -> AlexNet:
    return load_trained(small_run, ("cpu", "cpu")).network.eval()


@pytest.fixture(scope="module")
def images(store: Path) -> torch.Tensor:
    with eval_loader(store, 12, threads=1) as loader:
        return next(iter(loader)).images


def test_activations_equal_those_of_one_network_without_columns(network: AlexNet, images: torch.Tensor) -> None:
    """The test computes the expected outputs of conv1 and the fully connected layers from the joined parameters."""
    actual = compute_activations(network, images, ("conv1", "conv5", "fc6", "fc7", "fc8"))
    p = network.joined_tensors()
    with torch.no_grad():
        padded = F.pad(images / network.recipe.input_divisor, (0, 3, 0, 3))
        conv1 = F.conv2d(padded, p["conv1.weight"], p["conv1.bias"], stride=4).relu()
        pooled = F.max_pool2d(actual["conv5"], 3, 2).flatten(1)
        fc6 = F.linear(pooled, p["fc6.weight"], p["fc6.bias"]).relu()
        fc7 = F.linear(fc6, p["fc7.weight"], p["fc7.bias"]).relu()
        torch.testing.assert_close(actual["conv1"], conv1, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual["fc6"], fc6, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual["fc7"], fc7, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(actual["fc8"], network(images))
    assert actual["conv5"].shape == (12, 8, 13, 13) and not network.training
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(UserError, match="--layer fc9: expected one of conv1"):
        compute_activations(network, images, ["fc9"])


def test_features_are_written_with_key_class_and_source_of_every_row(
    small_run: Path, store: Path, network: AlexNet, images: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "fc7.npy"
    (answer,) = json_lines("features", small_run, "--layer", "fc7", "--store", store, "--split", "val", "--out", out)
    written = np.load(out)
    assert answer["shape"] == [12, 16] and written.dtype == np.float32
    expected = compute_activations(network, images, ["fc7"])["fc7"]
    np.testing.assert_allclose(written, expected, rtol=1e-5, atol=1e-5)
    lines = [line.split("\t") for line in (tmp_path / "fc7.keys.txt").read_text().splitlines()]
    assert [key for key, *_ in lines] == [f"{k:08d}" for k in range(12)]
    assert {name for _, name, _ in lines} <= set(Store.open(store).classes)
    assert len({source for *_, source in lines}) == 12


def test_features_in_another_format_are_refused(small_run: Path, store: Path, tmp_path: Path) -> None:
    assert "a.npy" in refusal("features", small_run, "--store", store, "--out", tmp_path / "a.txt", code=2)

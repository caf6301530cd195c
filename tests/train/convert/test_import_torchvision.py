"""Imported weights of torchvision give the outputs of torchvision's network, and wrong files are refused.

tests/helpers/torchvision_alexnet.py defines torchvision's network.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.loader import train_loader
from prep.console import UserError
from prep.store.manifest import Store
from tests.helpers.alextrain import json_lines, refusal
from tests.helpers.small_networks import MODERN_SCALED_AT_TEST_TIME, SMALL, WIDTHS, MakeRun, are_close, eval_images
from tests.helpers.torchvision_alexnet import torchvision_alexnet, torchvision_forward
from train.config.recipe import Recipe
from train.config.recipes import MODERN
from train.config.run_config import RunConfig
from train.convert.import_torchvision import import_torchvision
from train.convert.torchvision_weights import IMAGENET_NORMALIZATION, from_torchvision_weights
from train.model.alexnet import AlexNet
from train.runs.loading import load_trained


@pytest.fixture
def torchvision_net() -> torch.nn.Module:
    torch.manual_seed(8)
    return torchvision_alexnet(WIDTHS, 3).eval()


@pytest.fixture
def weights(torchvision_net: torch.nn.Module, tmp_path: Path) -> Path:
    """A file in the format of torchvision's published weights, which is a plain state_dict."""
    torch.save(torchvision_net.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Compute torchvision.transforms.Normalize with the values that all weights of torchvision expect."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("recipe", [MODERN, MODERN_SCALED_AT_TEST_TIME, replace(MODERN, input_divisor=1.0)])
def test_imported_weights_give_the_same_outputs_if_the_means_are_equal(
    torchvision_net: torch.nn.Module, store: Path, recipe: Recipe
) -> None:
    pixels, mean = eval_images(store, "none"), 255 * np.array([0.485, 0.456, 0.406])
    ours = AlexNet(3, recipe, ("cpu", "cpu"), SMALL["torchvision"]).eval()
    ours.load_joined_tensors(
        from_torchvision_weights(torchvision_net.state_dict(), recipe, IMAGENET_NORMALIZATION, mean)
    )
    with torch.no_grad():
        actual = ours(pixels - torch.tensor(mean, dtype=torch.float32)[:, None, None])
        assert are_close(actual, torchvision_forward(torchvision_net, normalize(pixels)), 1e-5)


def test_an_imported_run_differs_only_at_the_border_and_can_be_evaluated(
    torchvision_net: torch.nn.Module, weights: Path, store: Path, tmp_path: Path
) -> None:
    """The outputs of conv1 are equal at the inner 53 × 53 of the 55 × 55 positions.

    The padding differs: the imported network pads with the mean of the store, torchvision's network with the mean of
    ImageNet.
    """
    json_lines("import", weights, "--store", store, "--run-dir", tmp_path / "run", "--batch", 8)
    network, state = load_trained(tmp_path / "run", ("cpu", "cpu"))
    assert state.step == 0 and network.recipe == MODERN
    conv1, pixels = network.columns[0].conv1, eval_images(store, "none")
    with torch.no_grad():
        expected = torchvision_net.features[0](normalize(pixels))
        actual = conv1(F.pad(eval_images(store, "channel") / 64, (2, 2, 2, 2)))
        assert torch.allclose(actual[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], atol=2e-5)
        mean = torch.tensor(Store.open(store).color_stats().mean_rgb, dtype=torch.float32)[:, None, None]
        filled = F.pad(pixels - mean, (2, 2, 2, 2)) + mean
        assert torch.allclose(
            actual, F.conv2d(normalize(filled), *torchvision_net.features[0].parameters(), stride=4), atol=2e-5
        )
        assert (actual - expected).abs().max() > 0.01  # the mean of this store is far from the mean of ImageNet
    (result,) = json_lines("evaluate", tmp_path / "run", "--store", store, "--views", "dense")
    assert result["images"] == 12 and result["views"] == "dense"


def test_an_imported_run_can_be_trained_further(weights: Path, store: Path, tmp_path: Path) -> None:
    """`alextrain run` continues the imported run. The first loss is the loss of the imported network."""
    args = ["--store", store, "--run-dir", tmp_path / "run", "--batch", 8, "--seed", 3, "--set", "dropout=0"]
    args += ["--set", "label_smoothing=0.1"]
    json_lines("import", weights, *args, "--set", "lr=0.001")
    network, _ = load_trained(tmp_path / "run", ("cpu", "cpu"))
    run_args = [*args, "--set", "lr=0.001", "--model", "torchvision", "--recipe", "modern"]
    (result,) = json_lines("run", *run_args, "--gpus", "cpu", "--steps", 1, "--log-every", 1)
    with train_loader(store, 8, seed=3, augmentation=MODERN.augmentation.for_stream()) as loader, torch.no_grad():
        images, labels = next(iter(loader))
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
    assert result["train"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert "already holds a run" in refusal("import", weights, *args)


def test_exported_weights_are_the_same_after_import(make_run: MakeRun, store: Path, tmp_path: Path) -> None:
    """The test compares all weights. Then the test changes the classes in the file, and the import refuses the file."""
    run_dir, network = make_run(SMALL["torchvision"], MODERN_SCALED_AT_TEST_TIME)
    out = tmp_path / "net.pth"
    json_lines("export", run_dir, "--to", "torchvision", "--out", out)
    config = RunConfig(store, network.recipe, 8, model=SMALL["torchvision"], run_dir=tmp_path / "again")
    again = import_torchvision(out, config).joined_tensors()
    for name, tensor in network.joined_tensors().items():
        assert torch.allclose(again[name], tensor, rtol=1e-5, atol=1e-6), name
    state = torch.load(out, weights_only=True)
    state._metadata[""]["classes"] = json.dumps(["a", "b", "c"])
    torch.save(state, out)
    with pytest.raises(UserError, match=r"3 classes \(a …\).*--new-fc8"):
        import_torchvision(out, replace(config, run_dir=tmp_path / "third"))


def test_transposed_weights_are_imported(
    weights: Path, torchvision_net: torch.nn.Module, store: Path, tmp_path: Path
) -> None:
    """If a program transposes weights before it saves them, torch.save stores the strides of the transposed view."""
    state = torch.load(weights, weights_only=True)
    for name in ("features.0.weight", "classifier.1.weight"):
        state[name] = state[name].transpose(0, -1).contiguous().transpose(0, -1)
    torch.save(state, weights)
    config = RunConfig(store, MODERN, 8, model=SMALL["torchvision"], run_dir=tmp_path / "run")
    network = import_torchvision(weights, config)
    assert torch.equal(network.columns[0].fc6.weight, torchvision_net.classifier[1].weight)


def test_weights_for_other_classes_need_a_new_last_layer(store: Path, tmp_path: Path) -> None:
    torchvision_net = torchvision_alexnet(WIDTHS, 7)
    torch.save(torchvision_net.state_dict(), tmp_path / "seven.pth")
    args = ["import", tmp_path / "seven.pth", "--store", store, "--run-dir", tmp_path / "run", "--batch", 8]
    assert "has 7 classes" in refusal(*args)
    json_lines(*args, "--new-fc8")
    network, _ = load_trained(tmp_path / "run", ("cpu", "cpu"))
    assert network.fc8.weight.shape == (3, 24)
    assert torch.equal(network.columns[0].fc7.weight, torchvision_net.classifier[4].weight)


class Trap:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_files_and_recipes_that_do_not_fit_are_refused(weights: Path, store: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    files = {
        "lacks.pth": OrderedDict(list(state.items())[:-1]),
        "more.pth": {**state, "features.1.weight": torch.zeros(1)},
        "wider.pth": {**state, "classifier.4.bias": torch.zeros(25)},
        "grey.pth": {**state, "features.0.weight": torch.zeros(8, 1, 11, 11)},
        "list.pth": [1, 2],
    }
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        assert "not a state_dict" in refusal("import", tmp_path / name, "--store", store, "--run-dir", tmp_path / "run")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    for name, message in (("trap.pth", "not a file of tensors"), ("nowhere.pth", "nowhere.pth: no such file")):
        assert message in refusal("import", tmp_path / name, "--store", store, "--run-dir", tmp_path / "run")
    args = ["import", weights, "--store", store, "--run-dir", tmp_path / "run"]
    assert "subtracts a mean image" in refusal(*args, "--recipe", "paper")
    assert "tanh" in refusal(*args, "--activation", "tanh")
    assert "--batch 1000: " in refusal(*args, "--batch", "1000", code=2)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(UserError, match="one column"):
        import_torchvision(weights, RunConfig(store, MODERN, 8, model=SMALL["alexnet"], run_dir=tmp_path / "run"))

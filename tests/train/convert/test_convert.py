"""Exported and imported networks against the run's own, in other programs: safetensors, onnxruntime, and torchvision's
published definition, which tests/train/config/test_architecture.py has written out by hand.

Networks are small, and random: a checkpoint at step 0.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from base64 import b64decode
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from safetensors import safe_open

from pipeline.augment import Augmentation
from pipeline.loader import eval_loader
from prep.console import DiskFull, UserError
from prep.store.manifest import Store
from tests.train.config.test_architecture import published, published_forward
from train import cli
from train.config.architecture import (
    ALEXNET,
    ARCHITECTURES,
    JOINED,
    TORCHVISION,
    Architecture,
    Widths,
    architecture_from_json,
)
from train.config.choices import EXPORT_FORMATS
from train.config.recipe import Recipe, recipe_from_json
from train.config.recipes import CAFFE, MODERN, PAPER, RELEASED
from train.config.run_config import RunConfig
from train.convert import export
from train.convert.export import export_preprocessing
from train.convert.import_torchvision import create_run, import_torchvision
from train.convert.torchvision_weights import IMAGENET_NORMALIZATION, from_torchvision_weights
from train.model.alexnet import AlexNet
from train.runs.loading import load_trained
from train.runs.preprocessing import load_eval_transform
from train.runs.run import Run

WIDTHS = Widths(8, 12, 12, 16, 8, 20, 24)
TINY = {a.name: replace(a, widths=WIDTHS) for a in (ALEXNET, JOINED, TORCHVISION)}
STRONG = {"init": "he", "init_bias": dict.fromkeys(("conv1", "conv3", "conv5", "fc6"), 0.2)}
MODERN_SCALED_IN_TEST = replace(MODERN, dropout_scales_training=False, dropout=0.3)

Made = Callable[[Architecture, Recipe], tuple[Path, AlexNet]]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "torchvision", TINY["torchvision"])


@pytest.fixture
def made(store: Path, tmp_path: Path) -> Made:
    """made(architecture, recipe): a run of that network, and the network in test."""

    def make(architecture: Architecture, recipe: Recipe) -> tuple[Path, AlexNet]:
        recipe = replace(recipe, **STRONG)
        config = RunConfig(store, recipe, 8, model=architecture, run_dir=tmp_path / "run")
        torch.manual_seed(5)
        network = AlexNet(3, recipe, ("cpu", "cpu"), architecture)
        with torch.no_grad():
            network.fc8.weight.mul_(20)
        create_run(Run.open(config), network)
        return config.run_dir, network.eval()

    return make


def test_a_disk_that_is_full_is_said_in_one_line_for_every_format(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = made(TINY["torchvision"], MODERN)
    monkeypatch.setattr(export, "atomic_file", lambda out: open("/dev/full", "wb"))
    for to in ("torchvision", "safetensors"):
        with pytest.raises(DiskFull, match="No space left"):
            export.export(run_dir, to, tmp_path / "net")


def command(*words: object) -> dict:
    result = CliRunner().invoke(cli.main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def refused(*words: object) -> str:
    result = CliRunner().invoke(cli.main, [*map(str, words)])
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
    return result.stderr


def images_of(store: Path, mean: str) -> torch.Tensor:
    with eval_loader(store, 12, augmentation=Augmentation(mean=mean)) as loader:
        return next(iter(loader)).images


def close(a: torch.Tensor, b: torch.Tensor, share: float) -> bool:
    """To a share of the largest."""
    assert b.std() > 0.01  # they say something
    return a.shape == b.shape and bool((a - b).abs().max() < share * b.abs().max())


@pytest.mark.parametrize(("name", "recipe"), [("alexnet", RELEASED), ("joined", PAPER)])
def test_safetensors_load_into_a_network_made_of_their_own_metadata(
    made: Made, store: Path, tmp_path: Path, name: str, recipe: Recipe
) -> None:
    run_dir, network = made(TINY[name], recipe)
    out = tmp_path / "net.safetensors"
    out.write_text("what was there")
    told = command("export", run_dir / "checkpoint-00000000.pt", "--to", "safetensors", "--out", out)
    assert told["step"] == 0 and told["bytes"] == out.stat().st_size
    with safe_open(out, "pt") as file:
        texts = {key: json.loads(text) for key, text in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # it is no dict
    again = AlexNet(
        len(texts["classes"]),
        recipe_from_json(texts["recipe"]),
        ("cpu", "cpu"),
        architecture_from_json(texts["architecture"]),
    ).eval()
    again.load_joined_tensors(tensors)
    images = images_of(store, "image")
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
    assert texts["classes"] == list(Store.open(store).classes) and again.recipe == network.recipe
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "run"]


@pytest.mark.parametrize(("name", "recipe"), [("alexnet", RELEASED), ("joined", PAPER), ("torchvision", MODERN)])
def test_onnx_gives_the_same_outputs_for_any_batch(
    made: Made, store: Path, tmp_path: Path, name: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two columns with normalization before ReLU and within maps; one column as the paper; none of it."""
    run_dir, network = made(TINY[name], recipe)
    out = tmp_path / "net.onnx"
    said: list[logging.LogRecord] = []
    listener = logging.Handler()
    listener.emit = said.append
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "handlers", [listener])
    command("export", run_dir, "--to", "onnx", "--out", out)
    assert not said  # the exporter misses torchvision, and what we use has none of it
    session = onnxruntime.InferenceSession(out)
    texts = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(texts["preprocessing"])
    assert preprocessing["mean"] == recipe.augmentation.mean and json.loads(texts["classes"])[0] == "n00000011"
    assert json.loads(texts["architecture"])["name"] == name
    images = images_of(store, recipe.augmentation.mean)
    for batch in (images[:1], images):
        with torch.no_grad():
            wanted = network(batch)
        (found,) = session.run(["logits"], {"images": batch.numpy()})
        assert np.abs(found - wanted.numpy()).max() < 1e-4 and wanted.std() > 0.01


@pytest.mark.parametrize("recipe", [PAPER, CAFFE, MODERN], ids=lambda recipe: recipe.augmentation.mean)
def test_constants_make_of_pixels_what_the_stream_serves(made: Made, store: Path, recipe: Recipe) -> None:
    """Read as JSON, by NumPy alone."""
    run_dir, _ = made(TINY["joined"], recipe)
    eye = load_eval_transform(run_dir, recipe)
    told = json.loads(json.dumps(vars(export_preprocessing(eye, recipe.input_divisor))))
    pixels = images_of(store, "none").numpy()
    assert pixels.min() >= 0 and told["shorter_side_px"] == 256 and told["input_divisor"] == recipe.input_divisor
    if told["mean_image"] is None:
        mean = np.array(told["mean_rgb"])[:, None, None]
    else:
        image = np.frombuffer(b64decode(told["mean_image"]["base64"]), "<f4").reshape(told["mean_image"]["shape"])
        assert np.allclose(image.mean((0, 1)), told["mean_rgb"], atol=1e-3)
        mean = image[16:240, 16:240].transpose(2, 0, 1)
    assert np.abs(pixels - mean - images_of(store, recipe.augmentation.mean).numpy()).max() < 1e-3


@pytest.mark.parametrize("recipe", [MODERN, MODERN_SCALED_IN_TEST, RELEASED], ids=["channel", "scaled", "mean image"])
def test_torchvisions_layout_computes_the_same_in_torchvisions_definition(
    made: Made, store: Path, tmp_path: Path, recipe: Recipe
) -> None:
    """Exact at the border, too, and with dropout that scales in test."""
    run_dir, network = made(TINY["torchvision"], recipe)
    out = tmp_path / "net.pth"
    normalise = command("export", run_dir, "--to", "torchvision", "--out", out)["preprocessing"]["normalise"]
    state = torch.load(out, weights_only=True)
    theirs = published(WIDTHS, 3).eval()
    theirs.load_state_dict(state)
    pixels, mean, std = (
        images_of(store, "none"),
        *(torch.tensor(normalise[key])[:, None, None] for key in ("mean", "std")),
    )
    images = images_of(store, recipe.augmentation.mean)
    if recipe is RELEASED:
        assert not normalise["exact"]
        texts = json.loads(state._metadata[""]["preprocessing"])
        image = np.frombuffer(b64decode(texts["mean_image"]["base64"]), "<f4").reshape(256, 256, 3)[16:240, 16:240]
        normal = (pixels - torch.from_numpy(image.copy()).permute(2, 0, 1)) / (255 * std)
    else:
        assert normalise["exact"]
        normal = (pixels / 255 - mean) / std
    with torch.no_grad():
        assert close(published_forward(theirs, normal), network(images), 1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("alexnet", {}, "alexnet: torchvision's AlexNet has one column"),
        ("torchvision", {"activation": "tanh"}, "tanh"),
        ("torchvision", {"pool_px": 2}, "2 px"),
    ],
)
def test_what_torchvisions_definition_cannot_compute_is_refused_with_the_reason(
    made: Made, tmp_path: Path, name: str, changes: dict, named: str
) -> None:
    run_dir, _ = made(TINY[name], replace(MODERN, **changes))
    assert named in refused("export", run_dir, "--to", "torchvision", "--out", tmp_path / "net.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_store_is_not_needed_but_what_the_run_keeps_of_it_is(made: Made, tmp_path: Path) -> None:
    run_dir, _ = made(TINY["joined"], PAPER)
    words = ["export", run_dir, "--to", "safetensors", "--out"]
    command(*words, tmp_path / "beside")
    told = json.loads((run_dir / "run.json").read_text())
    told["settings"]["store"] = "nowhere"
    (run_dir / "run.json").write_text(json.dumps(told))
    command(*words, tmp_path / "alone")
    with safe_open(tmp_path / "beside", "pt") as beside, safe_open(tmp_path / "alone", "pt") as alone:
        assert alone.metadata() == beside.metadata() and "mean_image" in alone.metadata()["preprocessing"]
    assert "cannot be written" in refused(*words, tmp_path / "no" / "net")
    (run_dir / "mean_image.npy").unlink()
    assert "mean_image.npy: cannot be read" in refused(*words, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("to", ["onnx", "safetensors"])
def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert (
        f"needs {to}" in (text := refused("export", tmp_path, "--to", to, "--out", "x")) and "alexnet[export]" in text
    )


def test_every_export_format_has_a_writer() -> None:
    assert tuple(export._SERIALIZERS) == EXPORT_FORMATS


# ---- import


@pytest.fixture
def theirs() -> torch.nn.Module:
    torch.manual_seed(8)
    return published(WIDTHS, 3).eval()


@pytest.fixture
def weights(theirs: torch.nn.Module, tmp_path: Path) -> Path:
    """As torchvision publishes them: a plain state_dict."""
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def normal(pixels: torch.Tensor) -> torch.Tensor:
    """torchvision.transforms.Normalize of all its weights."""
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels / 255 - mean[:, None, None]) / std[:, None, None]


@pytest.mark.parametrize("recipe", [MODERN, MODERN_SCALED_IN_TEST, replace(MODERN, input_divisor=1.0)])
def test_imported_parameters_are_the_same_function_where_the_means_agree(
    theirs: torch.nn.Module, store: Path, recipe: Recipe
) -> None:
    pixels, mean = images_of(store, "none"), 255 * np.array([0.485, 0.456, 0.406])
    ours = AlexNet(3, recipe, ("cpu", "cpu"), TINY["torchvision"]).eval()
    ours.load_joined_tensors(from_torchvision_weights(theirs.state_dict(), recipe, IMAGENET_NORMALIZATION, mean))
    with torch.no_grad():
        found = ours(pixels - torch.tensor(mean, dtype=torch.float32)[:, None, None])
        assert close(found, published_forward(theirs, normal(pixels)), 1e-5)


def test_an_imported_run_differs_at_the_border_alone_and_is_evaluated(
    theirs: torch.nn.Module, weights: Path, store: Path, tmp_path: Path
) -> None:
    """conv1 of 12 pictures: equal in 53 × 53 of 55 × 55 positions. The border sees the store's mean as padding."""
    command("import", weights, "--store", store, "--run-dir", tmp_path / "run", "--batch", 8)
    network, state = load_trained(tmp_path / "run", ("cpu", "cpu"))
    assert state.step == 0 and network.recipe == MODERN
    conv1, pixels = network.columns[0].conv1, images_of(store, "none")
    with torch.no_grad():
        wanted = theirs.features[0](normal(pixels))
        found = conv1(F.pad(images_of(store, "channel") / 64, (2, 2, 2, 2)))
        assert torch.allclose(found[:, :, 1:-1, 1:-1], wanted[:, :, 1:-1, 1:-1], atol=2e-5)
        mean = torch.tensor(Store.open(store).color_stats().mean_rgb, dtype=torch.float32)[:, None, None]
        filled = F.pad(pixels - mean, (2, 2, 2, 2)) + mean
        assert torch.allclose(found, F.conv2d(normal(filled), *theirs.features[0].parameters(), stride=4), atol=2e-5)
        assert (found - wanted).abs().max() > 0.01  # this store's mean is far from ImageNet's
    result = command("evaluate", tmp_path / "run", "--store", store, "--views", "dense")
    assert result["images"] == 12 and result["views"] == "dense"


def test_an_imported_run_is_trained_further(weights: Path, store: Path, tmp_path: Path) -> None:
    """The same options go on, without a new beginning; the first loss is that of the imported weights."""
    words = ["--store", store, "--run-dir", tmp_path / "run", "--batch", 8, "--seed", 3, "--set", "dropout=0"]
    words += ["--set", "label_smoothing=0.1"]
    command("import", weights, *words, "--set", "lr=0.001")
    network, _ = load_trained(tmp_path / "run", ("cpu", "cpu"))
    going_on = [*words, "--set", "lr=0.001", "--model", "torchvision", "--recipe", "modern"]
    told = command("run", *going_on, "--gpus", "cpu", "--steps", 1, "--log-every", 1)
    from pipeline.loader import train_loader

    with train_loader(store, 8, seed=3, augmentation=MODERN.augmentation) as loader, torch.no_grad():
        images, labels = next(iter(loader))
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.1)
    assert told["train"]["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert "there is a run in it already" in refused("import", weights, *words)


def test_an_export_of_ours_comes_back_as_it_was(made: Made, store: Path, tmp_path: Path) -> None:
    """It says its own Normalize, so that nothing is left at the border either; and its classes."""
    run_dir, network = made(TINY["torchvision"], MODERN_SCALED_IN_TEST)
    out = tmp_path / "net.pth"
    command("export", run_dir, "--to", "torchvision", "--out", out)
    config = RunConfig(store, network.recipe, 8, model=TINY["torchvision"], run_dir=tmp_path / "again")
    again = import_torchvision(out, config).joined_tensors()
    for name, tensor in network.joined_tensors().items():
        assert torch.allclose(again[name], tensor, rtol=1e-5, atol=1e-6), name
    state = torch.load(out, weights_only=True)
    state._metadata[""]["classes"] = json.dumps(["a", "b", "c"])
    torch.save(state, out)
    with pytest.raises(UserError, match=r"3 classes \(a …\).*--new-fc8"):
        import_torchvision(out, replace(config, run_dir=tmp_path / "third"))


def test_other_classes_have_a_new_last_layer(store: Path, tmp_path: Path) -> None:
    theirs = published(WIDTHS, 7)
    torch.save(theirs.state_dict(), tmp_path / "seven.pth")
    words = ["import", tmp_path / "seven.pth", "--store", store, "--run-dir", tmp_path / "run", "--batch", 8]
    assert "has 7 classes" in refused(*words)
    command(*words, "--new-fc8")
    network, _ = load_trained(tmp_path / "run", ("cpu", "cpu"))
    assert network.fc8.weight.shape == (3, 24)
    assert torch.equal(network.columns[0].fc7.weight, theirs.classifier[4].weight)


class Trap:
    """A pickle that makes a folder where it is loaded."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


def test_files_and_recipes_that_do_not_fit_are_refused(weights: Path, store: Path, tmp_path: Path) -> None:
    state = torch.load(weights, weights_only=True)
    wrong = {
        "lacks.pth": OrderedDict(list(state.items())[:-1]),
        "more.pth": {**state, "features.1.weight": torch.zeros(1)},
        "wider.pth": {**state, "classifier.4.bias": torch.zeros(25)},
        "grey.pth": {**state, "features.0.weight": torch.zeros(8, 1, 11, 11)},
        "list.pth": [1, 2],
    }
    for name, content in wrong.items():
        torch.save(content, tmp_path / name)
        assert "not a state_dict" in refused("import", tmp_path / name, "--store", store, "--run-dir", tmp_path / "run")
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    for name, said in (("trap.pth", "not a file of tensors"), ("nowhere.pth", "nowhere.pth: cannot be read")):
        assert said in refused("import", tmp_path / name, "--store", store, "--run-dir", tmp_path / "run")
    words = ["import", weights, "--store", store, "--run-dir", tmp_path / "run"]
    assert "subtracts a mean image" in refused(*words, "--recipe", "paper")
    assert "tanh" in refused(*words, "--activation", "tanh")
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(UserError, match="one column"):
        import_torchvision(weights, RunConfig(store, MODERN, 8, model=TINY["alexnet"], run_dir=tmp_path / "run"))

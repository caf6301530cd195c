"""Tests of exported networks: other libraries load the files and compute the same outputs as the run's network.

safetensors loads safetensors files, and onnxruntime runs ONNX graphs. torchvision's network, as
tests/helpers/torchvision_alexnet.py defines it, loads the state_dict.
"""

from __future__ import annotations

import json
import logging
from base64 import b64decode
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from pipeline.loader import eval_loader
from pipeline.still_image import StoredImages
from prep.console import DiskFull
from prep.store.manifest import Store
from tests.helpers.alextrain import json_lines, refusal
from tests.helpers.small_networks import MODERN_SCALED_AT_TEST_TIME, SMALL, WIDTHS, MakeRun, are_close, eval_images
from tests.helpers.torchvision_alexnet import torchvision_alexnet, torchvision_forward
from train.config.architecture import architecture_from_json
from train.config.choices import EXPORT_FORMATS
from train.config.recipe import Recipe, recipe_from_json
from train.config.recipes import CAFFE, MODERN, PAPER, RELEASED
from train.convert import export
from train.convert.export import export_preprocessing
from train.model.alexnet import AlexNet
from train.runs.preprocessing import load_eval_transform


def decoded_mean_image(preprocessing: dict[str, Any]) -> np.ndarray:
    """Return the mean image in the exported JSON, float32 (side, side, 3)."""
    image = preprocessing["mean_image"]
    return np.frombuffer(b64decode(image["base64"]), "<f4").reshape(image["shape"])


def test_a_full_disk_is_reported_for_every_format(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, _ = make_run(SMALL["torchvision"], MODERN)
    monkeypatch.setattr(export, "atomic_file", lambda out: open("/dev/full", "wb"))
    for format in ("torchvision", "safetensors"):
        with pytest.raises(DiskFull, match="No space left"):
            export.export(run_dir, format, tmp_path / "net")


@pytest.mark.parametrize(("name", "recipe"), [("alexnet", RELEASED), ("joined", PAPER)])
def test_safetensors_load_into_a_network_built_from_their_metadata(
    make_run: MakeRun, store: Path, tmp_path: Path, name: str, recipe: Recipe
) -> None:
    run_dir, network = make_run(SMALL[name], recipe)
    out = tmp_path / "net.safetensors"
    out.write_text("an older file")
    (result,) = json_lines("export", run_dir / "checkpoint-00000000.pt", "--to", "safetensors", "--out", out)
    assert result["step"] == 0 and result["bytes"] == out.stat().st_size
    with safe_open(out, "pt") as file:
        metadata = {key: json.loads(text) for key, text in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    loaded = AlexNet(
        len(metadata["classes"]),
        recipe_from_json(metadata["recipe"]),
        ("cpu", "cpu"),
        architecture_from_json(metadata["architecture"]),
    ).eval()
    loaded.load_joined_tensors(tensors)
    images = eval_images(store, "image")
    with torch.no_grad():
        assert torch.equal(loaded(images), network(images))
    assert metadata["classes"] == list(Store.open(store).classes) and loaded.recipe == network.recipe
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net.safetensors", "run"]


@pytest.mark.parametrize(("name", "recipe"), [("alexnet", RELEASED), ("joined", PAPER), ("torchvision", MODERN)])
def test_onnx_gives_the_same_outputs_for_any_batch(
    make_run: MakeRun, store: Path, tmp_path: Path, name: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test exports three networks.

    The first network has two columns, LRN before ReLU in layer 1, and LRN within maps in layer 2. The second network
    has one column, and the paper's LRN. The third network has one column, and no LRN.
    """
    run_dir, network = make_run(SMALL[name], recipe)
    out = tmp_path / "net.onnx"
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append
    monkeypatch.setattr(logging.getLogger("torch.onnx"), "handlers", [handler])
    json_lines("export", run_dir, "--to", "onnx", "--out", out)
    assert not records  # the export suppresses torch's warning that torchvision is missing
    session = onnxruntime.InferenceSession(out)
    metadata = session.get_modelmeta().custom_metadata_map
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["mean"] == recipe.augmentation.mean and json.loads(metadata["classes"])[0] == "n00000011"
    assert json.loads(metadata["architecture"])["name"] == name
    images = eval_images(store, recipe.augmentation.mean)
    for batch in (images[:1], images):
        with torch.no_grad():
            expected = network(batch)
        (actual,) = session.run(["logits"], {"images": batch.numpy()})
        assert np.abs(actual - expected.numpy()).max() < 1e-4 and expected.std() > 0.01


DIVIDED = replace(MODERN, augmentation=replace(MODERN.augmentation, divisor=2.0))


@pytest.mark.parametrize("recipe", [PAPER, MODERN, DIVIDED], ids=["mean image", "modern", "loader divides"])
def test_the_metadata_of_an_onnx_file_are_enough_to_compute_its_input(
    make_run: MakeRun, store: Path, photo_folder: Path, tmp_path: Path, recipe: Recipe
) -> None:
    """The test prepares photographs with Pillow. All numbers for the preparation come from the ONNX file.

    Pillow rounds to 8 bits between the two passes of a rescaling, and the store has JPEG records. The pixels therefore
    differ from those of the store by a few grey levels.
    """
    run_dir, network = make_run(SMALL["joined"], recipe)
    (result,) = json_lines("export", run_dir, "--to", "onnx")
    assert result["out"] == str(run_dir / "alexnet.onnx")
    session = onnxruntime.InferenceSession(result["out"])
    told = json.loads(session.get_modelmeta().custom_metadata_map["preprocessing"])
    assert told["background"] == Store.open(store).settings.background
    assert told["channel_order"] == "RGB" and told["layout"] == "NCHW" and told["range"] == [0, 255]
    side, window = told["shorter_side_px"], told["window_px"]
    (first_row, last_row), (first_column, last_column) = told["window_rows"], told["window_columns"]
    assert (first_row, last_row) == (first_column, last_column) == (16, 239) and told["square_first"].endswith("// 2")
    mean = np.array(told["mean_rgb"])
    if told["mean"] == "image":
        mean = decoded_mean_image(told)[first_row : last_row + 1, first_column : last_column + 1]
    with StoredImages(Store.open(store), "val") as stored:
        sources = [Path(stored.records.source(number)).name for number in range(12)]
    batch = []
    for name in sources:
        image = Image.open(photo_folder / "val" / name).convert("RGB")
        short = min(image.size)
        size = [(2 * length * side + short) // (2 * short) for length in image.size]  # rounded
        kind = {"area": "BICUBIC" if short < side else "BOX"}.get(told["resize_filter"], told["resize_filter"].upper())
        pixels = np.asarray(image.resize(size, Image.Resampling[kind]), np.float32)
        top, left = ((length - side) // 2 for length in pixels.shape[:2])
        square = pixels[top : top + side, left : left + side]
        crop = square[first_row : last_row + 1, first_column : last_column + 1]
        assert crop.shape[:2] == (window, window)
        crop = (crop - mean) / told["input_divisor"]
        batch.append(crop.transpose(2, 0, 1))
    images = np.stack(batch).astype(np.float32)
    (logits,) = session.run(["logits"], {"images": images})
    with eval_loader(store, 12, augmentation=recipe.augmentation.for_stream()) as loader:
        expected = next(iter(loader)).images
    assert np.abs(images - expected.numpy()).mean() < 2 / recipe.augmentation.divisor
    with torch.no_grad():
        assert are_close(torch.from_numpy(logits), network(expected), 0.1)


@pytest.mark.parametrize("recipe", [PAPER, CAFFE, MODERN], ids=lambda recipe: recipe.augmentation.mean)
def test_exported_preprocessing_gives_the_images_of_the_stream(make_run: MakeRun, store: Path, recipe: Recipe) -> None:
    """The test computes the images with NumPy, from the numbers in the exported JSON."""
    run_dir, _ = make_run(SMALL["joined"], recipe)
    transform = load_eval_transform(run_dir, recipe)
    exported = json.loads(json.dumps(vars(export_preprocessing(transform, recipe.input_divisor))))
    pixels = eval_images(store, "none").numpy()
    assert exported["shorter_side_px"] == 256 and exported["input_divisor"] == recipe.input_divisor
    assert pixels.min() >= 0 and exported["window_rows"] == exported["window_columns"] == [16, 239]
    if exported["mean_image"] is None:
        mean = np.array(exported["mean_rgb"])[:, None, None]
    else:
        image = decoded_mean_image(exported)
        assert np.allclose(image.mean((0, 1)), exported["mean_rgb"], atol=1e-3)
        mean = image[16:240, 16:240].transpose(2, 0, 1)
    assert np.abs(pixels - mean - eval_images(store, recipe.augmentation.mean).numpy()).max() < 1e-3


@pytest.mark.parametrize(
    "recipe", [MODERN, MODERN_SCALED_AT_TEST_TIME, RELEASED], ids=["channel", "scaled", "mean image"]
)
def test_torchvisions_network_computes_the_same_from_exported_weights(
    make_run: MakeRun, store: Path, tmp_path: Path, recipe: Recipe
) -> None:
    """The outputs agree even at the border of an image, and even if the recipe's dropout scales in evaluation."""
    run_dir, network = make_run(SMALL["torchvision"], recipe)
    out = tmp_path / "net.pth"
    normalization = json_lines("export", run_dir, "--to", "torchvision", "--out", out)[0]["preprocessing"]["normalise"]
    state = torch.load(out, weights_only=True)
    torchvision_net = torchvision_alexnet(WIDTHS, 3).eval()
    torchvision_net.load_state_dict(state)
    pixels, mean, std = (
        eval_images(store, "none"),
        *(torch.tensor(normalization[key])[:, None, None] for key in ("mean", "std")),
    )
    images = eval_images(store, recipe.augmentation.mean)
    if recipe is RELEASED:
        assert not normalization["exact"]
        preprocessing = json.loads(state._metadata[""]["preprocessing"])
        image = torch.from_numpy(decoded_mean_image(preprocessing)[16:240, 16:240].copy())
        inputs = (pixels - image.permute(2, 0, 1)) / (255 * std)
    else:
        assert normalization["exact"]
        inputs = (pixels / 255 - mean) / std
    with torch.no_grad():
        assert are_close(torchvision_forward(torchvision_net, inputs), network(images), 1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("alexnet", {}, "alexnet: torchvision's AlexNet has one column"),
        ("torchvision", {"activation": "tanh"}, "tanh"),
        ("torchvision", {"pool_px": 2}, "2 px"),
    ],
)
def test_a_network_that_torchvision_cannot_compute_is_refused_with_the_reason(
    make_run: MakeRun, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    run_dir, _ = make_run(SMALL[name], replace(MODERN, **changes))
    assert message in refusal("export", run_dir, "--to", "torchvision", "--out", tmp_path / "net.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_needs_the_mean_image_in_the_run_folder_but_not_the_store(make_run: MakeRun, tmp_path: Path) -> None:
    run_dir, _ = make_run(SMALL["joined"], PAPER)
    args = ["export", run_dir, "--to", "safetensors", "--out"]
    json_lines(*args, tmp_path / "with-store")
    description = json.loads((run_dir / "run.json").read_text())
    description["settings"]["store"] = "nowhere"
    (run_dir / "run.json").write_text(json.dumps(description))
    json_lines(*args, tmp_path / "without-store")
    metadata = []
    for name in ("with-store", "without-store"):
        with safe_open(tmp_path / name, "pt") as file:
            metadata.append(file.metadata())
    assert metadata[0] == metadata[1] and "mean_image" in metadata[0]["preprocessing"]
    assert "there is no folder" in refusal(*args, tmp_path / "no" / "net", code=2)
    (run_dir / "mean_image.npy").unlink()
    assert "mean_image.npy: cannot be read" in refusal(*args, tmp_path / "net")
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("format", ["onnx", "safetensors"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    error = refusal("export", tmp_path, "--to", format, "--out", "x")
    assert f"needs {format}" in error and "onnx>=1.19" in error


def test_every_export_format_has_a_serializer() -> None:
    assert tuple(export._SERIALIZERS) == EXPORT_FORMATS

"""Activations against hooks-free arithmetic, the index against distances by NumPy; predict, features, search."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image

from pipeline.loader import eval_loader
from prep.console import UserError
from prep.store.manifest import Store
from train.cli import main
from train.evaluation.features import compute_activations
from train.evaluation.neighbors import NeighborIndex, load_or_build_index, nearest_neighbors
from train.model.alexnet import AlexNet
from train.runs.loading import load_trained
from train.runs.run import Run

CPU = ("cpu", "cpu")


def alextrain(*words: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, list(map(str, words)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def answers(*words: object) -> list[Any]:
    code, out, err = alextrain(*words, "--json")
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def model(small_run: Path) -> AlexNet:
    return load_trained(small_run, CPU).network.eval()


@pytest.fixture(scope="module")
def images(store: Path) -> torch.Tensor:
    with eval_loader(store, 12, threads=1) as loader:
        return next(iter(loader)).images


def test_activations_are_those_of_the_joined_network(model: AlexNet, images: torch.Tensor) -> None:
    """conv1 and the full layers by the joined parameters, of one network without columns."""
    found = compute_activations(model, images, ("conv1", "conv5", "fc6", "fc7", "fc8"))
    p = model.joined_tensors()
    with torch.no_grad():
        padded = F.pad(images / model.recipe.input_divisor, (0, 3, 0, 3))
        conv1 = F.conv2d(padded, p["conv1.weight"], p["conv1.bias"], stride=4).relu()
        pooled = F.max_pool2d(found["conv5"], 3, 2).flatten(1)
        fc6 = F.linear(pooled, p["fc6.weight"], p["fc6.bias"]).relu()
        fc7 = F.linear(fc6, p["fc7.weight"], p["fc7.bias"]).relu()
        torch.testing.assert_close(found["conv1"], conv1, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["fc6"], fc6, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["fc7"], fc7, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found["fc8"], model(images))
    assert found["conv5"].shape == (12, 8, 13, 13) and not model.training
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match="--layer fc9: expected one of conv1"):
        compute_activations(model, images, ["fc9"])


def test_features_are_written_with_their_keys(
    small_run: Path, store: Path, model: AlexNet, images: torch.Tensor, tmp_path: Path
) -> None:
    out = tmp_path / "fc7.npy"
    (said,) = answers("features", small_run, "--layer", "fc7", "--store", store, "--split", "val", "--out", out)
    written = np.load(out)
    assert said["shape"] == [12, 16] and written.dtype == np.float32
    np.testing.assert_allclose(written, compute_activations(model, images, ["fc7"])["fc7"], rtol=1e-5, atol=1e-5)
    lines = [line.split("\t") for line in (tmp_path / "fc7.keys.txt").read_text().splitlines()]
    assert [key for key, *_ in lines] == [f"{k:08d}" for k in range(12)]
    assert {name for _, name, _ in lines} <= set(Store.open(store).classes)
    assert len({source for *_, source in lines}) == 12
    code, _, err = alextrain("features", small_run, "--store", store, "--out", tmp_path / "a.txt")
    assert code == 1 and "a.npy" in err


def test_the_nearest_are_those_with_the_least_distance() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 9)).astype(np.float32)
    index = NeighborIndex(features, np.arange(50) % 7, np.array([b"%08d" % k for k in range(50)]))
    queries = rng.normal(size=(3, 9)).astype(np.float32)
    for query, near in zip(queries, nearest_neighbors(index, queries, 6), strict=True):
        distances = np.sqrt(((features.astype(float) - query) ** 2).sum(1))
        order = distances.argsort()[:6]
        assert [n.record for n in near] == order.tolist()
        assert [(n.key, n.label) for n in near] == [(f"{k:08d}", k % 7) for k in order]
        np.testing.assert_allclose([n.distance for n in near], distances[order], rtol=1e-5)


def test_the_index_is_built_once_for_a_checkpoint_a_store_and_a_size(
    trained_run: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, state = load_trained(trained_run, CPU)
    opened = Store.open(store)
    index = load_or_build_index(trained_run, model, state, opened)
    assert index.features.shape == (30, 16) and len(set(index.keys.tolist())) == 30
    (path,) = trained_run.glob("index-*.npz")
    monkeypatch.setattr("train.evaluation.features.eval_batch_size", lambda *_: 4)  # the second batch is cut short
    some = load_or_build_index(trained_run, model, state, opened, max_records=7)
    assert some.features.shape == (7, 16)
    np.testing.assert_allclose(some.features, index.features[:7], rtol=1e-4, atol=1e-5)
    whole = path.read_bytes()
    path.write_bytes(whole[:500])
    assert len(load_or_build_index(trained_run, model, state, opened, max_records=7).features) == 7  # torn: built anew
    monkeypatch.setattr("train.evaluation.neighbors.iter_split_activations", None)
    again = load_or_build_index(trained_run, model, state, opened, max_records=7)
    assert all(np.array_equal(a, b) for a, b in zip(again, some, strict=True))
    index_path = trained_run / "index-fc7-00000099.npz"
    with pytest.raises(TypeError):  # another step: to be built
        load_or_build_index(trained_run, model, replace(state, step=99), opened, max_records=7)
    assert not index_path.exists()
    for changed, precision in (({"digest": "another run's"}, "fp32"), ({}, "bf16")):
        with pytest.raises(TypeError):
            load_or_build_index(
                trained_run, model, replace(state, **changed), opened, max_records=7, precision=precision
            )


@pytest.mark.parametrize("views", [1, 10])
def test_predictions_are_those_of_the_evaluation(
    small_run: Path, trained_run: Path, store: Path, photo_folder: Path, tmp_path: Path, views: int
) -> None:
    """The photographs that the records of val were made of, without the store, give what evaluating val gives."""
    from train.evaluation.predictions import load_predictions

    out = tmp_path / "val.npz"
    assert alextrain("evaluate", trained_run, "--store", store, "--views", views, "--out", out)[0] == 0
    saved = load_predictions(out)
    from pipeline.records import Records

    records = Records(Store.open(store), "val")
    sources = [next(photo_folder.rglob(Path(records.source(k)).name)) for k in (0, 5)]
    said = answers("predict", small_run, *sources, "--views", views)
    for number, one in zip((0, 5), said, strict=True):
        found = {guess["class"]: guess["probability"] for guess in one["guesses"]}
        told = dict(zip(saved.about["classes"], saved.probabilities[number].tolist(), strict=True))
        assert found == pytest.approx(told, rel=1e-4)
        ps = [guess["probability"] for guess in one["guesses"]]
        assert ps == sorted(ps, reverse=True) and sum(ps) == pytest.approx(1, abs=1e-5)


def test_a_checkpoint_may_be_named_in_place_of_its_run(small_run: Path, photo_folder: Path, tmp_path: Path) -> None:
    """Of the photograph's name everything is written out: a line's end, and bytes that are no UTF-8."""
    odd = tmp_path / "a\nb\udcff.jpg"
    shutil.copy(next((photo_folder / "val").glob("*.JPEG")), odd)
    assert answers("predict", small_run / "best.pt", odd) == answers("predict", small_run, odd, "--checkpoint", "best")
    code, said, _ = alextrain("predict", small_run, odd, "--views", "1")
    assert code == 0 and said.count("\n") == 1 and r"a\nb\udcff.jpg: n000" in said
    code, _, err = alextrain("predict", small_run, odd, "--views", "dense")
    assert code == 2 and "dense" in err


def test_predict_knows_the_mean_without_the_store(trained_run: Path, photo_folder: Path) -> None:
    told = json.loads((trained_run / "run.json").read_text())
    image = next((photo_folder / "val").glob("*.JPEG"))
    at_the_store = answers("predict", trained_run, image)
    told["settings"]["store"] = "nowhere"
    (trained_run / "run.json").write_text(json.dumps(told))
    assert answers("predict", trained_run, image) == at_the_store
    code, _, err = alextrain("predict", trained_run, trained_run / "run.json")
    assert code == 1 and "run.json: not an image" in err
    del told["store"]
    (trained_run / "run.json").write_text(json.dumps(told))
    code, _, err = alextrain("predict", trained_run, image)
    assert code == 1 and "run.json: has no store, which this version reads" in err and err.count("\n") == 1


def test_a_mean_image_is_kept_with_the_run(store: Path, tmp_path: Path, photo_folder: Path) -> None:
    from dataclasses import replace

    from pipeline.augment import Augmentation
    from train.config.architecture import ALEXNET, Widths
    from train.config.recipes import SHORT
    from train.config.run_config import RunConfig
    from train.runs.preprocessing import load_eval_transform
    from train.trainer.loop import fit

    recipe = replace(SHORT, augmentation=Augmentation(mean="image"))
    small = replace(ALEXNET, widths=Widths(2, 2, 2, 2, 2, 2, 2))
    moved = tmp_path / "store"
    shutil.copytree(store, moved)
    run_dir = fit(Run.open(RunConfig(moved, recipe, 8, model=small, run_dir=tmp_path / "run", steps=1, threads=1)))
    shutil.rmtree(moved)
    assert np.array_equal(load_eval_transform(run_dir, recipe).mean_image, Store.open(store).mean_image())
    assert answers("predict", run_dir, next((photo_folder / "val").glob("*.JPEG")))
    (run_dir / "mean_image.npy").unlink()
    with pytest.raises(UserError, match=r"mean_image\.npy"):
        load_eval_transform(run_dir, recipe)


def test_search_finds_the_photograph_itself_among_the_training_pictures(
    trained_run: Path, store: Path, photo_folder: Path, tmp_path: Path
) -> None:
    photographs = sorted((photo_folder / "train").rglob("*.JPEG"))[2:4]
    sheet = tmp_path / "sheet.png"
    found = answers("search", trained_run, *photographs, "--store", store, "--count", "4", "--out", sheet)
    for path, one in zip(photographs, found, strict=True):
        first, *others = one["nearest"]
        assert len(others) == 3 and path.name in first["source"] and first["class"] == path.parent.name
        assert first["distance"] < 1e-2 < 10 * others[0]["distance"]
        assert [n["distance"] for n in one["nearest"]] == sorted(n["distance"] for n in one["nearest"])
    assert np.asarray(Image.open(sheet)).std() > 20
    code, _, err = alextrain("search", trained_run, *[photographs[0]] * 101, "--store", store)
    assert code == 1 and "a sheet holds 100" in err
    code, _, err = alextrain("search", trained_run, photographs[0], "--out", tmp_path / "sheet.gif")
    assert code == 1 and "sheet.png" in err

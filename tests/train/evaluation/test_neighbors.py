"""Nearest neighbors are compared with NumPy. Also tests the saved index and the command `search`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prep.store.manifest import Store
from tests.helpers.alextrain import alextrain, json_lines, refusal
from train.evaluation.neighbors import NeighborIndex, load_or_build_index, nearest_neighbors
from train.runs.loading import load_trained


def test_the_nearest_neighbors_have_the_least_distances() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 9)).astype(np.float32)
    index = NeighborIndex(features, np.arange(50) % 7, np.array([b"%08d" % k for k in range(50)]))
    queries = rng.normal(size=(3, 9)).astype(np.float32)
    for query, neighbors in zip(queries, nearest_neighbors(index, queries, 6), strict=True):
        distances = np.sqrt(((features.astype(float) - query) ** 2).sum(1))
        order = distances.argsort()[:6]
        assert [n.record for n in neighbors] == order.tolist()
        assert [(n.key, n.label) for n in neighbors] == [(f"{k:08d}", k % 7) for k in order]
        np.testing.assert_allclose([n.distance for n in neighbors], distances[order], rtol=1e-5)


def test_an_index_is_built_once_for_each_checkpoint_size_and_precision(
    trained_run: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, checkpoint = load_trained(trained_run, ("cpu", "cpu"))
    opened = Store.open(store)
    index = load_or_build_index(trained_run, network, checkpoint, opened)
    assert index.features.shape == (30, 16) and len(set(index.keys.tolist())) == 30
    (path,) = trained_run.glob("index-*.npz")
    monkeypatch.setattr("train.evaluation.features.eval_batch_size", lambda *_: 4)  # batches of 4 and 3 records
    smaller = load_or_build_index(trained_run, network, checkpoint, opened, max_records=7)
    assert smaller.features.shape == (7, 16)
    np.testing.assert_allclose(smaller.features, index.features[:7], rtol=1e-4, atol=1e-5)
    path.write_bytes(path.read_bytes()[:500])
    rebuilt = load_or_build_index(trained_run, network, checkpoint, opened, max_records=7)
    assert len(rebuilt.features) == 7  # the damaged file is replaced
    # From here on, the computation of a new index raises TypeError.
    monkeypatch.setattr("train.evaluation.neighbors.iter_split_activations", None)
    loaded = load_or_build_index(trained_run, network, checkpoint, opened, max_records=7)
    assert all(np.array_equal(a, b) for a, b in zip(loaded, smaller, strict=True))
    with pytest.raises(TypeError):
        load_or_build_index(trained_run, network, replace(checkpoint, step=99), opened, max_records=7)
    assert not (trained_run / "index-fc7-00000099.npz").exists()
    for digest, precision in (("another run's", "fp32"), (checkpoint.digest, "bf16")):
        changed = replace(checkpoint, digest=digest)
        with pytest.raises(TypeError):
            load_or_build_index(trained_run, network, changed, opened, max_records=7, precision=precision)


def test_search_finds_a_photograph_itself_among_the_training_images(
    trained_run: Path, store: Path, photo_folder: Path, tmp_path: Path
) -> None:
    photographs = sorted((photo_folder / "train").rglob("*.JPEG"))[2:4]
    sheet = tmp_path / "sheet.png"
    answers = json_lines("search", trained_run, *photographs, "--store", store, "--count", "4", "--out", sheet)
    for path, answer in zip(photographs, answers, strict=True):
        first, *others = answer["nearest"]
        assert len(others) == 3 and path.name in first["source"] and first["class"] == path.parent.name
        assert first["distance"] < 1e-2 < 10 * others[0]["distance"]
        assert [n["distance"] for n in answer["nearest"]] == sorted(n["distance"] for n in answer["nearest"])
    assert np.asarray(Image.open(sheet)).std() > 20


def test_bad_photographs_do_not_end_search(trained_run: Path, store: Path, photo_folder: Path, tmp_path: Path) -> None:
    photographs = sorted((photo_folder / "train").rglob("*.JPEG"))[2:4]
    (tmp_path / "text.jpg").write_text("no image")
    words = ("search", trained_run, photographs[0], tmp_path / "text.jpg", photographs[1], "--store", store)
    result = alextrain(*words, "--out", tmp_path / "sheet.png")
    assert result.exit_code == 1 and (tmp_path / "sheet.png").exists()
    assert [line.partition(": ")[0] for line in result.stdout.splitlines()] == [str(path) for path in photographs]
    assert f"Error: {tmp_path}/text.jpg: not an image in a known format" in result.stderr
    assert "1 of 3 photographs could not be read" in result.stderr.splitlines()[-1]


def test_search_refuses_too_many_photographs_and_unknown_formats(
    trained_run: Path, store: Path, photo_folder: Path, tmp_path: Path
) -> None:
    photograph = next((photo_folder / "train").rglob("*.JPEG"))
    assert "a sheet holds 100" in refusal("search", trained_run, *[photograph] * 101, "--store", store, code=2)
    assert "sheet.png" in refusal("search", trained_run, photograph, "--out", tmp_path / "sheet.gif", code=2)

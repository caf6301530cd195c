"""prep.check.verify finds manifests, colour statistics and other files that do not agree with a store's records."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from prep.cli import main
from prep.images.color_stats import Moments, compute_color_stats
from prep.store.manifest import Store, StoreError
from prep.workers import WorkerPool
from tests.conftest import Build
from tests.helpers.damaged_stores import (
    MakeStore,
    change_manifest,
    faults_of,
    sign_again,
    the_fault,
    train_split,
)


def alexprep(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def move_one(shards: list[dict[str, Any]], name: str) -> None:
    """Add 1 to the field `name` of shard 0, and subtract 1 from this field of shard 1.

    The sum over the shards stays the same.
    """
    shards[0][name] += 1
    shards[1][name] -= 1


MANIFEST: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "fingerprint of the store": (lambda d: d.update(fingerprint="0" * 64), "fingerprint of the store"),
    "fingerprint": (lambda d: train_split(d).update(fingerprint="0" * 64), "fingerprint"),
    "records": (lambda d: train_split(d).update(records=151), "151"),
    "bytes": (lambda d: train_split(d).update(bytes=1), "bytes of all shards"),
    "label_counts": (lambda d: train_split(d).update(label_counts=[50, 50, 51]), "records of all classes"),
    "label_counts moved": (
        lambda d: train_split(d).update(label_counts=[51, 49, 50]),
        "50 records of n0, the manifest says 51",
    ),
    "label_counts of a class more": (lambda d: train_split(d)["label_counts"].append(0), "classes with a count"),
    "kept": (lambda d: train_split(d)["account"].update(kept=149), "inputs kept"),
    "inputs": (lambda d: train_split(d)["account"].update(inputs=151), "inputs kept or bad"),
    "bad": (lambda d: train_split(d)["account"].update(bad={"empty file": 1}), "bad"),
    "a class renamed": (lambda d: d["classes"].__setitem__(1, "other"), "fingerprint"),
    "classes exchanged": (lambda d: d["classes"].reverse(), "fingerprint"),
    "shard digest": (lambda d: train_split(d)["shards"][1].update(digest="0" * 64), "fingerprint"),
    "shard records": (lambda d: train_split(d)["shards"][1].update(records=49), "records"),
    "shard bytes": (lambda d: train_split(d)["shards"][1].update(bytes=1), "bytes"),
    "shard records moved": (lambda d: move_one(train_split(d)["shards"], "records"), "train/00000: records"),
    "shard bytes moved": (lambda d: move_one(train_split(d)["shards"], "bytes"), "train/00000: bytes"),
    "shards exchanged": (lambda d: train_split(d)["shards"].reverse(), "fingerprint"),
    "shard left out": (lambda d: train_split(d)["shards"].pop(), "records of all shards"),
    "side": (lambda d: d["settings"].update(side_px=33), "pixels"),
    "format": (lambda d: d["settings"].update(format="jpeg"), "a PPM file, expected a JPEG file"),
    "seed": (lambda d: d["settings"].update(seed=1), "not in the order of seed 1"),
    "pixels": (lambda d: train_split(d).update(pixels=1), "pixels"),
}


@pytest.mark.parametrize("name", MANIFEST)
def test_a_manifest_that_does_not_agree_with_the_store_is_a_fault(
    name: str, copy_store: MakeStore, workers: WorkerPool
) -> None:
    store = copy_store(150)
    how, what = MANIFEST[name]
    change_manifest(store, how)
    try:
        texts = [fault.text() for fault in faults_of(store, workers)]
    except StoreError as error:  # the fields of the manifest do not agree with each other
        texts = [str(error)]
        assert "manifest.json: " in texts[0]
    assert any(what in text for text in texts), texts


def test_a_digest_of_a_shard_with_right_fingerprints_is_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(150)
    change_manifest(store, lambda data: train_split(data)["shards"][1].update(digest="0" * 64))
    sign_again(store)
    the_fault(store, workers, "train/00001: digest")


def test_exchanged_shards_with_a_right_fingerprint_are_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    """verify compares the keys of successive shards. From each shard to the next, the keys must ascend."""
    store = copy_store(150)
    change_manifest(store, lambda data: train_split(data)["shards"].reverse())
    sign_again(store)
    assert any("last key of the previous shard" in fault.what for fault in faults_of(store, workers))


@pytest.mark.parametrize("name", ["settings", "shards", "records", "label_counts", "moments", "account", "classes"])
def test_a_manifest_with_values_of_wrong_types_is_a_fault_or_a_store_error(
    name: str, copy_store: MakeStore, workers: WorkerPool
) -> None:
    """Every wrong value gives a fault, or a StoreError that names the file, and never another error."""
    store = copy_store(64)
    for value in (None, "x", -1, [[1]], {"a": {}}):
        change_manifest(
            store, lambda data, value=value: (data if name in data else train_split(data)).__setitem__(name, value)
        )
        try:
            texts = [fault.text() for fault in faults_of(store, workers)]
        except StoreError as error:
            texts = [str(error)]
        assert any("manifest" in text or "colour.json" in text for text in texts), texts


def set_moments(store: Path, moments: Moments) -> None:
    """Write `moments` to the manifest, and write a colour.json that agrees with them."""
    change_manifest(store, lambda data: train_split(data).update(moments=moments.to_json(), pixels=moments.pixels))
    stats = compute_color_stats(Store.open(store).split("train").records, moments)
    (store / "train" / "colour.json").write_text(json.dumps(stats.__dict__))


def test_a_change_of_one_in_any_moment_of_a_ppm_store_is_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    """The test changes one moment at a time: the number of pixels, 3 sums, and 9 sums of products."""
    store = copy_store(64)
    true = Moments.from_json(Store.open(store).split("train").moments)
    set_moments(store, true)
    assert faults_of(store, workers) == []
    with pytest.raises(StoreError, match=r"pixels is 65537, expected 65536"):
        set_moments(store, replace(true, pixels=true.pixels + 1))
    for channel in range(3):
        total = list(true.total)
        total[channel] += 1
        set_moments(store, replace(true, total=tuple(total)))
        the_fault(store, workers, "manifest.json", "moments")
        for other in range(3):
            outer = [list(row) for row in true.outer]
            outer[channel][other] -= 1
            if channel != other:
                with pytest.raises(StoreError, match=r"moments: outer\.\d\.\d is \d+, expected the value of outer"):
                    set_moments(store, replace(true, outer=tuple(map(tuple, outer))))
                outer[other][channel] -= 1
            set_moments(store, replace(true, outer=tuple(map(tuple, outer))))
            the_fault(store, workers, "manifest.json", "moments")
            assert faults_of(store, workers, decode=False) == []  # --quick reads no records


def shifted(true: Moments, levels: int) -> Moments:
    """Return the moments after `levels` is added to every pixel value. The covariance does not change."""
    n, t = true.pixels, true.total
    outer = tuple(tuple(true.outer[i][j] + levels * (t[i] + t[j]) + n * levels**2 for j in range(3)) for i in range(3))
    return Moments(n, tuple(s + n * levels for s in t), outer)


def test_moments_beyond_the_loss_of_jpeg_are_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    """JPEG compression cannot explain the changes of the mean, the covariance and the mean image in this test."""
    store = copy_store(150, "jpeg")
    true = Moments.from_json(Store.open(store).split("train").moments)
    set_moments(store, true)
    assert faults_of(store, workers) == []
    set_moments(store, shifted(true, 80))
    assert any("mean" in fault.what and fault.where == "manifest.json" for fault in faults_of(store, workers))
    # If the covariance is only a quarter of the true covariance, verify must report a fault.
    centred = [[true.outer[i][j] * true.pixels - true.total[i] * true.total[j] for j in range(3)] for i in range(3)]
    outer = tuple(tuple(true.outer[i][j] - 3 * centred[i][j] // (4 * true.pixels) for j in range(3)) for i in range(3))
    set_moments(store, replace(true, outer=outer))
    assert any("covariance" in fault.what for fault in faults_of(store, workers))
    set_moments(store, true)
    mean = np.load(store / "train" / "mean_image.npy")
    np.save(store / "train" / "mean_image.npy", mean + np.float32(150))
    assert {fault.where for fault in faults_of(store, workers)} == {"train/mean_image.npy"}


def test_a_changed_or_missing_colour_file_is_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(64)
    path = store / "train" / "colour.json"
    whole = json.loads(path.read_bytes())
    for name, value in whole.items():
        other = value + 1 if isinstance(value, int) else np.multiply(value, 1.00001).tolist()
        path.write_text(json.dumps({**whole, name: other}))
        assert the_fault(store, workers, "pca-stats").where == "train/colour.json"
    for content in (b"", b"{}", b"[]", b"\xff"):
        path.write_bytes(content)
        assert the_fault(store, workers).where == "train/colour.json"
    path.unlink()
    assert the_fault(store, workers, "pca-stats").where == "train/colour.json"
    assert alexprep("pca-stats", "--store", store).exit_code == 0
    assert faults_of(store, workers) == []


def test_a_changed_or_missing_mean_image_is_a_fault(copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(64)
    path = store / "train" / "mean_image.npy"
    whole = np.load(path)
    other = whole.copy()
    other[31, 31, 2] = np.nextafter(other[31, 31, 2], np.float32(0))
    for array in (other, whole[..., ::-1], whole[:31], whole.astype(np.float64)):
        np.save(path, array)
        assert the_fault(store, workers).where == "train/mean_image.npy"
    path.write_bytes(b"no array")
    the_fault(store, workers, "digest")
    path.unlink()
    the_fault(store, workers, "cannot be read")
    np.save(path, whole)
    assert faults_of(store, workers) == []


def test_a_changed_or_missing_inputs_log_is_a_fault(
    make_store: MakeStore, tmp_path: Path, build: Build, workers: WorkerPool
) -> None:
    """The test removes, adds or changes lines of inputs.jsonl."""
    (tmp_path / "photos" / "n0").mkdir(parents=True)
    Image.new("RGB", (40, 32), (9, 99, 199)).save(tmp_path / "photos" / "n0" / "a.png")
    (tmp_path / "photos" / "n0" / "bad.jpg").write_bytes(b"no picture")
    store = build(tmp_path / "photos", "--side", "32", "--format", "ppm", "--on-bad", "skip")
    path = store / "train" / "inputs.jsonl"
    assert faults_of(store, workers) == []
    converted, bad = path.read_text().splitlines()
    assert json.loads(converted)["fate"] == "converted" and json.loads(bad)["fate"] == "bad"
    for lines in (
        [converted],
        [bad],
        [],
        [converted, bad, bad],
        [converted, converted, bad],
        [converted, bad.replace('"why": "', '"why": "no ')],
        [converted.replace("png", "cmyk"), bad],
        [converted, bad, "{"],
        [converted, bad, '{"source": "x"}'],
        [converted, bad, "3"],
    ):
        path.write_text("".join(f"{line}\n" for line in lines))
        assert {fault.where for fault in faults_of(store, workers)} == {"train/inputs.jsonl"}, lines
    path.write_bytes(b"\xff\xfe")
    assert the_fault(store, workers, "digest").where == "train/inputs.jsonl"
    path.unlink()
    assert the_fault(store, workers, "cannot be read").where == "train/inputs.jsonl"

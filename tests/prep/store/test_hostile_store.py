"""Stores whose manifest or other files have false contents. Each store gives one StoreError, and no command hangs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.console import UserError
from prep.schema import decode
from prep.store.agreement import inconsistent_statistics
from prep.store.input_log import read_outcomes
from prep.store.manifest import Store, StoreError
from prep.store.models import ColorStats, Manifest
from prep.store.work_files import read_summary
from tests.helpers.damaged_stores import canonical_digest, change_manifest, sign_again

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def copied(store: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store, tmp_path / "store"))


def train(data: dict[str, Any]) -> dict[str, Any]:
    split: dict[str, Any] = data["splits"]["train"]
    return split


def refused(store: Path) -> str:
    with pytest.raises(StoreError) as caught:
        Store.open(store)
    assert str(caught.value).isprintable() and str(store / "manifest.json") in str(caught.value)
    return str(caught.value)


DISAGREEMENTS: dict[str, tuple[Change, str]] = {
    "class twice": (lambda d: d["classes"].__setitem__(1, d["classes"][0]), "classes has the name"),
    "class empty": (lambda d: d["classes"].__setitem__(1, ""), "classes.1 is"),
    "classes too few": (lambda d: d["classes"].pop(), "classes with a count"),
    "records": (lambda d: train(d).update(records=train(d)["records"] + 1), "records of all shards"),
    "bytes": (lambda d: train(d).update(bytes=train(d)["bytes"] + 1), "bytes of all shards"),
    "labels": (lambda d: train(d)["label_counts"].__setitem__(0, 10**6), "records of all classes"),
    "kept": (lambda d: train(d)["account"].update(kept=1), "inputs kept"),
    "inputs": (lambda d: train(d)["account"].update(inputs=10**9), "inputs kept or bad"),
    "files": (lambda d: train(d)["account"]["files"].update({"../x": "0" * 64}), "files with a digest"),
    "pixels": (lambda d: train(d).update(pixels=1), "pixels of the moments"),
    "both pixels": (lambda d: (train(d).update(pixels=5), train(d)["moments"].update(pixels=5)), "pixels is 5, "),
    "other split": (lambda d: train(d)["shards"][0].update(path="val/00000"), "expected train/NAME"),
    "outer asymmetric": (lambda d: train(d)["moments"]["outer"][0].__setitem__(1, 0), "expected the value of outer"),
    "total too large": (lambda d: train(d)["moments"]["total"].__setitem__(0, 10**15), "moments: total.0"),
    "outer too small": (lambda d: train(d)["moments"]["outer"][2].__setitem__(2, 0), "moments: outer.2.2"),
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_fields_that_do_not_agree_are_refused_although_all_digests_are_right(copied: Path, name: str) -> None:
    change, expected = DISAGREEMENTS[name]
    change_manifest(copied, change)
    sign_again(copied)
    assert expected in refused(copied)


@pytest.mark.timeout(20)
def test_a_name_that_occurs_twice_among_many_classes_is_found_at_once(copied: Path) -> None:
    """If each name were compared with all earlier names, this test would take an hour."""
    change_manifest(copied, lambda data: data.update(classes=[*map(str, range(400_000)), "399999"]))
    assert 'classes has the name "399999" twice' in refused(copied)


@pytest.mark.parametrize(
    "path",
    ["/etc", "../x", "train/../../x", "train/..", "train", "train//0", "train/0/1", "train/a\0", "train/\x1b[2J"],
)
def test_paths_that_leave_the_store_are_refused(copied: Path, path: str) -> None:
    change_manifest(copied, lambda data: train(data)["shards"][0].update(path=path))
    assert "shards.0.path is " in refused(copied)


def test_a_change_without_a_new_checksum_is_refused_with_both_checksums(copied: Path) -> None:
    data = json.loads((copied / "manifest.json").read_bytes())
    data["settings"]["seed"] += 1
    (copied / "manifest.json").write_text(json.dumps(data))
    old = data.pop("checksum")
    assert f"was changed: checksum {canonical_digest(data)}, the file says {old}" in refused(copied)


@pytest.mark.parametrize("name", ["manifest.json", "train/colour.json", "train/mean_image.npy", "train/inputs.jsonl"])
@pytest.mark.timeout(20)
def test_a_named_pipe_in_place_of_a_file_does_not_hang(copied: Path, name: str) -> None:
    (copied / name).unlink()
    os.mkfifo(copied / name)
    with pytest.raises(StoreError, match=r"named pipe \(FIFO\), expected a regular file"):
        opened = Store.open(copied)
        list(read_outcomes(copied / "train" / "inputs.jsonl"))
        opened.color_stats("train")
        opened.mean_image("train")


def test_a_shard_that_is_a_pipe_or_a_link_out_of_the_store_is_refused(copied: Path, tmp_path: Path) -> None:
    opened, file = Store.open(copied), copied / "train" / "00000" / "data.mdb"
    file.rename(tmp_path / "outside.mdb")
    os.mkfifo(file)
    with pytest.raises(StoreError, match=r"data\.mdb is missing from the store, or is not a regular file"):
        opened.shard_paths("train")
    file.unlink()
    file.symlink_to(tmp_path / "outside.mdb")
    with pytest.raises(StoreError, match=r"data\.mdb is a link to .*outside\.mdb, expected a file in the store"):
        opened.shard_paths("train")
    (tmp_path / "link").symlink_to(copied)
    file.unlink()
    (tmp_path / "outside.mdb").rename(file)
    assert Store.open(tmp_path / "link").shard_paths("train") == [str(tmp_path / "link" / "train" / "00000")]


def test_values_of_the_mean_image_are_bounded(copied: Path) -> None:
    opened, path = Store.open(copied), copied / "train" / "mean_image.npy"
    for value in (np.nan, np.inf, -1, 255.5):
        mean = np.full((256, 256, 3), 9, np.float32)
        mean[1, 2, 0] = value
        np.save(path, mean)
        with pytest.raises(StoreError, match=r"mean_image\.npy has values from .*, expected 0 to 255"):
            opened.mean_image("train")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"records": 1}, "records is 1, expected"),
        ({"covariance": [[1, 2, 3], [0, 1, 0], [3, 0, 1]]}, "covariance.0.1 is 2"),
        ({"covariance": [[1, 2], [2, 1]]}, "covariance is an array of 2 values"),
        ({"eigenvalues": [1, 2, 3]}, "expected descending values"),
        ({"stdevs": [1, 1, 1]}, "stdevs.0 is 1, expected the square root of eigenvalues.0"),
        ({"eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 1, 0]]}, "the product of the columns 1 and 1 is 2, expected 1"),
        ({"eigenvectors": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}, "from eigenvalues and eigenvectors"),
        ({"covariance": [[9, 0, 0], [0, 9, 0], [0, 0, 1e30]]}, "covariance.0.0 is 9"),
        ({"mean_rgb": [1, 2, 256]}, "mean_rgb.2 is 256, expected a number of at least 0 and at most 255"),
        ({"pixel_scale": 1}, "pixel_scale is 1"),
        ({"more": 1}, 'unknown field "more"'),
    ],
)
def test_colour_files_are_refused_in_one_line(copied: Path, change: dict[str, Any], expected: str) -> None:
    opened, path = Store.open(copied), copied / "train" / "colour.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **change}))
    with pytest.raises(StoreError) as caught:
        opened.color_stats("train")
    assert str(path) in str(caught.value) and expected in str(caught.value) and "pca-stats" in str(caught.value)


@pytest.mark.parametrize("scale", [1e-5, 1, 100])
def test_the_components_that_numpy_computes_are_consistent(scale: float) -> None:
    pixels = np.random.default_rng(0).normal(0, scale, (50, 3)) @ np.array([[1, 0.9, 0.8], [0, 0.3, 0.1], [0, 0, 0.02]])
    covariance = np.cov(pixels.T)
    values, vectors = np.linalg.eigh(covariance)
    order = np.argsort(-values)
    stats = ColorStats(
        records=50,
        pixels=50,
        mean_rgb=(9, 9, 9),
        covariance=covariance.tolist(),
        eigenvalues=values[order].tolist(),
        stdevs=np.sqrt(values[order]).tolist(),
        eigenvectors=vectors[:, order].tolist(),
        pixel_scale=255,
    )
    assert not list(inconsistent_statistics(stats))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"{}", "has no field source"),
        (b'{"source": "a", "fate": "lost"}', 'fate is "lost", expected bad or converted'),
        (b'{"source": "a", "fate": "bad"}', "has no field why"),
        (b'{"source": "a", "fate": "bad", "why": "x", "limit": "max_pixels"}', "has no field pixels"),
        (b'{"source": "a", "fate": "kept, with warnings", "warnings": []}', "warnings is an array of 0 values"),
        (b'{"source": "a\0", "fate": "kept"}', "cannot be read as JSON"),
        (b'{"source": ' + b"[" * 100_000, "levels deep"),
        (b'"' + b"a" * (1 << 20) + b'"', "more than 1,048,576 bytes"),
        (b"\xff", "cannot be read as UTF-8"),
    ],
)
def test_a_wrong_line_of_the_input_log_is_named(tmp_path: Path, line: bytes, expected: str) -> None:
    path = tmp_path / "inputs.jsonl"
    good = {"source": "a\u2028b", "fate": "converted", "how": ["png"], "newer": 1}
    path.write_bytes(json.dumps(good, ensure_ascii=False).encode() + b"\n" + line + b"\n")
    outcomes = read_outcomes(path)
    assert next(outcomes) == {name: good[name] for name in ("source", "fate", "how")}
    with pytest.raises(StoreError) as caught:
        next(outcomes)
    assert str(caught.value).startswith(f"{path}, line 2") and expected in str(caught.value)


def test_a_manifest_of_imagenet_opens_within_a_fifth_of_a_second(copied: Path) -> None:
    """The manifest has 1,281 shards of 1,000 records, and 1,000 classes. The test measures CPU time."""
    manifest = json.loads((copied / "manifest.json").read_bytes())
    split, count = train(manifest), 1_281_000
    classes = [f"n{number:08d}" for number in range(1000)]
    digests = [canonical_digest(number) for number in range(1281)]
    split["shards"] = [
        {"path": f"train/{number:05d}", "records": 1000, "bytes": 24_000_000, "digest": digest}
        for number, digest in enumerate(digests)
    ]
    pixels = count * 256**2
    split |= {"records": count, "bytes": 1281 * 24_000_000, "pixels": pixels, "label_counts": [1281] * 1000}
    outer = [[120**2 * pixels] * 3] * 3
    split["moments"] = {"pixels": pixels, "total": [120 * pixels] * 3, "outer": outer}
    split["account"] |= {"kept": count, "inputs": count + sum(split["account"]["bad"].values())}
    manifest |= {"classes": classes, "splits": {"train": split}}
    (copied / "manifest.json").write_text(json.dumps(manifest, indent=1))
    sign_again(copied)
    times_s = []
    for _ in range(3):
        start = time.process_time()
        opened = Store.open(copied)
        times_s.append(time.process_time() - start)
    assert opened.split("train").records == count and len(opened.split("train").shards) == 1281
    assert min(times_s) < 0.2
    content = (copied / "manifest.json").read_bytes()
    assert decode(Manifest, content, "manifest.json", "").splits["train"].records == count


def test_an_outcome_without_its_reason_in_a_summary_is_named(tmp_path: Path) -> None:
    shard = {"path": "train/00000", "records": 1, "bytes": 9, "digest": "0" * 64}
    summary = {"shard": shard, "labels": [[0, 1]], "fates": [{"source": "a.jpg", "fate": "bad"}]}
    (tmp_path / "00000.json").write_text(json.dumps(summary))
    with pytest.raises(UserError, match=r"00000\.json: fates\.0 has no field why, .* if fate is 'bad'"):
        read_summary(tmp_path / "00000.json", "train", 1)

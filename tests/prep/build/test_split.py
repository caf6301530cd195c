"""prep.build.split: the content of the store, and builds that are repeated, restarted, refused or simultaneous.

The tests read the records with lmdb and protobuf. The tests compare labels with the folders and the ground truth,
pixels with Pillow's resize in floating point, and sums with NumPy.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from prep.build.plan import BuildPolicy
from prep.cli import main
from prep.console import Progress, UserError
from prep.store import lmdb_shard
from prep.store.manifest import Settings, Store, StoreError
from prep.workers import WorkerPool
from tests.conftest import CLASSES
from tests.helpers.building import (
    PPM,
    Records,
    Stopped,
    StoppingRunner,
    UnusedRunner,
    build,
    decoded,
    image_paths,
    make_pictures,
    modification_times,
    record_sources,
    snapshot,
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 small images, which fill four shards."""
    return make_pictures(tmp_path_factory.mktemp("small") / "photos", 200, (30, 70))


@pytest.fixture(scope="module")
def small_store(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("small_store") / "store"
    build(small, store)
    return store


@pytest.fixture
def copy_of_small(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "photos"))


# The content of the store


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_record_holds_the_image_of_its_source(
    split: str, photo_folder: Path, tmp_path: Path, records_of: Records
) -> None:
    """The uncropped images are rescaled with the bilinear filter. They may differ from Pillow's result by rounding."""
    settings = Settings(48, True, "ppm", 90, "bilinear", 5)
    build(photo_folder / split, tmp_path / "store", settings, split=split)
    for _, datum in records_of(tmp_path / "store", split):
        with Image.open(photo_folder / split / os.fsdecode(datum.source)) as image:
            planes = image.convert("RGB").split()
        pixels = decoded(datum)
        assert pixels.shape == (datum.height, datum.width, 3)
        assert min(pixels.shape[:2]) == 48
        size = (datum.width, datum.height)
        floats = [Image.fromarray(np.asarray(plane, np.float32)) for plane in planes]
        expected = np.dstack([np.asarray(plane.resize(size, Image.Resampling.BILINEAR)) for plane in floats])
        assert np.abs(pixels - np.clip(expected, 0, 255)).max() <= 0.51


def test_training_labels_come_from_the_folders(store: Path, photo_folder: Path, records_of: Records) -> None:
    records = records_of(store, "train")
    names = sorted(path.name for path in (photo_folder / "train").iterdir())
    assert sorted(record_sources(records)) == image_paths(photo_folder / "train")
    for _, datum in records:
        assert datum.HasField("label")
        assert names[datum.label] == os.fsdecode(datum.source).split("/")[0]
    manifest = json.loads((store / "manifest.json").read_bytes())
    assert manifest["classes"] == names
    counts = Counter(path.split("/")[0] for path in image_paths(photo_folder / "train"))
    assert manifest["splits"]["train"]["label_counts"] == [counts[name] for name in names]


def test_validation_labels_come_from_the_label_file(store: Path, photo_folder: Path, records_of: Records) -> None:
    truth = dict(line.split() for line in (photo_folder / "val.txt").read_text().splitlines())
    expected = {name: CLASSES.index(label) for name, label in truth.items()}
    assert {datum.source.decode(): datum.label for _, datum in records_of(store, "val")} == expected


def test_default_records_are_jpegs_of_the_central_square(store: Path, records_of: Records) -> None:
    for split in ("train", "val"):
        for _, datum in records_of(store, split):
            assert (datum.height, datum.width, datum.channels) == (256, 256, 3)
            with Image.open(io.BytesIO(datum.data)) as image:
                assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))


def test_keys_count_up_from_zero(small_store: Path, records_of: Records) -> None:
    keys = [key for key, _ in records_of(small_store, "train")]
    assert keys == [f"{i:08d}".encode() for i in range(200)]
    assert len(list((small_store / "train").glob("0*"))) == 4


def test_mean_image_is_the_mean_of_central_squares(small: Path, tmp_path: Path, records_of: Records) -> None:
    build(small, tmp_path / "store", replace(PPM, keep_aspect=True))
    squares = []
    for _, datum in records_of(tmp_path / "store", "train"):
        top, left = (datum.height - 32) // 2, (datum.width - 32) // 2
        squares.append(decoded(datum)[top : top + 32, left : left + 32].astype(np.float64))
    assert max(datum.width for _, datum in records_of(tmp_path / "store", "train")) > 32
    mean = np.load(tmp_path / "store" / "train" / "mean_image.npy")
    assert mean.dtype == np.float32
    np.testing.assert_allclose(mean, np.mean(squares, axis=0), rtol=1e-6)


def test_bytes_and_pixels_are_counted(small_store: Path, records_of: Records) -> None:
    split = Store.open(small_store).split("train")
    assert split.pixels == 200 * 32 * 32
    assert split.records == sum(s.records for s in split.shards) == 200
    assert split.bytes == sum(s.bytes for s in split.shards)
    assert split.bytes == sum(len(value) for s in split.shards for _, value in lmdb_shard.read(small_store / s.path))


# The order of the records


def test_the_record_order_is_a_permutation_that_depends_on_the_seed_alone(
    small: Path, small_store: Path, tmp_path: Path, records_of: Records
) -> None:
    order = record_sources(records_of(small_store, "train"))
    assert sorted(order) == image_paths(small)
    assert order != sorted(order)
    for number, changed in enumerate((replace(PPM, side_px=40), replace(PPM, format="jpeg", quality=50))):
        build(small, tmp_path / str(number), changed)
        assert record_sources(records_of(tmp_path / str(number), "train")) == order
    build(small, tmp_path / "seed", replace(PPM, seed=1))
    other = record_sources(records_of(tmp_path / "seed", "train"))
    assert sorted(other) == sorted(order)
    assert sum(a == b for a, b in zip(order, other, strict=True)) < 10


def test_the_record_order_mixes_the_classes(small_store: Path, records_of: Records) -> None:
    """For each class, the mean position of its records is near the middle of the split.

    In a random order, the expected value of this mean is the middle. The test allows 5 standard deviations.
    """
    labels = np.array([datum.label for _, datum in records_of(small_store, "train")])
    n = len(labels)
    for label in range(3):
        positions = np.flatnonzero(labels == label)
        k = len(positions)
        spread = np.sqrt((n + 1) * (n - k) / (12 * k))
        assert abs(positions.mean() - (n - 1) / 2) < 5 * spread


def test_the_order_of_the_others_stays_when_an_input_is_removed(
    small_store: Path, copy_of_small: Path, tmp_path: Path, records_of: Records
) -> None:
    order = record_sources(records_of(small_store, "train"))
    (copy_of_small / order[17]).unlink()
    build(copy_of_small, tmp_path / "store")
    assert record_sources(records_of(tmp_path / "store", "train")) == order[:17] + order[18:]


# WorkerPool


def test_any_number_of_jobs_gives_the_same_records(
    small: Path, small_store: Path, tmp_path: Path, records_of: Records
) -> None:
    expected = [(key, datum.SerializeToString()) for key, datum in records_of(small_store, "train")]
    whole = Store.open(small_store)
    for jobs in (1, 2, 3):
        path = tmp_path / str(jobs)
        progress = Progress(200, "pictures")
        with WorkerPool(jobs) as workers:
            built = build(small, path, runner=workers, progress=progress)
        assert built.fingerprint == whole.fingerprint
        assert built.splits == whole.splits
        assert [(key, datum.SerializeToString()) for key, datum in records_of(path, "train")] == expected
        mean = (small_store / "train" / "mean_image.npy").read_bytes()
        assert (path / "train" / "mean_image.npy").read_bytes() == mean
        assert (progress.done, progress.bad, progress.size_bytes) == (200, 0, whole.split("train").bytes)
        assert not (path / "train" / ".build").exists()


# Repeated, changed and simultaneous builds


def test_a_repeated_build_writes_nothing(small: Path, small_store: Path) -> None:
    before, fingerprint = modification_times(small_store), Store.open(small_store).fingerprint
    progress = Progress(200, "pictures")
    assert build(small, small_store, runner=UnusedRunner(), progress=progress).fingerprint == fingerprint
    assert modification_times(small_store) == before
    assert progress.done == progress.skipped == 200


CHANGES = [
    ({"side_px": 40}, "--side 32", "40"),
    ({"keep_aspect": True}, "--keep-aspect False", "True"),
    ({"format": "jpeg"}, "--format ppm", "jpeg"),
    ({"quality": 75}, "--quality 90", "75"),
    ({"filter": "lanczos"}, "--filter area", "lanczos"),
    ({"seed": 9}, "--seed 0", "9"),
]


@pytest.mark.parametrize(("changes", "has", "asked"), CHANGES)
def test_a_finished_split_refuses_other_settings(
    changes: dict[str, Any], has: str, asked: str, small: Path, small_store: Path
) -> None:
    before = modification_times(small_store)
    with pytest.raises(UserError, match=f"{has}, this command has {asked}"):
        build(small, small_store, replace(PPM, **changes))
    assert modification_times(small_store) == before


def test_an_unfinished_build_refuses_other_settings(small: Path, small_store: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build(small, store, runner=StoppingRunner())
    for changes, has, asked in CHANGES:
        with pytest.raises(UserError, match=f"{has}, this command has {asked}"):
            build(small, store, replace(PPM, **changes))
    assert build(small, store).fingerprint == Store.open(small_store).fingerprint


def test_a_finished_split_refuses_other_inputs(small: Path, copy_of_small: Path, tmp_path: Path) -> None:
    build(small, tmp_path / "whole")
    before = modification_times(tmp_path / "whole")
    (copy_of_small / image_paths(copy_of_small)[0]).unlink()
    with pytest.raises(UserError, match=r"a split train of other inputs \(200 inputs then, 199 now\)"):
        build(copy_of_small, tmp_path / "whole")
    assert modification_times(tmp_path / "whole") == before


def test_a_folder_that_alexprep_did_not_begin_is_left_alone(small: Path, tmp_path: Path) -> None:
    (tmp_path / "store" / "train").mkdir(parents=True)
    (tmp_path / "store" / "train" / "precious.txt").write_text("mine")
    with pytest.raises(StoreError, match="was not begun by alexprep"):
        build(small, tmp_path / "store")
    with pytest.raises(StoreError, match="was not begun by alexprep"):
        build(small, tmp_path / "store", policy=BuildPolicy(restart=True))
    assert (tmp_path / "store" / "train" / "precious.txt").read_text() == "mine"


def test_a_second_split_is_added_to_the_store(small: Path, tmp_path: Path, records_of: Records) -> None:
    store = tmp_path / "store"
    first = build(small, store)
    both = build(small, store, split="val")
    assert list(both.splits) == ["train", "val"]
    assert both.splits["train"] == first.splits["train"]
    assert both.fingerprint != first.fingerprint
    assert len(records_of(store, "train")) == len(records_of(store, "val")) == 200
    with pytest.raises(UserError, match="--side 32, this command has 64"):
        build(small, store, replace(PPM, side_px=64), split="val")


def test_a_second_build_at_the_same_time_is_refused(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with open(store / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another build is at work"):
            build(small, store)
        assert [path.name for path in store.iterdir()] == [".lock"]
    build(small, store)


def test_restart_discards_an_unfinished_build(small: Path, tmp_path: Path) -> None:
    """After a build with `restart`, the store has the same files as after an uninterrupted build."""
    store = tmp_path / "store"
    with pytest.raises(Stopped):
        build(small, store, replace(PPM, side_px=40), runner=StoppingRunner(2))
    progress = Progress(200, "pictures")
    built = build(small, store, policy=BuildPolicy(restart=True), progress=progress)
    assert progress.skipped == 0
    assert built.settings == PPM
    fresh = build(small, tmp_path / "fresh")
    assert built.fingerprint == fresh.fingerprint
    assert [path.relative_to(store) for path in sorted(store.rglob("*"))] == [
        path.relative_to(fresh.root) for path in sorted(fresh.root.rglob("*"))
    ]


def test_restart_leaves_a_finished_split_as_it_is(small: Path, tmp_path: Path) -> None:
    build(small, tmp_path / "store")
    before = modification_times(tmp_path / "store")
    build(small, tmp_path / "store", policy=BuildPolicy(restart=True), runner=UnusedRunner())
    assert modification_times(tmp_path / "store") == before


def test_restart_of_one_split_leaves_the_other_as_it_is(small: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    build(small, store)
    before = modification_times(store / "train")
    with pytest.raises(Stopped):
        build(small, store, split="val", runner=StoppingRunner())
    assert list(build(small, store, split="val", policy=BuildPolicy(restart=True)).splits) == ["train", "val"]
    assert modification_times(store / "train") == before


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("where", ["same", "split", "inside", "link"])
def test_a_store_in_its_own_source_is_refused(small: Path, tmp_path: Path, restart: bool, where: str) -> None:
    """Nothing in the source is changed, with or without --restart."""
    shutil.copytree(small, tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / ".someone.tmp").write_text("mine")
    (tmp_path / "link").symlink_to("data")
    store = {"same": "data", "split": "data/train", "inside": "data/train/n1/store", "link": "link"}[where]
    before = snapshot(tmp_path / "data")
    with pytest.raises(UserError, match=str(tmp_path / "data" / "train")):
        build(tmp_path / "data" / "train", tmp_path / store, policy=BuildPolicy(restart=restart))
    assert snapshot(tmp_path / "data") == before


def test_the_source_is_only_read(small: Path, tmp_path: Path) -> None:
    """The folders of the source are write-protected. The times and contents of the source's files must not change."""
    photos = Path(shutil.copytree(small, tmp_path / "photos"))
    (photos / "n1" / "bad.JPEG").write_bytes(b"no picture")
    for folder in (photos, *photos.glob("*")):
        folder.chmod(0o555)
    before = snapshot(photos)
    try:
        with pytest.raises(UserError):
            build(photos, tmp_path / "store")
        with pytest.raises(Stopped):
            build(photos, tmp_path / "store", policy=BuildPolicy(skip_bad=True), runner=StoppingRunner())
        build(photos, tmp_path / "store", policy=BuildPolicy(skip_bad=True, restart=True))
        words = ["build-lmdb", str(photos), "--store", str(tmp_path / "store"), "--dry-run"]
        CliRunner().invoke(main, [*words, "--side", "32", "--format", "ppm", "--jobs", "1"])
        assert snapshot(photos) == before
    finally:
        for folder in (photos, *photos.glob("*")):
            folder.chmod(0o755)

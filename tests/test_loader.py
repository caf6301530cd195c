"""The loaders: every image of an evaluation once, epochs, repeatability, resumption, refusals.

Each picture of `numbered` has its own number in its label, so a batch's labels say which records it holds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import Augmentation
from pipeline.loader import GRAPH_VERSION, Batch, eval_loader, train_loader
from pipeline.placement import Placement
from prep.console import UserError
from prep.manifest import Store, StoreError

RECORDS = 37


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory, build) -> Path:
    """A store of 37 training and 23 validation pictures whose labels are their numbers."""
    source = tmp_path_factory.mktemp("numbered")
    rng = np.random.default_rng(0)
    for split, n in (("train", RECORDS), ("val", 23)):
        (source / split).mkdir()
        for k in range(n):
            picture = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(picture).resize((260 + k, 256)).save(source / split / f"{k:03d}.jpg")
    labels = source / "numbers.txt"
    labels.write_text("".join(f"{k:03d}.jpg {k}\n" for k in range(RECORDS)))
    return build(source, "--labels", str(labels))


def labels_of(loader) -> list[list[int]]:
    return [batch.labels.tolist() for batch in loader]


@pytest.mark.parametrize("batch_size", [1, 7, 23, 50])
@pytest.mark.parametrize("views", [1, 10])
def test_evaluation_serves_every_image_once_each_time(numbered: Path, batch_size: int, views: int) -> None:
    with eval_loader(numbered, batch_size, views=views) as loader:
        for _ in range(3):
            batches = list(loader)
            assert len(batches) == len(loader)
            assert sorted(label for batch in batches for label in batch.labels.tolist()) == list(range(23))
            for batch in batches:
                wanted = (len(batch.labels), 10, 3, 224, 224) if views == 10 else (len(batch.labels), 3, 224, 224)
                assert tuple(batch.images.shape) == wanted
                assert batch.images.dtype == torch.float32 and batch.labels.dtype == torch.int64


def test_a_pass_that_is_left_early_does_not_shift_the_next(numbered: Path) -> None:
    with eval_loader(numbered, 5) as loader:
        whole = labels_of(loader)
        next(iter(loader))
        assert labels_of(loader) == whole


def test_epochs_hold_whole_batches_and_serve_all_records_alike(numbered: Path) -> None:
    with train_loader(numbered, 10) as loader:
        assert len(loader) == 3
        epochs = [labels_of(loader) for _ in range(37)]  # 37 × 30 images are 30 passes
    assert all([len(batch) for batch in epoch] == [10, 10, 10] for epoch in epochs)
    counts = Counter(label for epoch in epochs for batch in epoch for label in batch)
    assert len(counts) == RECORDS and set(counts.values()) == {30}
    assert epochs[0] != epochs[1]


def test_same_seed_gives_the_same_bits_for_any_number_of_threads(numbered: Path) -> None:
    def first(seed: int, threads: int) -> list[Batch]:
        with train_loader(numbered, 12, seed=seed, threads=threads) as loader:
            return list(loader)

    one, four, other = first(5, 1), first(5, 4), first(6, 1)
    for a, b in zip(one, four, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
    assert not all(torch.equal(a.images, b.images) for a, b in zip(one, other, strict=True))


def test_batches_may_be_kept_and_changed(numbered: Path) -> None:
    with train_loader(numbered, 12, seed=1) as loader:
        kept = [batch for _ in range(4) for batch in loader]
    with train_loader(numbered, 12, seed=1) as loader:
        for batch, before in zip((b for _ in range(4) for b in loader), kept, strict=True):
            assert torch.equal(batch.images, before.images)
            batch.images.zero_()


@pytest.mark.parametrize("after", [0, 1, 3, 4, 8])
def test_a_state_continues_to_the_bit_in_a_new_process(numbered: Path, tmp_path: Path, after: int) -> None:
    with train_loader(numbered, 10, seed=2) as loader:
        for count, _ in enumerate((b for _ in range(9) for b in loader), 1):
            if count == after:
                break
        state = loader.state_dict() if after else None
        if state is None:
            state = train_loader(numbered, 10, seed=2).state_dict()
            loader = train_loader(numbered, 10, seed=2)
        wanted = [batch for _ in range(2) for batch in loader]
    (tmp_path / "state.json").write_text(json.dumps(state))
    script = (
        "import json, sys, torch\n"
        "from pipeline.loader import train_loader\n"
        "loader = train_loader(sys.argv[1], 10, seed=2)\n"
        "loader.load_state_dict(json.load(open(sys.argv[2] + '/state.json')))\n"
        "torch.save([tuple(b) for _ in range(2) for b in loader], sys.argv[2] + '/got.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(numbered), str(tmp_path)], check=True)
    got = torch.load(tmp_path / "got.pt")
    assert len(got) == len(wanted)
    for (images, labels), batch in zip(got, wanted, strict=True):
        assert torch.equal(images, batch.images) and torch.equal(labels, batch.labels)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("graph_version", GRAPH_VERSION + 1),
        ("store_fingerprint", "0" * 64),
        ("split", "val"),
        ("batch_size", 11),
        ("seed", 3),
        ("augmentation", {}),
        ("device_kind", "mixed"),
    ],
)
def test_a_state_of_something_else_is_refused_by_name(numbered: Path, name: str, other: object) -> None:
    with train_loader(numbered, 10, seed=2) as loader:
        state = {**loader.state_dict(), name: other}
        with pytest.raises(UserError, match=name.replace("_", " ")):
            loader.load_state_dict(state)


def test_a_batch_larger_than_the_split_is_refused_with_both_numbers(numbered: Path) -> None:
    with pytest.raises(UserError, match=r"37 records in train, a batch takes 64"):
        train_loader(numbered, 64)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "cuda:x", ""])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(UserError, match="device"):
        Placement.of(device)


def test_views_are_one_or_ten(numbered: Path) -> None:
    with pytest.raises(UserError, match="views 5"):
        eval_loader(numbered, views=5)


def test_a_split_that_is_not_there_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match="no split test"):
        eval_loader(stores["jpeg"], split="test")


def test_pictures_smaller_than_the_window_are_refused(photo_folder: Path, build) -> None:
    small = build(photo_folder, "--side", "200", "--split", "train")
    with pytest.raises(UserError, match="200 px, the window is 224 px"):
        train_loader(small, 4)


def test_a_record_that_cannot_be_decoded_stops_the_stream_with_its_key(stores: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    import lmdb

    broken = tmp_path / "store"
    shutil.copytree(stores["jpeg"], broken)
    folder = Store.open(broken).shard_paths("val")[0]
    with lmdb.open(folder, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        key, value = next(iter(txn.cursor()))
        txn.put(key, value[:12] + b"\0" * 3000)
    with pytest.raises(StoreError, match="DALI stopped") as stopped, eval_loader(broken, 4) as loader:
        list(loader)
    said = str(stopped.value)
    assert "\n" not in said and "Critical error" not in said and "pca-stats --recompute" in said


def test_means_of_evaluation_are_the_training_splits(stores: dict[str, Path]) -> None:
    with (
        eval_loader(stores["jpeg"], 8) as plain,
        eval_loader(stores["jpeg"], 8, augmentation=Augmentation("none")) as raw,
    ):
        difference = next(iter(raw)).images - next(iter(plain)).images
    mean = Store.open(stores["jpeg"]).colour("train").mean_rgb
    assert np.allclose(difference.mean((0, 2, 3)).numpy(), mean, atol=1e-3)
    assert not np.allclose(mean, Store.open(stores["jpeg"]).colour("val").mean_rgb, atol=1e-3)

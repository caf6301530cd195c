"""pipeline.records compared with lmdb_shard.read and Datum.decode, also for missing keys and damaged records."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from pipeline.loader import eval_loader, train_loader
from pipeline.records import Records
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Shard, Store, StoreError
from tests.conftest import Build


def stored(store: Store, split: str) -> list[tuple[str, bytes, Datum]]:
    """(folder, key, Datum) of every record, in the order of the store."""
    paths = store.shard_paths(split)
    return [(path, key, Datum.decode(value)) for path in paths for key, value in lmdb_shard.read(Path(path))]


def cut_into_shards(source: Path, target: Path, sizes: list[int]) -> Store:
    """A copy of a store; shard k of the copy's training split has sizes[k] records."""
    shutil.copytree(source, target)
    store = Store.open(target)
    records = [(key, datum.encode()) for _, key, datum in stored(store, "train")]
    shutil.rmtree(target / "train" / "00000")
    shards = []
    for count, size in enumerate(sizes):
        part, records = records[:size], records[size:]
        written = lmdb_shard.write(target / "train" / f"{count:05d}", part)
        shards.append(Shard(f"train/{count:05d}", *written))
    assert not records
    split = replace(store.split("train"), shards=tuple(shards))
    replace(store, splits={**store.splits, "train": split}).save()
    return Store.open(target)


def assert_records_equal_datums(store: Store, split: str) -> None:
    records, expected = Records(store, split), stored(store, split)
    assert len(records) == len(expected)
    for number in np.random.default_rng(3).permutation(len(expected)).tolist():
        _, _, datum = expected[number]
        payload, *numbers = records[number]
        assert numbers == [datum.height, datum.width, datum.label]
        assert payload.dtype == np.uint8
        if store.settings.format == "ppm":
            assert np.array_equal(payload, np.asarray(Image.open(io.BytesIO(datum.data))))
        else:
            assert payload.tobytes() == datum.data
        assert not payload.flags.writeable and not payload.flags.owndata
        assert records.find_damage(number) == ""
    del payload
    records.close()


@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_record_is_the_datum_that_was_written(stores: dict[str, Path], kind: str, split: str) -> None:
    assert_records_equal_datums(Store.open(stores[kind]), split)


@pytest.mark.parametrize("sizes", [[30], [1, 29], [10, 10, 10], [0, 3, 0, 26, 1, 0], [1] * 30])
def test_records_are_numbered_across_shards(stores: dict[str, Path], tmp_path: Path, sizes: list[int]) -> None:
    store = cut_into_shards(stores["ppm"], tmp_path / "store", sizes)
    assert_records_equal_datums(store, "train")
    expected = stored(store, "train")
    records = Records(store, "train")
    for number, (path, key, datum) in enumerate(expected):
        assert records.location(number) == f"{path}, key {key.decode()}, source {datum.source.decode()}"
    records.close()


def test_the_division_into_shards_does_not_change_the_stream(stores: dict[str, Path], tmp_path: Path) -> None:
    store = cut_into_shards(stores["jpeg"], tmp_path / "store", [7, 1, 12, 10])
    for make in (train_loader, eval_loader):
        options = {"split": "train", "batch_size": 8}
        with make(stores["jpeg"], **options) as one, make(store.root, **options) as four:
            for a, b in zip(one, four, strict=True):
                assert np.array_equal(a.images.numpy(), b.images.numpy()) and a.labels.tolist() == b.labels.tolist()


@pytest.fixture(scope="module")
def with_gaps(photo_folder: Path, tmp_path_factory: pytest.TempPathFactory, build: Build) -> Store:
    """A store built with --on-bad skip from a source with six unreadable files. The keys of these files are missing."""
    source = tmp_path_factory.mktemp("gaps") / "photos"
    shutil.copytree(photo_folder, source)
    for path in sorted((source / "train").rglob("*.JPEG"))[::5]:
        path.write_bytes(b"not an image")
    return Store.open(build(source, "--split", "train", "--on-bad", "skip"))


def test_record_numbers_are_consecutive_although_keys_are_missing(with_gaps: Store) -> None:
    keys = [int(key) for _, key, _ in stored(with_gaps, "train")]
    assert len(keys) == 24 and keys != list(range(keys[0], keys[0] + 24))
    assert_records_equal_datums(with_gaps, "train")


def test_loaders_serve_every_record_of_a_store_with_missing_keys(with_gaps: Store) -> None:
    expected = [datum.label for _, _, datum in stored(with_gaps, "train")]
    with eval_loader(with_gaps.root, 7, split="train") as loader:
        assert [label for batch in loader for label in batch.labels.tolist()] == expected
    with train_loader(with_gaps.root, 8) as loader:
        assert sum(len(batch.labels) for batch in loader) == 24


def test_several_threads_may_open_a_shard_at_the_same_time(stores: dict[str, Path], tmp_path: Path) -> None:
    store = cut_into_shards(stores["jpeg"], tmp_path / "store", [1] * 30)
    expected = [datum.data for _, _, datum in stored(store, "train")]
    with ThreadPoolExecutor(4) as threads:
        for _ in range(15):
            records = Records(store, "train")
            payloads = list(threads.map(lambda number: records[number // 4].payload.tobytes(), range(120)))  # noqa: B023
            assert payloads == [data for data in expected for _ in range(4)]
            records.close()
    # LMDB refuses to open a file twice in a process. This call therefore fails if records.close() left a shard open.
    lmdb.open(str(tmp_path / "store/train/00007"), readonly=True, lock=False).close()


def test_closed_records_open_again_at_the_next_read(stores: dict[str, Path]) -> None:
    records = Records(Store.open(stores["jpeg"]), "train")
    first = records[3].payload.tobytes()
    records.close()
    assert records[3].payload.tobytes() == first
    records.close()


def test_a_split_that_the_store_lacks_is_refused(stores: dict[str, Path]) -> None:
    with pytest.raises(StoreError, match="no split test"):
        Records(Store.open(stores["jpeg"]), "test")


Change = Callable[[bytes], bytes]


def datum_with(**changes: object) -> Change:
    return lambda value: replace(Datum.decode(value), **changes).encode()


def longer(value: bytes) -> bytes:
    datum = Datum.decode(value)
    return replace(datum, data=datum.data + b"\0").encode()


DAMAGE: dict[str, tuple[str, Change, str]] = {
    "label too large": ("jpeg", datum_with(label=3), "label 3, the store has 3 classes"),
    "label beyond 32 bits": ("jpeg", datum_with(label=2**40), "label 1099511627776, the store has 3 classes"),
    "empty": ("jpeg", lambda value: b"", "not a record of this format"),
    "first half": ("jpeg", lambda value: value[: len(value) // 2], "not a record of this format"),
    "another message": ("jpeg", lambda value: b"\x08\x01" + value, "not a record of this format"),
    "pixels too few": ("ppm", datum_with(data=bytes(100)), "bytes of pixels"),
    "pixels too many": ("ppm", longer, r"bytes of pixels, expected 256×256×3"),
    "another height": ("ppm", datum_with(height=255), r"bytes of pixels, expected 256×255×3"),
    "sides too large": ("ppm-whole", datum_with(height=2**20, width=2**30), "bytes of pixels"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_refused_with_its_location(stores: dict[str, Path], tmp_path: Path, damage: str) -> None:
    kind, change, reason = DAMAGE[damage]
    root = Path(shutil.copytree(stores[kind], tmp_path / "store"))
    store = Store.open(root)
    path, key, datum = stored(store, "val")[7]
    with lmdb.open(path, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        txn.put(key, change(txn.get(key)))
    records = Records(store, "val")
    with pytest.raises(StoreError, match=reason) as refused:
        records[7]
    location = f"{path}, key {key.decode()}"
    assert str(refused.value).startswith(location)
    assert str(refused.value).endswith(f"alexprep verify --store {root}")
    assert records.location(7).startswith(location) and records.find_damage(7)
    if damage not in ("empty", "first half"):
        assert f"source {datum.source.decode()}" in records.location(7)
    assert all(records.find_damage(number) == "" for number in range(12) if number != 7)
    records.close()


def test_find_damage_verifies_the_checksum_and_reading_does_not(stores: dict[str, Path], tmp_path: Path) -> None:
    """Checksums cost time, so they are verified only after DALI has failed."""
    store = Store.open(Path(shutil.copytree(stores["jpeg"], tmp_path / "store")))
    path, key, _ = stored(store, "val")[2]
    with lmdb.open(path, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        value = bytearray(txn.get(key))
        value[-20] ^= 1
        txn.put(key, bytes(value))
    records = Records(store, "val")
    assert "checksum" in records.find_damage(2) and records.find_damage(1) == ""
    records[2]
    records.close()

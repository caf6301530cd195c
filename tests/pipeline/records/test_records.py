"""pipeline.records returns what lmdb_shard.read and Datum.decode return, also in a store that lacks some keys."""

from __future__ import annotations

import io
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from pipeline.loader import eval_loader, train_loader
from pipeline.records import RecordBatch, Records
from prep.store import kernels, lmdb_shard
from prep.store.manifest import Shard, Store, StoreError, split_fingerprint
from tests.conftest import Build
from tests.pipeline.records.conftest import assert_batch_holds_records, stored


def cut_into_shards(source: Path, target: Path, sizes: list[int]) -> Store:
    """Return a copy of a store; shard k of the copy's training split has sizes[k] records."""
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
    fingerprint = split_fingerprint(store.classes, shards)
    split = replace(store.split("train"), shards=tuple(shards), fingerprint=fingerprint)
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


@pytest.mark.parametrize("sizes", [[30], [1, 29], [10, 10, 10], [3, 26, 1], [1] * 30])
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
    """A store that was built with --on-bad skip from a source with six unreadable files.

    The store has no records for these files, so its keys are not consecutive numbers.
    """
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
    # lmdb.open fails if records.close() left the shard open, because LMDB refuses to open a file twice in a process.
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


needs_kernels = pytest.mark.skipif(kernels.native is None, reason="the kernels were not compiled")


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("kind", ["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def test_a_batch_holds_the_records_in_the_given_order(stores: dict[str, Path], kind: str) -> None:
    """Records of a batch differ in size, and a record may occur twice."""
    records = Records(Store.open(stores[kind]), "train")
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    for numbers in (order, order[:1], [7, 3, 3, 7], []):
        assert_batch_holds_records(records, numbers)
    records.close()
    assert_batch_holds_records(records, order)  # `batch` maps the shards again
    records.close()


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("sizes", [[10, 10, 10], [3, 26, 1], [1] * 30])
def test_a_batch_spans_shards(stores: dict[str, Path], tmp_path: Path, sizes: list[int]) -> None:
    records = Records(cut_into_shards(stores["jpeg-whole"], tmp_path / "store", sizes), "train")
    for numbers in ([29], [0, 29, 1], np.random.default_rng(1).permutation(30).tolist()):
        assert_batch_holds_records(records, numbers)
    records.close()


@pytest.mark.usefixtures("search")
def test_a_batch_of_a_store_with_missing_keys(with_gaps: Store) -> None:
    records = Records(with_gaps, "train")
    assert_batch_holds_records(records, np.random.default_rng(2).permutation(24).tolist())
    records.close()


@needs_kernels
def test_the_c_library_finds_every_intact_record_itself(
    stores: dict[str, Path], with_gaps: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow search, which reads records one by one, is never used for intact records."""

    def refuse(self: Records, number: int) -> None:
        raise AssertionError(f"record {number} was read by the slow search")

    monkeypatch.setattr(Records, "__getitem__", refuse)
    for store in (*map(Store.open, stores.values()), with_gaps):
        records = Records(store, "train")
        assert len(records.batch(np.arange(len(records))).labels) == len(records)
        records.close()


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("numbers", [[0, 30], [-1], [3, 2**40]])
def test_a_batch_of_records_beyond_the_split_is_refused(stores: dict[str, Path], numbers: list[int]) -> None:
    records = Records(Store.open(stores["jpeg"]), "train")
    with pytest.raises(IndexError, match="expected 0 to 29"):
        records.batch(np.array(numbers, np.int64))


@needs_kernels
def test_threads_make_batches_of_shards_that_are_not_open_yet(stores: dict[str, Path], tmp_path: Path) -> None:
    store = cut_into_shards(stores["jpeg"], tmp_path / "store", [1] * 30)
    expected = [datum.data for _, _, datum in stored(store, "train")]

    def payloads(records: Records, seed: int) -> bool:
        numbers = np.random.default_rng(seed).permutation(30)
        batch: RecordBatch = records.batch(numbers)
        found = [payload.tobytes() for payload in batch.payloads()]
        return found == [expected[number] for number in numbers]

    with ThreadPoolExecutor(4) as threads:
        for _ in range(15):
            records = Records(store, "train")
            assert all(threads.map(payloads, [records] * 20, range(20)))
            records.close()
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) not in maps

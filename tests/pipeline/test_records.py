"""pipeline.records is compared with lmdb_shard.read and Datum.decode, also for missing keys and damaged records."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from pipeline.loader import eval_loader, train_loader
from pipeline.records import RecordBatch, Records
from prep.images.codec import ppm_header
from prep.images.jpeg import encode_jpeg
from prep.store import kernels, lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Shard, Store, StoreError, split_fingerprint
from tests.conftest import Build


def stored(store: Store, split: str) -> list[tuple[str, bytes, Datum]]:
    """Return (folder, key, Datum) of every record, in the order of the store."""
    paths = store.shard_paths(split)
    return [(path, key, Datum.decode(value)) for path in paths for key, value in lmdb_shard.read(Path(path))]


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

    The keys of the unreadable files are missing in the store.
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


@pytest.fixture(params=["C library", "py-lmdb"])
def search(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A test that uses this fixture runs with the C library and without."""
    if request.param == "py-lmdb":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the kernels were not compiled")
    return str(request.param)


def assert_batch_holds_records(records: Records, numbers: list[int]) -> None:
    batch, expected = records.batch(np.array(numbers, np.int64)), [records[number] for number in numbers]
    assert batch.numbers.tolist() == numbers
    assert batch.labels.tolist() == [record.label for record in expected]
    assert batch.sizes.tolist() == [[record.height, record.width] for record in expected]
    assert batch.payload_bytes.tolist() == [record.payload.size for record in expected]
    assert [array.dtype for array in batch[:5]] == [np.int64, np.int64, np.int32, np.uint64, np.int64]
    for payload, record in zip(batch.payloads(), expected, strict=True):
        assert payload.shape == record.payload.shape and np.array_equal(payload, record.payload)
        assert not payload.flags.writeable


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
        raise AssertionError(f"record {number} was read one by one")

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


Change = Callable[[bytes], bytes]


def datum_with(**changes: object) -> Change:
    return lambda value: replace(Datum.decode(value), **changes).encode()


def longer(value: bytes) -> bytes:
    datum = Datum.decode(value)
    return replace(datum, data=datum.data + b"\0").encode()


def wider(value: bytes) -> bytes:
    """Make the image wider than the images of the store, which was built without --keep-aspect."""
    jpeg = encode_jpeg(np.full((256, 300, 3), 90, np.uint8), 90)
    return replace(Datum.decode(value), width=300, data=jpeg).encode()


DAMAGE: dict[str, tuple[str, Change, str]] = {
    "label too large": ("jpeg", datum_with(label=3), "label 3, the store has 3 classes"),
    "label beyond 32 bits": ("jpeg", datum_with(label=2**40), "label 1099511627776, the store has 3 classes"),
    "empty": ("jpeg", lambda value: b"", "not a record of this format"),
    "first half": ("jpeg", lambda value: value[: len(value) // 2], "not a record of this format"),
    "another message": ("jpeg", lambda value: b"\x08\x01" + value, "not a record of this format"),
    "pixels too few": ("ppm", datum_with(data=bytes(100)), "bytes of pixels"),
    "pixels too many": ("ppm", longer, r"bytes of pixels, expected 256×256×3"),
    "another height": ("ppm", datum_with(height=255), r"bytes of pixels, expected 256×255×3"),
    "a longer side": ("jpeg", wider, "300×256 px, the images of this store have 256×256 px"),
    "sides too large": ("ppm-whole", datum_with(height=2**20, width=2**30), "bytes of pixels"),
}


@pytest.mark.usefixtures("search")
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
    with pytest.raises(StoreError) as refused_batch:
        records.batch(np.array([2, 5, 7, 1]))
    assert str(refused_batch.value) == str(refused.value)
    assert_batch_holds_records(records, [2, 5, 1])
    records.close()


@pytest.mark.usefixtures("search")
def test_the_first_of_two_damaged_records_of_a_batch_is_named(stores: dict[str, Path], tmp_path: Path) -> None:
    store = Store.open(Path(shutil.copytree(stores["ppm"], tmp_path / "store")))
    items = stored(store, "val")
    with lmdb.open(items[0][0], map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        for number, change in ((3, datum_with(label=9)), (8, lambda value: b"")):
            txn.put(items[number][1], change(txn.get(items[number][1])))
    records = Records(store, "val")
    for numbers, first in (([1, 8, 3], 8), ([3, 1, 8], 3)):
        with pytest.raises(StoreError, match=f"key {items[first][1].decode()}"):
            records.batch(np.array(numbers))
    records.close()


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("width", [2**62, 2**31, pow(3 * 257, -1, 2**63) * 300 % 2**63])
def test_sides_that_overflow_64_bits_are_refused(stores: dict[str, Path], tmp_path: Path, width: int) -> None:
    """With the last width, 3 · width · (height + 1) modulo 2^63 is 300, which is the number of bytes of the data."""
    store = Store.open(Path(shutil.copytree(stores["ppm-whole"], tmp_path / "store")))
    path, key, datum = stored(store, "val")[4]
    with lmdb.open(path, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        txn.put(key, replace(datum, height=256, width=width, data=bytes(300)).encode())
    records = Records(store, "val")
    with pytest.raises(StoreError, match="bytes of pixels"):
        records.batch(np.arange(8))
    records.close()


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("check", [True, False])
def test_a_wrong_checksum_is_refused_if_records_are_checked(
    stores: dict[str, Path], tmp_path: Path, check: bool
) -> None:
    """One bit of the compressed pixels is changed. find_damage verifies the checksum even if `check` is false."""
    store = Store.open(Path(shutil.copytree(stores["jpeg"], tmp_path / "store")))
    path, key, _ = stored(store, "val")[2]
    with lmdb.open(path, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        value = bytearray(txn.get(key))
        value[-70] ^= 1
        txn.put(key, bytes(value))
    records = Records(store, "val", check)
    assert "checksum" in records.find_damage(2) and records.find_damage(1) == ""
    for read in (lambda: records[2], lambda: records.batch(np.array([1, 2]))):
        if check:
            with pytest.raises(StoreError, match=f"key {key.decode()}, source .*: checksum"):
                read()
        else:
            read()
    assert records.label(2) in range(3)
    records.close()


def jpeg_of(height: int, width: int, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(content, "JPEG", **options)
    return content.getvalue()


def png() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((256, 256, 3), np.uint8)).save(content, "PNG")
    return content.getvalue()


def grey() -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.zeros((256, 256), np.uint8)).save(content, "JPEG")
    return content.getvalue()


def many_scans() -> bytes:
    """A progressive JPEG file in which the last scan is repeated 200 times."""
    content = jpeg_of(256, 256, progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + 200 * content[last:-2] + b"\xff\xd9"


PICTURES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "png": ("jpeg", png, "a PNG file, expected a JPEG file"),
    "ppm": ("jpeg", lambda: ppm_header(256, 256) + bytes(256 * 256 * 3), "a PPM file, expected a JPEG file"),
    "nothing": ("jpeg", lambda: b"", "an empty file, expected a JPEG file"),
    "bomb": ("jpeg", lambda: jpeg_of(8, 8).replace(b"\0\x08\0\x08\x03", b"\xff\xdc\xff\xdc\x03"), "of 65500×65500 px"),
    "larger": ("jpeg", lambda: jpeg_of(300, 256), "of 256×300 px, the record gives 256×256 px"),
    "smaller": ("jpeg", lambda: jpeg_of(255, 256), "of 256×255 px"),
    "zero height": ("jpeg", lambda: jpeg_of(8, 8).replace(b"\0\x08\0\x08\x03", b"\0\0\0\x08\x03"), "of 8×0 px"),
    "grey": ("jpeg", grey, "1 channels of 8 bits"),
    "scans": ("jpeg", many_scans, "scans, expected at most 100"),
    "cut in its header": ("jpeg", lambda: jpeg_of(256, 256)[:90], "damaged or cut off before its first scan"),
    "jpeg": ("ppm", lambda: jpeg_of(256, 256), "bytes of pixels"),
    "other bytes": ("ppm", lambda: bytes(256 * 257 * 3), "expected a PPM file whose header fills one row"),
}


@pytest.mark.usefixtures("search")
@pytest.mark.parametrize("picture", PICTURES)
def test_a_record_with_another_kind_of_picture_is_refused(
    stores: dict[str, Path], tmp_path: Path, picture: str
) -> None:
    """The fields and the checksum of the record are correct."""
    kind, content, reason = PICTURES[picture]
    root = Path(shutil.copytree(stores[kind], tmp_path / "store"))
    store = Store.open(root)
    path, key, datum = stored(store, "val")[7]
    with lmdb.open(path, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        txn.put(key, replace(datum, data=content()).encode())
    records = Records(store, "val")
    for read in (lambda: records[7], lambda: records.batch(np.array([2, 7, 1]))):
        with pytest.raises(StoreError) as refused:
            read()
        assert str(refused.value).startswith(f"{path}, key {key.decode()}, source {datum.source.decode()}: ")
        assert reason in str(refused.value)
    assert_batch_holds_records(records, [2, 1])
    records.close()


@pytest.mark.usefixtures("search")
def test_a_progressive_jpeg_is_a_valid_record(stores: dict[str, Path], tmp_path: Path) -> None:
    store = Store.open(Path(shutil.copytree(stores["jpeg"], tmp_path / "store")))
    path, key, datum = stored(store, "val")[7]
    with lmdb.open(path, map_size=1 << 28, lock=False) as env, env.begin(write=True) as txn:
        txn.put(key, replace(datum, data=jpeg_of(256, 256, progressive=True)).encode())
    records = Records(store, "val")
    assert_batch_holds_records(records, [7, 2])
    records.close()

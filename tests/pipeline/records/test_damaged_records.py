"""Damaged records, wrong checksums and images of a wrong format or size are refused. The error names the record."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
from PIL import Image

from pipeline.records import Records
from prep.images.codec import ppm_header
from prep.images.jpeg import encode_jpeg
from prep.store.datum import Datum
from prep.store.manifest import Store, StoreError
from tests.pipeline.records.conftest import assert_batch_holds_records, stored

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
    """With the last width, the fields demand 3 · width · (height + 1) bytes, which is 300 modulo 2^63.

    The data have exactly 300 bytes.
    """
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

"""prep.check.verify names damaged, contradictory and exchanged records, and still checks all other records.

The tests damage records in the file itself, or replace records with the lmdb library. `with_checksum` and
`changed_record` give a changed record a correct checksum, so that the other checks are tested, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import simplejpeg

from prep.store.datum import Datum
from prep.workers import WorkerPool
from tests.helpers.damaged_stores import (
    MakeStore,
    Records,
    changed_record,
    faults_of,
    read_records,
    replace_records,
    with_checksum,
)


@pytest.mark.parametrize("format", ["ppm", "jpeg"])
def test_a_flipped_bit_is_found_in_each_of_a_thousand_records(
    format: str, copy_store: MakeStore, workers: WorkerPool
) -> None:
    """Each of the thousand faults names the shard and the key of the record.

    If the flipped bit is in the image data or in the checksum, the fault also names the source of the record.
    """
    store = copy_store(1000, format)
    rng = np.random.default_rng(7)
    flipped: dict[tuple[str, str], tuple[str, bool]] = {}
    for folder in sorted((store / "train").glob("[0-9]*")):
        records, content = read_records(folder), bytearray((folder / "data.mdb").read_bytes())
        for key, value in records:
            datum = Datum.decode(value)
            assert content.count(value) == 1
            bit = int(rng.integers(8 * len(value)))
            content[content.index(value) + bit // 8] ^= 1 << bit % 8
            at = value.index(datum.data)
            inside = at <= bit // 8 < at + len(datum.data) or bit // 8 >= len(value) - 6
            flipped[f"train/{folder.name}", key.decode()] = datum.source.decode(), inside
        (folder / "data.mdb").write_bytes(content)
    assert len(flipped) == 1000 and sum(inside for _, inside in flipped.values()) > 900
    for decode in (True, False):
        faults = faults_of(store, workers, decode=decode)
        assert len(faults) == 1000
        assert [(fault.where, fault.key) for fault in faults] == sorted(flipped)
        for fault in faults:
            source, inside = flipped[fault.where, fault.key]
            assert "checksum" in fault.what
            assert fault.source == source or not inside
            assert all(part in fault.text() for part in (fault.where, fault.key, fault.source))


def grey_jpeg(value: bytes) -> bytes:
    return changed_record(value, data=simplejpeg.encode_jpeg(np.zeros((32, 32, 1), np.uint8), 90, "GRAY"))


def jpeg_of(height: int, width: int, quality: int = 90) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.zeros((height, width, 3), np.uint8), quality, "RGB", "420"))


def broken_scan(value: bytes) -> bytes:
    data = Datum.decode(value).data
    return changed_record(value, data=data[: data.index(b"\xff\xda") + 30])


CONTRADICTIONS: dict[str, tuple[tuple[Callable[[bytes], bytes], str], ...]] = {
    "jpeg": (
        (lambda v: changed_record(v, data=b"no picture"), "expected a JPEG file"),
        (lambda v: changed_record(v, data=b""), "an empty file"),
        (broken_scan, "cannot be decoded"),
        (grey_jpeg, "1 channels of 8 bits"),
        (lambda v: changed_record(v, data=jpeg_of(32, 40)), "a JPEG file of 40×32 px, the record gives 32×32 px"),
        (lambda v: changed_record(v, data=jpeg_of(32, 32, quality=70)), "not encoded with quality"),
        (lambda v: with_checksum(v[:-6] + b"\x28\x01"), "field 5 is repeated"),
        (lambda v: with_checksum(v[:-6] + b"\x48\x01"), "other fields"),
        (lambda v: changed_record(v, data=jpeg_of(32, 40), width=40), "40×32 px"),
        (lambda v: changed_record(v, width=31), "31×32 px"),
        (lambda v: changed_record(v, height=64, width=64), "64×64 px"),
        (lambda v: changed_record(v, label=3), "label 3, expected 0 to 2"),
        (lambda v: with_checksum(b""), "no encoded image"),
        (lambda v: with_checksum(v[:-17]), " at byte "),
        (lambda v: v[:-6], "no checksum"),
        (lambda v: b"", "no checksum"),
        (lambda v: v + b"\0", "no checksum"),
    ),
    "ppm": (
        (lambda v: changed_record(v, data=Datum.decode(v).data.replace(b"#", b" ", 1)), "PPM"),
        (lambda v: changed_record(v, data=Datum.decode(v).data[:-1]), "PPM"),
        (lambda v: changed_record(v, data=Datum.decode(v).data + b"\0"), "PPM"),
        (lambda v: changed_record(v, data=jpeg_of(32, 32)), "PPM"),
        (lambda v: changed_record(v, height=33), "32×33 px"),
        (lambda v: changed_record(v, channels=0), "0 channels, expected 3"),
        (lambda v: changed_record(v, label=2**40), f"label {2**40:,}"),
    ),
}


@pytest.mark.parametrize("format", CONTRADICTIONS)
def test_a_contradiction_is_found_behind_a_right_checksum(
    format: str, copy_store: MakeStore, workers: WorkerPool
) -> None:
    """Each record that the test changes has one contradiction. A fault names each of these records.

    No fault is about the digest of the shard.
    """
    store = copy_store(150, format)
    folder = store / "train" / "00001"
    records = read_records(folder)
    expected = {}
    for (number, (key, value)), (how, what) in zip(list(enumerate(records))[::3], CONTRADICTIONS[format], strict=False):
        records[number] = key, how(value)
        expected[key.decode()] = Datum.decode(value).source.decode(), what
    replace_records(folder, records)
    assert len(expected) == len(CONTRADICTIONS[format])
    faults = faults_of(store, workers)
    assert [fault.key for fault in faults] == sorted(expected)
    for fault in faults:
        source, what = expected[fault.key]
        assert fault.where == "train/00001" and what in fault.what, fault
        assert fault.source in (source, "")
    if format == "jpeg":
        closed = {fault.key for fault in faults_of(store, workers, decode=False)}
        assert closed == {key for key, (_, what) in expected.items() if key in closed} and 0 < len(closed) < len(faults)


def swap_labels(records: Records) -> None:
    first = Datum.decode(records[0][1])
    other = next(i for i, (_, value) in enumerate(records) if Datum.decode(value).label != first.label)
    second = Datum.decode(records[other][1])
    records[0] = records[0][0], replace(first, label=second.label).encode()
    records[other] = records[other][0], replace(second, label=first.label).encode()


def use_another(records: Records) -> None:
    records[3] = records[3][0], records[4][1]


def rename_key(records: Records) -> None:
    records[-1] = b"00099999", records[-1][1]


@pytest.mark.parametrize(
    ("how", "what"),
    [
        (swap_labels, "digest"),
        (use_another, "the manifest says"),
        (rename_key, "digest"),
        (lambda records: records.pop(), "the manifest says"),
        (lambda records: records.clear(), "records 0, the manifest says"),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_exchanged_records_are_found_by_the_digest_of_the_shard(
    how: Callable[[Records], object], what: str, decode: bool, copy_store: MakeStore, workers: WorkerPool
) -> None:
    """Each single record is undamaged. Only the digest and the sums of the shard show the exchange."""
    store = copy_store(150)
    folder = store / "train" / "00001"
    records = read_records(folder)
    how(records)
    replace_records(folder, records)
    (fault,) = faults_of(store, workers, decode=decode)
    assert (fault.where, fault.key) == ("train/00001", "") and what in fault.what


def swap_values(records: Records) -> None:
    (first, a), (second, b) = records[7:9]
    records[7:9] = [(first, b), (second, a)]


def append_first(records: Records) -> None:
    records.append((b"00099999", records[0][1]))


@pytest.mark.parametrize(("how", "index"), [(swap_values, 8), (append_first, -1)])
def test_records_in_another_order_than_that_of_the_seed_are_found(
    how: Callable[[Records], object], index: int, copy_store: MakeStore, workers: WorkerPool
) -> None:
    """Each single record is undamaged, and the keys ascend. Only the order of the records is wrong."""
    store = copy_store(150)
    folder = store / "train" / "00001"
    records = read_records(folder)
    how(records)
    replace_records(folder, records)
    (fault,) = faults_of(store, workers)
    assert (fault.where, fault.key) == ("train/00001", records[index][0].decode())
    assert "not in the order of seed 0" in fault.what


@pytest.mark.parametrize("key", [b"0000000x", b"000000001", b"x", b"\xff" * 8, b"-0000001"])
def test_a_key_that_is_not_eight_digits_is_a_fault(key: bytes, copy_store: MakeStore, workers: WorkerPool) -> None:
    store = copy_store(64)
    folder = store / "train" / "00000"
    records = read_records(folder)
    replace_records(folder, [*records, (key, records[5][1])])
    faults = faults_of(store, workers)
    assert {fault.where for fault in faults} == {"train/00000"}
    assert faults[-1].source == Datum.decode(records[5][1]).source.decode()
    assert "eight digits" in faults[-1].what

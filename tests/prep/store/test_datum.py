"""prep.store.datum: records are compared with protobuf and DALI's Caffe reader, checksums with zlib.

protobuf reads Caffe's message with the descriptor that conftest.py builds. Records are damaged by every single-bit
flip, by every truncation, and by seeded random bytes. A damaged record may raise DatumError, but no other exception.
`locate_image` is compared with Datum.decode and with the Datum that was encoded.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prep.store.datum import (
    CRC32_BYTES,
    DATA,
    ENCODED,
    HEIGHT,
    LABEL,
    SOURCE,
    WIDTH,
    Datum,
    DatumError,
    locate_image,
    parse_fields,
    verify_checksum,
)

SMALL = Datum(height=3, width=5, data=b"\xff\xd8 a file \x00\xff\xd9", label=7, source=b"n1/a b.JPEG")
EXAMPLES = [
    SMALL,
    Datum(height=256, width=256, data=b"x", label=0, source=b""),
    Datum(height=256, width=256, data=bytes(range(256)) * 200, label=127, source="n1/é.JPEG".encode()),
    Datum(height=65_000, width=128, data=b"\x00" * 127, label=128, source=b"\xff\xfe not utf-8"),
    Datum(height=2**31 - 1, width=1, data=b"", label=2**31 - 1, source=b"s" * 300, channels=1),
]


def sealed(body: bytes) -> bytes:
    """Return `body` followed by its correct checksum, which is field 1002 with the wire type fixed32."""
    return body + bytes([0xD5, 0x3E]) + zlib.crc32(body).to_bytes(4, "little")


@pytest.mark.parametrize("datum", EXAMPLES)
def test_protobuf_reads_an_encoded_record(datum: Datum, caffe_datum: Callable[[], Any]) -> None:
    value = datum.encode()
    message = caffe_datum()
    assert message.ParseFromString(value) == len(value)
    assert message.HasField("label")
    assert message.label == datum.label
    assert (message.channels, message.height, message.width) == (datum.channels, datum.height, datum.width)
    assert message.data == datum.data
    assert message.HasField("encoded")
    assert message.encoded is True
    assert list(message.float_data) == []
    assert message.source == datum.source
    assert message.crc32 == zlib.crc32(value[:-6])
    assert value[-4:] == zlib.crc32(value[:-6]).to_bytes(4, "little")


def test_the_record_begins_with_the_bytes_of_a_plain_caffe_datum(caffe_datum: Callable[[], Any]) -> None:
    """Fields 1001 and 1002, which Caffe's Datum does not have, come last in a record.

    The bytes before these fields are the bytes that protobuf writes for a Caffe Datum.
    """
    message = caffe_datum()
    message.ParseFromString(SMALL.encode())
    message.ClearField("source")
    message.ClearField("crc32")
    plain = message.SerializeToString(deterministic=True)
    assert SMALL.encode().startswith(plain)
    assert len(SMALL.encode()) == len(plain) + len(SMALL.source) + 3 + 6


@pytest.mark.parametrize("datum", EXAMPLES)
def test_an_encoded_record_decodes_to_itself(datum: Datum) -> None:
    value = datum.encode()
    verify_checksum(value)
    assert Datum.decode(value) == datum


@pytest.mark.parametrize("datum", EXAMPLES)
def test_a_record_written_by_protobuf_is_decoded(datum: Datum, caffe_datum: Callable[[], Any]) -> None:
    message = caffe_datum()
    message.channels, message.height, message.width = datum.channels, datum.height, datum.width
    message.data, message.label, message.encoded, message.source = datum.data, datum.label, True, datum.source
    message.float_data.extend([1.5, -2.0])  # an unused field, which is skipped
    body = message.SerializeToString()
    assert Datum.decode(sealed(body)) == datum
    with pytest.raises(DatumError, match="no checksum"):
        Datum.decode(body)


@pytest.mark.parametrize("missing", ["channels", "height", "width", "data", "label", "encoded"])
def test_a_record_without_a_required_field_is_refused(missing: str, caffe_datum: Callable[[], Any]) -> None:
    message = caffe_datum()
    message.ParseFromString(SMALL.encode())
    message.ClearField("crc32")
    assert Datum.decode(sealed(message.SerializeToString())) == SMALL
    message.ClearField(missing)
    with pytest.raises(DatumError):
        Datum.decode(sealed(message.SerializeToString()))


def test_raw_pixels_are_refused(caffe_datum: Callable[[], Any]) -> None:
    message = caffe_datum()
    message.ParseFromString(SMALL.encode())
    message.ClearField("crc32")
    message.encoded = False
    with pytest.raises(DatumError, match="encoded"):
        Datum.decode(sealed(message.SerializeToString()))


def test_fields_are_parsed_from_any_message(caffe_datum: Callable[[], Any]) -> None:
    """If a message repeats a field, parse_fields returns the last value before `end`. Float fields are skipped."""
    value = SMALL.encode()
    fields = parse_fields(value, len(value) - CRC32_BYTES)
    assert fields == {1: 3, HEIGHT: 3, WIDTH: 5, DATA: SMALL.data, LABEL: 7, ENCODED: 1, SOURCE: SMALL.source}
    message = caffe_datum()
    message.label, message.data = -1, b"bgr"
    message.float_data.extend([1.5, -2.0])
    body = message.SerializeToString()
    assert parse_fields(body, len(body)) == {LABEL: 2**64 - 1, DATA: b"bgr"}
    assert parse_fields(body + b"\x28\x05", len(body) + 2)[LABEL] == 5
    assert parse_fields(body + b"\x28\x05", len(body)) == parse_fields(body, len(body))
    assert parse_fields(b"", 0) == {}
    for kind in (3, 4, 6, 7):
        with pytest.raises(DatumError, match=f"wire type {kind}"):
            parse_fields(bytes([8 | kind]), 1)


def test_every_flipped_bit_is_detected() -> None:
    value = SMALL.encode()
    for bit in range(8 * len(value)):
        damaged = bytearray(value)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DatumError):
            verify_checksum(bytes(damaged))
        with pytest.raises(DatumError):
            Datum.decode(bytes(damaged))


def test_every_truncation_is_refused() -> None:
    value = SMALL.encode()
    for length in range(len(value)):
        with pytest.raises(DatumError):
            Datum.decode(value[:length])


def test_every_truncation_with_a_correct_checksum_is_refused() -> None:
    """One truncation is accepted: the record without its last field, the source, is still a valid Datum."""
    body = SMALL.encode()[:-6]
    without_source = len(body) - len(SMALL.source) - 3
    for length in range(len(body)):
        if length == without_source:
            assert Datum.decode(sealed(body[:length])) == replace(SMALL, source=b"")
        else:
            with pytest.raises(DatumError):
                Datum.decode(sealed(body[:length]))


def test_a_checksum_error_gives_both_values() -> None:
    value = SMALL.encode()
    damaged = value[:10] + bytes([value[10] ^ 0x40]) + value[11:]
    with pytest.raises(DatumError) as caught:
        verify_checksum(damaged)
    assert f"{zlib.crc32(value[:-6]):08x}" in str(caught.value)
    assert f"{zlib.crc32(damaged[:-6]):08x}" in str(caught.value)


def test_random_bytes_raise_only_datum_error() -> None:
    """The test decodes random bytes with and without a correct checksum.

    Without a correct checksum, the bytes are refused before they are parsed.
    """
    rng = np.random.default_rng(1002)
    for _ in range(3000):
        value = rng.bytes(int(rng.integers(0, 60)))
        for attempt in (value, sealed(value)):
            with pytest.raises(DatumError):
                Datum.decode(attempt)


def test_randomly_changed_records_decode_or_raise_datum_error() -> None:
    """A record with changed bytes and a correct checksum gives a Datum or a DatumError, and no other exception."""
    rng = np.random.default_rng(7)
    body = SMALL.encode()[:-6]
    refused = 0
    for _ in range(3000):
        damaged = bytearray(body)
        for offset in rng.integers(0, len(body), int(rng.integers(1, 5))):
            damaged[offset] = rng.integers(0, 256)
        try:
            assert isinstance(Datum.decode(sealed(bytes(damaged))), Datum)
        except DatumError:
            refused += 1
    assert 300 < refused < 3000


def random_datum(rng: np.random.Generator) -> Datum:
    """Return a Datum with integers of 1 to 31 bits (varints of 1 to 5 bytes) and with 0 bytes to 130 kB of data."""
    height, width, label = (int(rng.integers(0, 2 ** int(rng.integers(1, 32)))) for _ in range(3))
    data = rng.bytes(int(rng.integers(0, 2 ** int(rng.integers(1, 18)))))
    return Datum(height, width, data, label, rng.bytes(int(rng.integers(0, 200))))


def test_the_image_is_located_where_decode_finds_it() -> None:
    rng = np.random.default_rng(40)
    lengths = set()
    for datum in [*EXAMPLES[:4], *(random_datum(rng) for _ in range(600)), Datum(2**31 - 1, 1, b"x" * 2**21, 0, b"s")]:
        value = datum.encode()
        start, end, height, width, label = locate_image(memoryview(value))
        assert Datum.decode(value) == Datum(height, width, value[start:end], label, datum.source) == datum
        lengths |= {-(-max(number.bit_length(), 1) // 7) for number in (height, width, label)}
    assert lengths == {1, 2, 3, 4, 5}


def test_the_image_of_a_record_written_by_protobuf_is_located(caffe_datum: Callable[[], Any]) -> None:
    for datum in EXAMPLES[:4]:
        message = caffe_datum()
        message.channels, message.height, message.width = 3, datum.height, datum.width
        message.data, message.label, message.encoded, message.source = datum.data, datum.label, True, datum.source
        value = message.SerializeToString()
        start, end, *numbers = locate_image(memoryview(value))
        assert value[start:end] == datum.data and numbers == [datum.height, datum.width, datum.label]


@pytest.mark.parametrize("datum", EXAMPLES[:4])
def test_the_image_of_a_truncated_record_is_located_if_its_label_is_complete(datum: Datum) -> None:
    """locate_image does not read the bytes after the label."""
    value = datum.encode()
    whole = locate_image(memoryview(value))
    label_ends = whole.end + 1 + -(-max(datum.label.bit_length(), 1) // 7)
    for length in range(len(value)) if len(value) < 1000 else [*range(40), *range(label_ends - 40, len(value))]:
        if length >= label_ends:
            assert locate_image(memoryview(value)[:length]) == whole
        else:
            with pytest.raises(DatumError):
                locate_image(memoryview(value)[:length])


@pytest.mark.parametrize("missing", ["channels", "height", "width", "data", "label"])
def test_the_image_of_a_record_without_a_field_is_not_located(missing: str, caffe_datum: Callable[[], Any]) -> None:
    message = caffe_datum()
    message.ParseFromString(SMALL.encode())
    message.ClearField(missing)
    with pytest.raises(DatumError):
        locate_image(memoryview(message.SerializeToString()))


def test_only_images_of_three_channels_are_located() -> None:
    with pytest.raises(DatumError):
        locate_image(memoryview(EXAMPLES[4].encode()))


def test_a_located_image_lies_within_the_record() -> None:
    """For damaged records and random bytes, locate_image returns a range in the record, or raises DatumError."""
    rng = np.random.default_rng(8)
    attempts = [rng.bytes(int(rng.integers(0, 60))) for _ in range(2000)]
    for _ in range(4000):
        damaged = bytearray(EXAMPLES[int(rng.integers(0, 2))].encode())
        for offset in rng.integers(0, len(damaged), int(rng.integers(1, 4))):
            damaged[offset] = rng.integers(0, 256)
        attempts.append(bytes(damaged))
    attempts += [b"\x08\x03\x10" + rng.bytes(2) + b"\x18\x01\x22" + rng.bytes(8) + b"\x28\x01" for _ in range(500)]
    located = 0
    for value in attempts:
        try:
            start, end, *numbers = locate_image(memoryview(value))
        except DatumError:
            continue
        located += 1
        assert 0 < start <= end <= len(value) - 2 and min(numbers) >= 0
        assert value[end : end + 1] == b"\x28"
    assert located > 1000


@pytest.mark.parametrize(
    "size",
    [
        b"\xff" * 8 + b"\x7f",
        b"\xff" * 4 + b"\x7f",
        b"\xff" * 9 + b"\x01",
        b"\x80" * 12,
    ],
)
def test_an_image_with_an_enormous_size_is_refused(size: bytes) -> None:
    with pytest.raises(DatumError):
        locate_image(memoryview(b"\x08\x03\x10\x05\x18\x05\x22" + size + b"\x28\x01" * 20))


def test_dali_reads_the_same_labels_and_payloads_as_protobuf(
    store: Path, records_of: Callable[[Path, str], Any]
) -> None:
    """DALI's Caffe reader reads the LMDB of a store on a CPU."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import Pipeline, fn

    expected = [(datum.label, datum.data) for _, datum in records_of(store, "train")]
    assert {label for label, _ in expected} == {0, 1, 2}
    shards = [str(path) for path in sorted((store / "train").glob("[0-9]*"))]
    pipe = Pipeline(batch_size=len(expected), num_threads=1, device_id=None)
    with pipe:
        pipe.set_outputs(*fn.readers.caffe(path=shards, random_shuffle=False))
    pipe.build()
    payloads, labels = pipe.run()
    read_by_dali = [
        (int(np.array(labels.at(i)).item()), np.array(payloads.at(i)).tobytes()) for i in range(len(expected))
    ]
    assert read_by_dali == expected

"""The Caffe Datum message, written and read by hand.

Seven fields do not need a protobuf dependency. The label is always written, zero included: DALI asks proto2's
has_label() and returns an empty label, without a word, where the field was left out. So is `encoded`: raw Datums are
C,H,W to Caffe and H,W,C to DALI, so every payload here is a file (JPEG or PPM) that says its own shape.

Field numbers 1 to 7 are Caffe's (src/caffe/proto/caffe.proto). Two are ours, high enough to collide with nothing and
skipped by every other reader: the source's path, and last in the message a CRC-32 of all the bytes before it.
Hence a record can be checked without parsing it: `value[-4:]` is the little-endian zlib.crc32 of `value[:-6]`.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

CHANNELS, HEIGHT, WIDTH, DATA, LABEL, FLOAT_DATA, ENCODED = 1, 2, 3, 4, 5, 6, 7
SOURCE, CRC32 = 1001, 1002
CRC32_BYTES = 6  # its tag and the number, last in a record

_KNOWN = {CHANNELS, HEIGHT, WIDTH, DATA, LABEL, ENCODED, SOURCE}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CRC_TAG = bytes([(CRC32 << 3 | _FIXED32) & 0x7F | 0x80, (CRC32 << 3 | _FIXED32) >> 7])

_DIGITS = rb"([\x80-\xff]{0,8}[\x00-\x7f])"  # a varint
_HEAD = re.compile(rb"\x08\x03\x10" + _DIGITS + rb"\x18" + _DIGITS + rb"\x22" + _DIGITS, re.DOTALL)
_LABEL = re.compile(rb"\x28" + _DIGITS, re.DOTALL)


class DatumError(ValueError):
    """Bytes that are not a Datum of ours, or whose checksum does not agree."""


@dataclass(frozen=True)
class Datum:
    """One record. `data` is a whole JPEG or PPM file; `source` the path below the split's folder, as bytes."""

    height: int
    width: int
    data: bytes
    label: int
    source: bytes
    channels: int = 3

    def encode(self) -> bytes:
        """The record's bytes, checksum last."""
        parts = [
            _number(CHANNELS, self.channels),
            _number(HEIGHT, self.height),
            _number(WIDTH, self.width),
            _varint(DATA << 3 | _BYTES) + _varint(len(self.data)),
            self.data,
            _number(LABEL, self.label),
            _number(ENCODED, 1),
            _varint(SOURCE << 3 | _BYTES) + _varint(len(self.source)),
            self.source,
        ]
        body = b"".join(parts)
        return body + _CRC_TAG + zlib.crc32(body).to_bytes(4, "little")

    @staticmethod
    def decode(value: bytes) -> Datum:
        """Check the checksum, then read the fields; raises DatumError."""
        verify_checksum(value)
        found = parse_fields(value, len(value) - CRC32_BYTES)
        numbers = [found.get(field) for field in (HEIGHT, WIDTH, LABEL, CHANNELS)]
        data, source = found.get(DATA), found.get(SOURCE, b"")
        if not isinstance(data, bytes) or not isinstance(source, bytes) or found.get(ENCODED) != 1:
            raise DatumError("no encoded picture in the record")
        height, width, label, channels = (n if isinstance(n, int) else -1 for n in numbers)
        if min(height, width, label, channels) < 0:
            raise DatumError(f"height, width, label, channels are {numbers}, expected four numbers")
        return Datum(height, width, data, label, source, channels)


class ImageSpan(NamedTuple):
    """Where a record's picture lies in its bytes, and what is said of it."""

    start: int
    end: int
    height: int
    width: int
    label: int


def locate_image(value: memoryview) -> ImageSpan:
    """Find the picture in a record of ours without copying it or checking its sum; raises DatumError."""
    found = _HEAD.match(value)
    if found:
        height, width, size = (_number_of(digits) for digits in found.groups())
        label = _LABEL.match(value, min(found.end() + size, len(value)))
        if label:
            return ImageSpan(found.end(), found.end() + size, height, width, _number_of(label[1]))
    raise DatumError("not a record of ours: no height, width, picture and label at its beginning")


def _number_of(varint: bytes) -> int:
    number = 0
    for digit in reversed(varint):
        number = number << 7 | digit & 0x7F
    return number


def verify_checksum(value: bytes) -> None:
    """Raise DatumError unless the record ends in the checksum of what precedes it."""
    if len(value) < 6 or value[-6:-4] != _CRC_TAG:
        raise DatumError("no checksum at the end of the record")
    said, is_now = int.from_bytes(value[-4:], "little"), zlib.crc32(value[:-6])
    if said != is_now:
        raise DatumError(f"checksum {is_now:08x}, the record says {said:08x}: bytes have changed since it was written")


def parse_fields(value: bytes, end: int) -> dict[int, int | bytes]:
    """The known fields of the message in `value[:end]`: varints as numbers, strings as bytes, the last of each number.

    Raises DatumError for bytes that are no message. Fixed-width fields are passed over.
    """
    found: dict[int, int | bytes] = {}
    at = 0
    while at < end:
        tag, at = _read_varint(value, at, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            content, at = _read_varint(value, at, end)
            if number in _KNOWN:
                found[number] = content
        elif kind == _BYTES:
            size, at = _read_varint(value, at, end)
            if number in _KNOWN:
                found[number] = value[at : at + size]
            at += size
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise DatumError(f"wire type {kind} at byte {at}, which a Datum never has")
        if at > end:
            raise DatumError(f"field {number} ends at byte {at} of {end}")
    return found


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


@lru_cache(4096)
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(value: bytes, at: int, end: int) -> tuple[int, int]:
    number = shift = 0
    while at < end and shift < 64:
        byte = value[at]
        number |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return number, at
    raise DatumError(f"a number is cut off or too long at byte {at}")

"""Encodes and decodes records. A record is a Caffe Datum (a protobuf message) with a source path and a CRC-32.

Datums are so simple that this module writes and parses them without the protobuf library. Two fields that protobuf does
not require are always written:

- The label, even if the label is zero. If the label is missing (proto2's has_label() is false), DALI silently returns
  an empty label.
- `encoded`, always 1: the data of every record is a JPEG or PPM file, which contains its own height and width. Raw
  pixels are not stored, because Caffe reads raw Datums as C,H,W and DALI reads them as H,W,C.

Field numbers 1 to 7 are Caffe's (src/caffe/proto/caffe.proto). This project adds two fields. The first is the path of
the input image. The second, at the end of the message, is a CRC-32 of all bytes before the CRC field. The numbers of
both fields are too high to collide with Caffe's. Readers that do not know the two fields skip them.

A record can be checked without parsing it: `value[-4:]` is the little-endian zlib.crc32 of `value[:-6]`.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

CHANNELS, HEIGHT, WIDTH, DATA, LABEL, FLOAT_DATA, ENCODED = 1, 2, 3, 4, 5, 6, 7
SOURCE, CRC32 = 1001, 1002
CRC32_BYTES = 6  # size of the checksum field at the end of a record: tag (2 bytes) and CRC-32 (4 bytes)

_KNOWN = {CHANNELS, HEIGHT, WIDTH, DATA, LABEL, ENCODED, SOURCE}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_CRC_TAG = bytes([(CRC32 << 3 | _FIXED32) & 0x7F | 0x80, (CRC32 << 3 | _FIXED32) >> 7])

_VARINT_BYTES = rb"([\x80-\xff]{0,8}[\x00-\x7f])"
_HEADER_FIELDS = re.compile(  # matches channels = 3, height, width and the size of `data`
    rb"\x08\x03\x10" + _VARINT_BYTES + rb"\x18" + _VARINT_BYTES + rb"\x22" + _VARINT_BYTES, re.DOTALL
)
_LABEL_FIELD = re.compile(rb"\x28" + _VARINT_BYTES, re.DOTALL)


class DatumError(ValueError):
    """Raised for bytes that are not a Datum of this format, or that have a wrong checksum."""


@dataclass(frozen=True)
class Datum:
    """One record."""

    height: int  # px
    width: int  # px
    data: bytes  # a complete JPEG or PPM file
    label: int  # index of the class
    source: bytes  # path of the input, relative to the folder of the split
    channels: int = 3

    def encode(self) -> bytes:
        """Return the record as bytes, with the checksum at the end."""
        parts = [
            _varint_field(CHANNELS, self.channels),
            _varint_field(HEIGHT, self.height),
            _varint_field(WIDTH, self.width),
            _varint(DATA << 3 | _BYTES) + _varint(len(self.data)),
            self.data,
            _varint_field(LABEL, self.label),
            _varint_field(ENCODED, 1),
            _varint(SOURCE << 3 | _BYTES) + _varint(len(self.source)),
            self.source,
        ]
        body = b"".join(parts)
        return body + _CRC_TAG + zlib.crc32(body).to_bytes(4, "little")

    @staticmethod
    def decode(value: bytes) -> Datum:
        """Verify the checksum, then parse the fields. Raises DatumError if the checksum or a field is wrong.

        A record with a repeated field is refused, because readers may differ in which of the values they use.
        """
        verify_checksum(value)
        fields = parse_fields(value, len(value) - CRC32_BYTES, may_repeat=False)
        numbers = [fields.get(field) for field in (HEIGHT, WIDTH, LABEL, CHANNELS)]
        data, source = fields.get(DATA), fields.get(SOURCE, b"")
        if not isinstance(data, bytes) or not isinstance(source, bytes) or fields.get(ENCODED) != 1:
            raise DatumError("no encoded image in the record")
        height, width, label, channels = (n if isinstance(n, int) else -1 for n in numbers)
        if min(height, width, label, channels) < 0:
            raise DatumError(f"height, width, label, channels are {numbers}, expected four numbers")
        return Datum(height, width, data, label, source, channels)


class ImageSpan(NamedTuple):
    """Position of the image file in a record, with the height, width and label of the image."""

    start: int  # value[start:end] is the JPEG or PPM file
    end: int
    height: int  # px
    width: int  # px
    label: int


def locate_image(value: memoryview) -> ImageSpan:
    """Find the image in a record, without a copy. Raises DatumError if the record has another format.

    The checksum is not verified.
    """
    header = _HEADER_FIELDS.match(value)
    if header:
        height, width, size = (_varint_value(varint) for varint in header.groups())
        label = _LABEL_FIELD.match(value, min(header.end() + size, len(value)))
        if label:
            return ImageSpan(header.end(), header.end() + size, height, width, _varint_value(label[1]))
    raise DatumError("not a record of this format: it does not begin with height, width, image and label")


def _varint_value(varint: bytes) -> int:
    number = 0
    for byte in reversed(varint):
        number = number << 7 | byte & 0x7F
    return number


def verify_checksum(value: bytes | memoryview) -> None:
    """Raise DatumError unless the record ends with a correct checksum."""
    if len(value) < CRC32_BYTES or value[-6:-4] != _CRC_TAG:
        raise DatumError("no checksum at the end of the record")
    stored, computed = int.from_bytes(value[-4:], "little"), zlib.crc32(value[:-6])
    if stored != computed:
        raise DatumError(
            f"checksum {computed:08x}, the record says {stored:08x}: the record has changed since it was written"
        )


def parse_fields(value: bytes, end: int, may_repeat: bool = True) -> dict[int, int | bytes]:
    """Return the known fields of the message in `value[:end]` by field number.

    Varints are returned as int, strings as bytes. If a field is repeated, the last value is used. Unknown and
    fixed-width fields are skipped. Raises DatumError if the bytes are not a protobuf message, or if a known field is
    repeated although `may_repeat` is false.
    """
    fields: dict[int, int | bytes] = {}
    offset = 0
    while offset < end:
        tag, offset = _read_varint(value, offset, end)
        number, wire_type = tag >> 3, tag & 7
        if not may_repeat and number in fields:
            raise DatumError(f"field {number} is repeated at byte {offset}")
        if wire_type == _VARINT:
            content, offset = _read_varint(value, offset, end)
            if number in _KNOWN:
                fields[number] = content
        elif wire_type == _BYTES:
            size, offset = _read_varint(value, offset, end)
            if number in _KNOWN:
                fields[number] = value[offset : offset + size]
            offset += size
        elif wire_type in (_FIXED32, _FIXED64):
            offset += 4 if wire_type == _FIXED32 else 8
        else:
            raise DatumError(f"wire type {wire_type} at byte {offset}: no field of a Datum has this type")
        if offset > end:
            raise DatumError(f"field {number} ends at byte {offset}, but the message ends at byte {end}")
    return fields


def _varint_field(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


@lru_cache(4096)
def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(value: bytes, offset: int, end: int) -> tuple[int, int]:
    """Read a varint, and return the number and the offset of the next byte.

    Raises DatumError if the varint is truncated or too long.
    """
    number = shift = 0
    while offset < end and shift < 64:
        byte = value[offset]
        number |= (byte & 0x7F) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 0x80:
            return number, offset
    raise DatumError(f"a number is cut off or too long at byte {offset}")

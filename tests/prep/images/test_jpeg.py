"""prep.images.jpeg: decoding is compared with Pillow, and the segments of encoded files are read byte by byte."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prep.images.codec import decode_image
from prep.images.jpeg import decode_jpeg, encode_jpeg, find_warning
from tests.prep.images.small_images import PHOTO, file_of, pillow, smooth


@pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"subsampling": "4:4:4"}])
def test_pixels_are_pillows(options: dict[str, Any]) -> None:
    content = file_of(PHOTO, "JPEG", **options)
    pixels = decode_jpeg(content)
    assert pixels.dtype == np.uint8 and np.array_equal(pixels, np.asarray(pillow(content)))


def test_a_truncated_or_foreign_file_is_a_value_error() -> None:
    content = file_of(PHOTO, "JPEG")
    for damaged in (content[: len(content) // 2], content[:100], b"", b"no jpeg", file_of(PHOTO, "PNG")):
        with pytest.raises(ValueError, match=r"."):
            decode_jpeg(damaged)


def segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    """Return (marker, content) of every segment of a JPEG file up to the start of scan."""
    assert jpeg[:2] == b"\xff\xd8"
    parts, offset = [], 2
    while True:
        assert jpeg[offset] == 0xFF
        marker, size = jpeg[offset + 1], int.from_bytes(jpeg[offset + 2 : offset + 4], "big")
        parts.append((marker, jpeg[offset + 4 : offset + 2 + size]))
        offset += 2 + size
        if marker == 0xDA:
            return parts


@pytest.mark.parametrize(("quality", "first"), [(50, 16), (75, 8), (90, 3), (100, 1)])
def test_an_encoded_jpeg_is_baseline_420_without_exif(quality: int, first: int) -> None:
    """`first` is the first entry of the luminance quantization table, for the DC coefficient.

    The entry is 16 in the JPEG standard. The rule of the Independent JPEG Group scales this entry for `quality`.
    """
    pixels = np.asarray(smooth(60, 84))
    parts = segments(encode_jpeg(pixels, quality))
    markers = [marker for marker, _ in parts]
    assert 0xE1 not in markers  # APP1: EXIF
    frames = [(marker, content) for marker, content in parts if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8)]
    assert [marker for marker, _ in frames] == [0xC0]  # SOF0: baseline
    frame = frames[0][1]
    assert frame[0] == 8
    assert (int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")) == (60, 84)
    assert frame[5] == 3
    assert [frame[7], frame[10], frame[13]] == [0x22, 0x11, 0x11]  # 4:2:0
    tables = b"".join(content for marker, content in parts if marker == 0xDB)
    assert tables[:2] == bytes([0, first])


def test_encoding_drops_the_metadata_of_the_source() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = file_of(PHOTO, "JPEG", exif=exif, comment=b"hello", icc_profile=b"no profile")
    encoded = encode_jpeg(decode_jpeg(source), 90)
    assert [marker for marker, _ in segments(encoded) if 0xE1 <= marker <= 0xEF or marker == 0xFE] == []


def test_an_encoded_jpeg_decodes_to_nearly_the_same_pixels() -> None:
    pixels = np.asarray(smooth(64, 96))
    decoded = np.asarray(pillow(encode_jpeg(pixels, 95))).astype(float)
    assert decoded.shape == pixels.shape
    assert np.abs(decoded - pixels).mean() < 2


def test_a_sampling_that_cannot_be_checked_for_damage_is_said() -> None:
    """Pillow does not warn of a truncated JPEG with an end marker whose first channel has the sampling 3×1."""
    marks, tables = {0xDB, 0xC4}, b""
    for marker, body in segments(encode_jpeg(np.zeros((8, 8, 3), np.uint8), 90)):
        if marker in marks:
            tables += struct.pack(">BBH", 255, marker, len(body) + 2) + body
    channels = [(1, 0x31, 0), (2, 0x11, 1), (3, 0x11, 1)]  # number, sampling, quantization table
    frame = struct.pack(">BHHB", 8, 8, 72, 3) + b"".join(map(bytes, channels))
    scan = b"\x03\x01\x00\x02\x11\x03\x11\x00\x3f\x00"
    head = b"\xff\xd8" + tables + b"\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame
    content = head + b"\xff\xda" + struct.pack(">H", len(scan) + 2) + scan + bytes(2) + b"\xff\xd9"
    image = decode_image(content)
    assert image.pixels.shape == (8, 72, 3)
    assert len(image.warnings) == 1 and image.warnings[0].startswith("cannot be checked for damage")
    assert find_warning(encode_jpeg(np.zeros((8, 8, 3), np.uint8), 90), "RGB") == ""

"""prep.images.rgb: transparent images over a background, channels of more than 8 bits, and the names of conversions.

The PNG files are made byte by byte. The expected pixels therefore follow from the PNG specification, not from Pillow.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from prep.images.codec import DecodeOptions, decode_image
from tests.prep.images.small_images import PHOTO, file_of

LEVELS = {"white": 255, "black": 0, "grey": 128}
DEEP_ALPHA = ("16-bit", "alpha")
GREY, RGB, PALETTE, GREY_ALPHA, RGB_ALPHA = 0, 2, 3, 4, 6  # colour types of PNG


def png(
    size: tuple[int, int], color_type: int, bits: int, rows: Sequence[bytes], trns: bytes = b"", plte: bytes = b""
) -> bytes:
    """Return a PNG file of `size` (width, height) with the pixel rows `rows` and the chunks tRNS and PLTE."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, color_type, 0, 0, 0))
    extra = b"".join(chunk(name, data) for name, data in ((b"PLTE", plte), (b"tRNS", trns)) if data)
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + extra
        + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
        + chunk(b"IEND", b"")
    )


def words(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


@pytest.mark.parametrize("background", LEVELS)
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_pixels_are_blended_with_the_background(mode: str, background: str) -> None:
    """All pairs of a pixel value and an alpha are compared with a computation in float64.

    The image has 300 rows, more than a block of prep.images.rgb (256 rows).
    """
    value, alpha = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(300, dtype=np.uint8))
    channels = [value, 255 - value, value // 3, alpha] if mode == "RGBA" else [value, alpha]
    image = decode_image(
        file_of(Image.fromarray(np.dstack(channels), mode), "PNG"), DecodeOptions(background=background)
    )
    colors = np.dstack(channels[:3] if mode == "RGBA" else [value] * 3).astype(np.float64)
    share = alpha[..., None] / 255.0
    expected = colors * share + LEVELS[background] * (1 - share)
    assert np.abs(image.pixels - expected).max() <= 0.5 + 1e-9
    assert np.array_equal(image.pixels[255], colors[255])  # opaque pixels keep their values
    assert image.converted == (("png", "alpha") if mode == "RGBA" else ("png", "grey", "alpha"))


def test_the_default_background_is_white_and_older_stores_drop_alpha() -> None:
    rgb = np.asarray(PHOTO)
    alpha = np.random.default_rng(1).integers(0, 256, rgb.shape[:2], dtype=np.uint8)
    content = file_of(Image.fromarray(np.dstack([rgb, alpha])), "PNG")
    assert np.array_equal(decode_image(content, DecodeOptions(background="dropped")).pixels, rgb)
    white = decode_image(content, DecodeOptions(background="white")).pixels
    assert np.array_equal(decode_image(content).pixels, white) and not np.array_equal(white, rgb)


@pytest.mark.parametrize(
    ("content", "pixels", "converted"),
    [
        (png((8, 1), GREY, 1, [b"\xaa"], words(1)), [255] * 1 + [0] + [255, 0] * 3, ("grey", "alpha")),
        (png((4, 1), GREY, 2, [b"\x1b"], words(1)), [0, 255, 170, 255], ("grey", "alpha")),
        (png((2, 1), GREY, 4, [b"\x5a"], words(5)), [255, 170], ("grey", "alpha")),
        (png((2, 1), GREY, 8, [b"\x5a\x5b"], words(0x5A)), [255, 0x5B], ("grey", "alpha")),
        (png((2, 1), GREY, 16, [words(1000, 1001)], words(1000)), [255, 3], ("16-bit", "grey", "alpha")),
        (png((2, 1), GREY, 16, [words(0x1234, 0xFEDC)]), [0x12, 0xFE], ("16-bit", "grey")),
        (png((1, 1), GREY_ALPHA, 16, [words(0, 0x8080)]), [127], ("16-bit", "grey", "alpha")),
        (png((1, 1), RGB, 8, [b"\1\2\3"], words(1, 2, 3)), [255], ("alpha",)),
        (png((1, 1), RGB, 8, [b"\1\1\1"], words(1, 2, 3)), [1], ("alpha",)),
        (png((1, 1), RGB, 16, [words(0x4142, 0x4100, 0x41FF)]), [0x41], ("16-bit",)),
        (png((2, 1), RGB, 16, [words(256, 512, 768, 512, 512, 512)], words(256, 512, 768)), [255, 2], DEEP_ALPHA),
        (png((1, 1), RGB_ALPHA, 16, [words(0, 0, 0, 0)]), [255], ("16-bit", "alpha")),
        (png((2, 1), PALETTE, 8, [b"\0\1"], b"\x80", bytes([0, 0, 0, 9, 9, 9])), [127, 9], ("palette", "alpha")),
        (png((2, 1), PALETTE, 8, [b"\0\1"], b"", bytes([5, 5, 5, 9, 9, 9])), [5, 9], ("palette",)),
    ],
)  # fmt: skip
def test_png_files_of_every_kind(content: bytes, pixels: list[int], converted: tuple[str, ...]) -> None:
    image = decode_image(content)
    assert image.pixels.tolist() == [[[value] * 3 for value in pixels]]
    assert image.converted == ("png", *converted)


def test_transparent_palette_entries_of_a_gif_show_the_background() -> None:
    indices = np.zeros((4, 6), np.uint8)
    indices[1:3] = 1
    picture = Image.fromarray(indices, "P")
    picture.putpalette([200, 0, 0, 0, 0, 200])
    image = decode_image(file_of(picture, "GIF", transparency=1), DecodeOptions(background="grey"))
    assert image.converted == ("gif", "palette", "alpha")
    assert np.array_equal(image.pixels[1:3], np.full((2, 6, 3), 128)) and image.pixels[0].tolist() == [[200, 0, 0]] * 6


def tiff(width: int, bits: int, photometric: int, data: bytes) -> bytes:
    """Return a little-endian, uncompressed grey TIFF of one row."""
    tags = [(256, width), (257, 1), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, 1)]
    tags.append((279, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("content", "pixels", "converted"),
    [
        (tiff(2, 16, 1, struct.pack("<2H", 0x1234, 0xFFFF)), [0x12, 255], ("16-bit", "grey")),
        # In a file with photometric interpretation 0, the value 0 means white.
        (tiff(2, 16, 0, struct.pack("<2H", 0x1234, 0xFFFF)), [255 - 0x12, 0], ("16-bit", "grey")),
        (tiff(2, 12, 1, bytes([0x12, 0x3F, 0xFF])), [0x12, 255], ("12-bit", "grey")),
        (tiff(2, 8, 0, b"\x10\xff"), [255 - 0x10, 0], ("grey",)),
    ],
)
def test_grey_tiff_files_of_every_depth(content: bytes, pixels: list[int], converted: tuple[str, ...]) -> None:
    image = decode_image(content)
    assert image.pixels.tolist() == [[[value] * 3 for value in pixels]]
    assert image.converted == ("tiff", *converted)


def test_sixteen_bit_pnm_files_are_counted() -> None:
    grey = decode_image(b"P5\n2 1\n65535\n" + words(0x1234, 0xFFFF))
    assert (grey.pixels[0, :, 0].tolist(), grey.converted) == ([0x12, 255], ("ppm", "16-bit", "grey"))
    color = decode_image(b"P6\n1 1\n65535\n" + words(0, 0x8080, 0xFFFF))
    assert (color.pixels.tolist(), color.converted) == ([[[0, 128, 255]]], ("ppm", "16-bit"))
    assert decode_image(b"P6\n1 1\n255\nabc").converted == ("ppm",)


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_ten_bit_pictures_are_counted(format: str) -> None:
    """The test changes the number of bits in the file's list of channels from 8 to 10."""
    if format == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    content = file_of(PHOTO, format)
    assert decode_image(content).converted == (format.lower(),)
    at = content.index(b"pixi")
    image_of_ten_bits = content[: at + 9] + b"\x0a\x0a\x0a" + content[at + 12 :]
    from prep.images.rgb import file_facts

    with Image.open(io.BytesIO(content)) as image:
        assert file_facts(image, image_of_ten_bits).bits == 10

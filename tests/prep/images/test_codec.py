"""prep.images.codec: decoding compared with Pillow, refusal of files that are not images, and PPM headers.

The tests make every file in memory, from seeded random pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from prep.images.codec import (
    BadImage,
    DecodeOptions,
    _decode_color_jpeg,
    check_rescaled_size,
    decode_image,
    encode_image,
    ppm_header,
)
from tests.prep.images.small_images import PHOTO, file_of, pillow, smooth

Pixels = npt.NDArray[np.uint8]


@pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"subsampling": "4:4:4"}])
def test_an_rgb_jpeg_is_decoded_as_by_pillow(options: dict[str, Any]) -> None:
    content = file_of(PHOTO, "JPEG", **options)
    image = decode_image(content)
    assert image.pixels.dtype == np.uint8
    assert np.array_equal(image.pixels, np.asarray(pillow(content)))
    assert image.converted == ()
    assert image.orientation == 1


def color_jpegs() -> dict[str, bytes]:
    """Colour JPEGs of every kind that Pillow and simplejpeg write: samplings, scans, tables, restart markers, sizes."""
    files = {}
    for height, width in ((60, 83), (1, 1), (7, 9), (16, 16), (17, 33), (8, 200), (201, 1)):
        noise = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for sampling in ("4:4:4", "4:2:2", "4:2:0"):
            for progressive in (False, True):
                options = {"subsampling": sampling, "progressive": progressive, "quality": 80}
                files[f"{sampling} {height}x{width} {progressive}"] = file_of(Image.fromarray(noise), "JPEG", **options)
        for sampling in ("440", "411"):
            files[f"{sampling} {height}x{width}"] = bytes(simplejpeg.encode_jpeg(noise, 90, "RGB", sampling))
    for quality in (1, 30, 100):
        files[f"quality {quality}"] = file_of(PHOTO, "JPEG", quality=quality)
    files["optimized"] = file_of(PHOTO, "JPEG", optimize=True)
    files["restart markers"] = file_of(PHOTO, "JPEG", restart_marker_blocks=3)
    files["restart markers, progressive"] = file_of(PHOTO, "JPEG", restart_marker_rows=1, progressive=True)
    files["RGB, not YCbCr"] = file_of(PHOTO, "JPEG", keep_rgb=True)
    files["custom tables"] = file_of(PHOTO, "JPEG", qtables=[list(range(1, 65)), [40] * 64])
    files["comment and profile"] = file_of(PHOTO, "JPEG", comment=b"x" * 900, icc_profile=b"y" * 90_000)
    files["large"] = file_of(smooth(700, 1001), "JPEG", quality=85)
    return files


COLOR_JPEGS = color_jpegs()


@pytest.mark.parametrize("name", list(COLOR_JPEGS))
def test_libjpeg_turbo_decodes_colour_jpegs_to_pillows_pixels(name: str) -> None:
    """decode_image decodes COLOR_JPEGS with libjpeg-turbo, and does not fall back to Pillow."""
    content = COLOR_JPEGS[name]
    expected = np.asarray(pillow(content))
    image = decode_image(content)
    assert image.pixels.dtype == np.uint8
    assert np.array_equal(image.pixels, expected)
    assert (image.converted, image.orientation) == ((), 1)
    fast = _decode_color_jpeg(content, DecodeOptions())
    assert fast is not None
    assert np.array_equal(fast.pixels, expected)


def test_other_and_damaged_jpegs_are_decoded_or_refused_as_by_pillow() -> None:
    """Two JPEGs have colour spaces other than RGB and YCbCr. The other JPEGs of this test are damaged."""
    noise = np.random.default_rng(3).integers(0, 256, (60, 83, 3), dtype=np.uint8)
    whole = file_of(Image.fromarray(noise), "JPEG")
    scan = whole.index(b"\xff\xda") + 14
    middle = scan + (len(whole) - scan) // 2
    files = {
        "grey": file_of(PHOTO.convert("L"), "JPEG"),
        "cmyk": file_of(PHOTO.convert("CMYK"), "JPEG"),
        "cut, with an end": whole[:middle] + b"\xff\xd9",
        "a hole": whole[:middle] + whole[middle + 90 :],
        "zeros": whole[:middle] + bytes(60) + whole[middle + 60 :],
        "bytes before a marker": whole[:2] + b"\0\0\0" + whole[2:],
        "cut": whole[:middle],
        "no tables": whole[: whole.index(b"\xff\xdb")] + whole[whole.index(b"\xff\xc0") :],
    }
    kept = 0
    for name, content in files.items():
        if name not in ("a hole", "zeros"):  # in these two files, the damaged scan can still be valid
            assert _decode_color_jpeg(content, DecodeOptions()) is None, name
        try:
            expected = np.asarray(pillow(content).convert("RGB"))
        except Exception:
            with pytest.raises(BadImage):
                decode_image(content)
        else:
            kept += 1
            assert np.array_equal(decode_image(content).pixels, expected), name
    assert kept >= 5


def test_randomly_changed_jpegs_are_decoded_or_refused_as_by_pillow() -> None:
    rng = np.random.default_rng(11)
    content = file_of(smooth(40, 56, 3), "JPEG", quality=80)
    outcomes = set()
    for _ in range(400):
        damaged = bytearray(content)
        for offset in rng.integers(2, len(content), int(rng.integers(1, 4))):
            damaged[offset] = rng.integers(0, 256)
        try:
            expected = np.asarray(pillow(bytes(damaged)).convert("RGB"))
        except Exception:
            with pytest.raises(BadImage):
                decode_image(bytes(damaged))
            outcomes.add("refused")
        else:
            try:
                image = decode_image(bytes(damaged))
            except BadImage as reason:
                assert "more than" in str(reason)  # the changed bytes give a height or width that is too large
                continue
            assert np.array_equal(image.pixels, expected)
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_other_formats_are_refused_without_being_opened() -> None:
    """Pillow can open dozens of formats that photographs do not use. For PostScript, Pillow would start Ghostscript."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for content in (script, file_of(PHOTO, "ICO"), file_of(PHOTO, "TGA"), file_of(PHOTO, "JPEG2000"), b"%PDF-1.4\n"):
        with pytest.raises(BadImage, match="not an image in a known format"):
            decode_image(content)


@pytest.mark.parametrize(
    ("format", "container"),
    [("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tiff"), ("PPM", "ppm"), ("WEBP", "webp")],
)
def test_lossless_containers_keep_the_pixels_and_are_counted_as_conversions(format: str, container: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode_image(file_of(PHOTO, format, **options))
    assert np.array_equal(image.pixels, np.asarray(PHOTO))
    assert image.converted == (container,)


def test_a_grey_jpeg_gives_three_equal_channels() -> None:
    content = file_of(PHOTO.convert("L"), "JPEG")
    image = decode_image(content)
    assert np.array_equal(image.pixels, np.stack([np.asarray(pillow(content))] * 3, axis=2))
    assert image.converted == ("grey",)


def test_a_cmyk_jpeg_gives_the_product_of_ink_and_black() -> None:
    content = file_of(PHOTO.convert("CMYK"), "JPEG", quality=95)
    ink = np.asarray(pillow(content)).astype(np.float64)
    assert ink.shape[2] == 4
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    image = decode_image(content)
    assert np.abs(image.pixels - expected).max() <= 1
    # In CMYK files of Adobe's programs, the values are inverted. In this file, the values are not inverted.
    assert np.abs(image.pixels - np.asarray(PHOTO).astype(float)).mean() < 4
    assert image.converted == ("cmyk",)


def test_palette_colours_are_looked_up() -> None:
    indexed = PHOTO.quantize(16)
    table = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    expected = table[np.asarray(indexed)]
    for format in ("PNG", "GIF"):
        image = decode_image(file_of(indexed, format))
        assert np.array_equal(image.pixels, expected)
        assert image.converted == (format.lower(), "palette")


def test_black_and_white_gives_0_and_255() -> None:
    bits = np.random.default_rng(3).random((20, 30)) < 0.5
    image = decode_image(file_of(Image.fromarray(bits), "PNG"))
    assert np.array_equal(image.pixels, np.stack([bits * np.uint8(255)] * 3, axis=2))
    assert image.converted == ("png", "grey")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_reported_not_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for options in ({}, {"progressive": True}, {"comment": b"x" * 2000}, {"icc_profile": b"y" * 70_000}):
        assert decode_image(file_of(PHOTO, "JPEG", exif=exif, **options)).orientation == orientation
    assert decode_image(file_of(PHOTO.convert("L"), "JPEG", exif=exif)).orientation == orientation
    image = decode_image(file_of(PHOTO, "JPEG", exif=exif))
    assert image.orientation == orientation
    assert image.converted == ()
    assert np.array_equal(image.pixels, decode_image(file_of(PHOTO, "JPEG")).pixels)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"Exif\0\0MM"]
)
def test_a_broken_exif_block_is_ignored(block: bytes) -> None:
    image = decode_image(file_of(PHOTO, "JPEG", exif=block))
    assert image.orientation == 1
    assert np.array_equal(image.pixels, np.asarray(pillow(file_of(PHOTO, "JPEG"))))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("GIF", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {})],
)
def test_truncated_files_are_refused(format: str, options: dict[str, Any], share: float) -> None:
    noise = np.random.default_rng(4).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    content = file_of(Image.fromarray(noise), format, **options)
    with pytest.raises(BadImage) as caught:
        decode_image(content[: int(len(content) * share)])
    assert str(caught.value)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "^empty file$"),
        (b"This is not an image.\n", "not an image"),
        (b"<!DOCTYPE html><html>404</html>", "not an image"),
        (b"\xff\xd8\xff", "not an image"),
        (b"\xff\xd8\xff\xe0 a JPEG by its first bytes alone" + bytes(500), "cannot be decoded: ."),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not an image"),
        (b"P6\n10 10\n255\n" + bytes(100), "cannot be decoded: ."),
        (bytes(10_000), "not an image"),
    ],
)
def test_a_file_that_is_not_an_image_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode_image(content)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_bytes_are_refused() -> None:
    """Some files are only random bytes. Other files begin with a usual signature, so that a decoder reads them."""
    rng = np.random.default_rng(5)
    starts = [file_of(PHOTO, format)[:30] for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")]
    for start in [b"", *starts]:
        for _ in range(40):
            with pytest.raises(BadImage):
                decode_image(start + rng.bytes(int(rng.integers(1, 400))))


def test_damaged_files_give_an_image_or_bad_image() -> None:
    rng = np.random.default_rng(6)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        content = file_of(PHOTO, format)
        for _ in range(60):
            damaged = bytearray(content)
            for offset in rng.integers(0, min(len(content), 700), 3):
                damaged[offset] = rng.integers(0, 256)
            try:
                pixels = decode_image(bytes(damaged)).pixels
            except BadImage as error:
                assert str(error)
            else:
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                assert pixels.shape[2] == 3


@pytest.mark.parametrize("size", [(20_000, 10_001), (30_000, 20_000)])
def test_a_decompression_bomb_is_refused_by_its_size(size: tuple[int, int]) -> None:
    """The file is a BMP header that claims more than 200 million pixels; the pixels are missing."""
    content = bytearray(file_of(Image.new("L", (1, 1)), "BMP"))
    content[18:26] = size[0].to_bytes(4, "little") + size[1].to_bytes(4, "little")
    with pytest.raises(BadImage, match="more than 200,000,000 pixels; --max-pixels"):
        decode_image(bytes(content))


def test_a_pixel_type_beyond_16_bits_is_refused() -> None:
    floats = Image.fromarray(np.random.default_rng(8).random((5, 5)).astype(np.float32))
    with pytest.raises(BadImage, match="pixel type F"):
        decode_image(file_of(floats, "TIFF"))


def test_a_ppm_header_fills_one_row_and_pillow_opens_the_file() -> None:
    rng = np.random.default_rng(9)
    for width in [*range(11, 140), 999, 1000]:
        height = int(rng.integers(1, 40))
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        header = ppm_header(height, width)
        assert len(header) == 3 * width
        content = encode_image(pixels, "ppm", 90)
        assert content == header + pixels.tobytes()
        image = pillow(content)
        assert image.format == "PPM"
        assert np.array_equal(np.asarray(image), pixels)
        rows = np.frombuffer(content, np.uint8).reshape(height + 1, width, 3)
        assert np.array_equal(rows[1:], pixels)


def test_a_ppm_header_of_the_largest_heights_fits() -> None:
    for height in (9_999, 65_000, 9_999_999):
        assert len(ppm_header(height, 11)) == 33
        assert ppm_header(height, 11).endswith(f"\n11 {height}\n255\n".encode())
    with pytest.raises(ValueError, match="width 4 px"):
        ppm_header(4, 4)


def test_a_whole_image_that_would_become_huge_is_refused() -> None:
    ribbon = np.zeros((1, 5000, 3), np.uint8)
    with pytest.raises(BadImage, match="5000×1 would become 1280000×256"):
        check_rescaled_size(ribbon, 256, True)
    check_rescaled_size(ribbon, 256, False)  # without --keep-aspect, only the central square is rescaled
    check_rescaled_size(np.zeros((300, 400, 3), np.uint8), 256, True)
    check_rescaled_size(np.zeros((10, 50, 3), np.uint8), 4096, True)  # 84 million pixels
    with pytest.raises(BadImage, match="would become 32768×4096"):
        check_rescaled_size(np.zeros((10, 80, 3), np.uint8), 4096, True)  # 134 million pixels

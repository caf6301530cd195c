"""prep.images.codec against Pillow on files made here, and against the JPEG and PPM formats read byte by byte.

Every file is made in memory from seeded pixels. What must be refused is refused with BadImage and a reason.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg
from PIL import Image

from prep.images.codec import (
    BadImage,
    _read_jpeg,
    check_rescaled_size,
    decode_image,
    encode_image,
    has_image_signature,
    ppm_header,
)

Pixels = npt.NDArray[np.uint8]


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pillow(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


def segments(jpeg: bytes) -> list[tuple[int, bytes]]:
    """(marker, content) of every segment of a JPEG file up to the start of scan."""
    assert jpeg[:2] == b"\xff\xd8"
    found, at = [], 2
    while True:
        assert jpeg[at] == 0xFF
        marker, size = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.append((marker, jpeg[at + 4 : at + 2 + size]))
        at += 2 + size
        if marker == 0xDA:
            return found


PHOTO = smooth(60, 83)


@pytest.mark.parametrize("options", [{"quality": 95}, {"progressive": True}, {"subsampling": "4:4:4"}])
def test_rgb_jpeg(options: dict[str, Any]) -> None:
    content = file_of(PHOTO, "JPEG", **options)
    picture = decode_image(content)
    assert picture.pixels.dtype == np.uint8
    assert np.array_equal(picture.pixels, np.asarray(pillow(content)))
    assert picture.converted == ()
    assert picture.orientation == 1


def odd_jpegs() -> dict[str, bytes]:
    """Of every kind that Pillow and simplejpeg write: samplings, scans, tables, restart markers, odd sizes."""
    found = {}
    for height, width in ((60, 83), (1, 1), (7, 9), (16, 16), (17, 33), (8, 200), (201, 1)):
        noise = np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
        for sampling in ("4:4:4", "4:2:2", "4:2:0"):
            for progressive in (False, True):
                options = {"subsampling": sampling, "progressive": progressive, "quality": 80}
                found[f"{sampling} {height}x{width} {progressive}"] = file_of(Image.fromarray(noise), "JPEG", **options)
        for sampling in ("440", "411"):
            found[f"{sampling} {height}x{width}"] = bytes(simplejpeg.encode_jpeg(noise, 90, "RGB", sampling))
    for quality in (1, 30, 100):
        found[f"quality {quality}"] = file_of(PHOTO, "JPEG", quality=quality)
    found["optimized"] = file_of(PHOTO, "JPEG", optimize=True)
    found["restart markers"] = file_of(PHOTO, "JPEG", restart_marker_blocks=3)
    found["restart markers, progressive"] = file_of(PHOTO, "JPEG", restart_marker_rows=1, progressive=True)
    found["not transformed"] = file_of(PHOTO, "JPEG", keep_rgb=True)
    found["tables of its own"] = file_of(PHOTO, "JPEG", qtables=[list(range(1, 65)), [40] * 64])
    found["comment and profile"] = file_of(PHOTO, "JPEG", comment=b"x" * 900, icc_profile=b"y" * 90_000)
    found["large"] = file_of(smooth(700, 1001), "JPEG", quality=85)
    return found


ODD_JPEGS = odd_jpegs()


@pytest.mark.parametrize("name", list(ODD_JPEGS))
def test_fast_path_gives_pillows_pixels(name: str) -> None:
    """And it is the fast path that gives them, not Pillow."""
    content = ODD_JPEGS[name]
    expected = np.asarray(pillow(content))
    picture = decode_image(content)
    assert picture.pixels.dtype == np.uint8
    assert np.array_equal(picture.pixels, expected)
    assert (picture.converted, picture.orientation) == ((), 1)
    fast = _read_jpeg(content)
    assert fast is not None
    assert np.array_equal(fast.pixels, expected)


def test_what_the_fast_path_leaves_to_pillow() -> None:
    """Other colours, and whatever libjpeg warns of or refuses: the same pixels, the same reasons as Pillow alone."""
    noise = np.random.default_rng(3).integers(0, 256, (60, 83, 3), dtype=np.uint8)
    whole = file_of(Image.fromarray(noise), "JPEG")
    scan = whole.index(b"\xff\xda") + 14
    middle = scan + (len(whole) - scan) // 2
    files = {
        "grey": file_of(PHOTO.convert("L"), "JPEG"),
        "cmyk": file_of(PHOTO.convert("CMYK"), "JPEG"),
        "cut, with an end": whole[:middle] + b"\xff\xd9",
        "a hole": whole[:middle] + whole[middle + 90 :],
        "bent": whole[:middle] + bytes(60) + whole[middle + 60 :],
        "bytes before a marker": whole[:2] + b"\0\0\0" + whole[2:],
        "cut": whole[:middle],
        "no tables": whole[: whole.index(b"\xff\xdb")] + whole[whole.index(b"\xff\xc0") :],
    }
    kept = 0
    for name, content in files.items():
        if name not in ("a hole", "bent"):  # noise in the middle of a scan is a code for some pixels too
            assert _read_jpeg(content) is None, name
        try:
            expected = np.asarray(pillow(content).convert("RGB"))
        except Exception:
            with pytest.raises(BadImage):
                decode_image(content)
        else:
            kept += 1
            assert np.array_equal(decode_image(content).pixels, expected), name
    assert kept >= 5


def test_bent_jpegs_are_judged_as_pillow_judges_them() -> None:
    """Any bytes changed: the same pixels as Pillow's, or refused where Pillow refuses."""
    rng = np.random.default_rng(11)
    content = file_of(smooth(40, 56, 3), "JPEG", quality=80)
    outcomes = set()
    for _ in range(400):
        bent = bytearray(content)
        for at in rng.integers(2, len(content), int(rng.integers(1, 4))):
            bent[at] = rng.integers(0, 256)
        try:
            expected = np.asarray(pillow(bytes(bent)).convert("RGB"))
        except Exception:
            with pytest.raises(BadImage):
                decode_image(bytes(bent))
            outcomes.add("refused")
        else:
            try:
                got = decode_image(bytes(bent))
            except BadImage as why:
                assert "more than" in str(why)  # a size that only a bomb has
                continue
            assert np.array_equal(got.pixels, expected)
            outcomes.add("read")
    assert outcomes == {"refused", "read"}


def test_names_and_first_bytes_of_every_format_may_be_a_picture() -> None:
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        assert has_image_signature(file_of(PHOTO, format)[:8])
    assert has_image_signature(file_of(PHOTO.convert("1"), "PPM")[:8])
    for head in (b"", b"\0" * 8, b"%!PS-Ado", b"<html><b", b"\x7fELF\2\1\1", b"\xff\xd8"):
        assert not has_image_signature(head)


def test_formats_that_are_not_read_are_not_even_tried() -> None:
    """Pillow would start Ghostscript for PostScript, and knows dozens of formats that no photograph has."""
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    for content in (script, file_of(PHOTO, "ICO"), file_of(PHOTO, "TGA"), file_of(PHOTO, "JPEG2000"), b"%PDF-1.4\n"):
        with pytest.raises(BadImage, match="not a picture in a format that is known"):
            decode_image(content)


@pytest.mark.parametrize(
    ("format", "said"),
    [("PNG", "png"), ("BMP", "bmp"), ("TIFF", "tiff"), ("PPM", "ppm"), ("WEBP", "webp")],
)
def test_lossless_containers_give_the_pixels_and_are_accounted(format: str, said: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    picture = decode_image(file_of(PHOTO, format, **options))
    assert np.array_equal(picture.pixels, np.asarray(PHOTO))
    assert picture.converted == (said,)


def test_grey_jpeg_is_three_equal_channels() -> None:
    content = file_of(PHOTO.convert("L"), "JPEG")
    picture = decode_image(content)
    assert np.array_equal(picture.pixels, np.stack([np.asarray(pillow(content))] * 3, axis=2))
    assert picture.converted == ("grey",)


def test_cmyk_jpeg_is_the_product_of_ink_and_black() -> None:
    content = file_of(PHOTO.convert("CMYK"), "JPEG", quality=95)
    ink = np.asarray(pillow(content)).astype(np.float64)
    assert ink.shape[2] == 4
    expected = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    picture = decode_image(content)
    assert np.abs(picture.pixels - expected).max() <= 1
    assert np.abs(picture.pixels - np.asarray(PHOTO).astype(float)).mean() < 4  # not the negative, as Adobe stores it
    assert picture.converted == ("cmyk",)


def test_palette() -> None:
    indexed = PHOTO.quantize(16)
    table = np.array(indexed.getpalette(), np.uint8).reshape(-1, 3)
    expected = table[np.asarray(indexed)]
    for format in ("PNG", "GIF"):
        picture = decode_image(file_of(indexed, format))
        assert np.array_equal(picture.pixels, expected)
        assert picture.converted == (format.lower(), "palette")


def test_alpha_is_dropped_not_blended() -> None:
    rgb = np.asarray(PHOTO)
    alpha = np.random.default_rng(1).integers(0, 256, rgb.shape[:2], dtype=np.uint8)
    picture = decode_image(file_of(Image.fromarray(np.dstack([rgb, alpha])), "PNG"))
    assert np.array_equal(picture.pixels, rgb)
    assert picture.converted == ("png", "alpha")


def test_sixteen_bit_grey_is_its_high_byte() -> None:
    deep = np.random.default_rng(2).integers(0, 65536, (20, 30), dtype=np.uint16)
    picture = decode_image(file_of(Image.fromarray(deep), "PNG"))
    assert np.array_equal(picture.pixels, np.stack([(deep // 256).astype(np.uint8)] * 3, axis=2))
    assert picture.converted == ("png", "16-bit", "grey")


def test_black_and_white() -> None:
    bits = np.random.default_rng(3).random((20, 30)) < 0.5
    picture = decode_image(file_of(Image.fromarray(bits), "PNG"))
    assert np.array_equal(picture.pixels, np.stack([bits * np.uint8(255)] * 3, axis=2))
    assert picture.converted == ("png", "grey")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_said_not_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for options in ({}, {"progressive": True}, {"comment": b"x" * 2000}, {"icc_profile": b"y" * 70_000}):
        assert decode_image(file_of(PHOTO, "JPEG", exif=exif, **options)).orientation == orientation
    assert decode_image(file_of(PHOTO.convert("L"), "JPEG", exif=exif)).orientation == orientation
    picture = decode_image(file_of(PHOTO, "JPEG", exif=exif))
    assert picture.orientation == orientation
    assert picture.converted == ()
    assert np.array_equal(picture.pixels, decode_image(file_of(PHOTO, "JPEG")).pixels)


@pytest.mark.parametrize(
    "block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(40), b"Exif\0\0MM"]
)
def test_broken_exif_is_no_reason_to_refuse(block: bytes) -> None:
    picture = decode_image(file_of(PHOTO, "JPEG", exif=block))
    assert picture.orientation == 1
    assert np.array_equal(picture.pixels, np.asarray(pillow(file_of(PHOTO, "JPEG"))))


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
        (b"This is no picture.\n", "not a picture"),
        (b"<!DOCTYPE html><html>404</html>", "not a picture"),
        (b"\xff\xd8\xff", "not a picture"),
        (b"\xff\xd8\xff\xe0 a JPEG by its first bytes alone" + bytes(500), "cannot be decoded: ."),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a picture"),
        (b"P6\n10 10\n255\n" + bytes(100), "cannot be decoded: ."),
        (bytes(10_000), "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode_image(content)
    assert str(caught.value)
    assert "\n" not in str(caught.value)


def test_random_bytes_are_refused() -> None:
    """Alone, and after the first bytes of the usual formats, which hand them to a decoder."""
    rng = np.random.default_rng(5)
    starts = [file_of(PHOTO, format)[:30] for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP")]
    for start in [b"", *starts]:
        for _ in range(40):
            with pytest.raises(BadImage):
                decode_image(start + rng.bytes(int(rng.integers(1, 400))))


def test_damaged_files_give_a_picture_or_bad_picture() -> None:
    rng = np.random.default_rng(6)
    for format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        content = file_of(PHOTO, format)
        for _ in range(60):
            damaged = bytearray(content)
            for at in rng.integers(0, min(len(content), 700), 3):
                damaged[at] = rng.integers(0, 256)
            try:
                pixels = decode_image(bytes(damaged)).pixels
            except BadImage as error:
                assert str(error)
            else:
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                assert pixels.shape[2] == 3


@pytest.mark.parametrize("size", [(12_000, 9_000), (20_000, 20_000)])
def test_a_bomb_is_refused_by_its_size(size: tuple[int, int]) -> None:
    """A BMP header that promises more than 100 million pixels, and nothing after it."""
    content = bytearray(file_of(Image.new("L", (1, 1)), "BMP"))
    content[18:26] = size[0].to_bytes(4, "little") + size[1].to_bytes(4, "little")
    with pytest.raises(BadImage, match="more than 100,000,000 pixels"):
        decode_image(bytes(content))


def test_pixel_type_beyond_16_bits_is_refused() -> None:
    floats = Image.fromarray(np.random.default_rng(8).random((5, 5)).astype(np.float32))
    with pytest.raises(BadImage, match="pixel type F"):
        decode_image(file_of(floats, "TIFF"))


def test_ppm_header_fills_one_row_and_pillow_opens_it() -> None:
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


def test_ppm_header_of_the_largest_heights() -> None:
    for height in (9_999, 65_000, 9_999_999):
        assert len(ppm_header(height, 11)) == 33
        assert ppm_header(height, 11).endswith(f"\n11 {height}\n255\n".encode())
    with pytest.raises(ValueError, match="width 4 px"):
        ppm_header(4, 4)


@pytest.mark.parametrize(("quality", "first"), [(50, 16), (75, 8), (90, 3), (100, 1)])
def test_jpeg_payload_is_baseline_420_without_exif(quality: int, first: int) -> None:
    """`first` is the DC step of luminance: 16 in the standard's table, scaled by IJG's rule for the quality."""
    pixels = np.asarray(smooth(60, 84))
    found = segments(encode_image(pixels, "jpeg", quality))
    markers = [marker for marker, _ in found]
    assert 0xE1 not in markers  # APP1: EXIF
    frames = [(marker, content) for marker, content in found if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8)]
    assert [marker for marker, _ in frames] == [0xC0]  # SOF0: baseline
    frame = frames[0][1]
    assert frame[0] == 8
    assert (int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")) == (60, 84)
    assert frame[5] == 3
    assert [frame[7], frame[10], frame[13]] == [0x22, 0x11, 0x11]  # 4:2:0
    tables = b"".join(content for marker, content in found if marker == 0xDB)
    assert tables[:2] == bytes([0, first])


def test_jpeg_payload_drops_what_the_source_carried() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    source = file_of(PHOTO, "JPEG", exif=exif, comment=b"hello", icc_profile=b"no profile")
    payload = encode_image(decode_image(source).pixels, "jpeg", 90)
    assert [marker for marker, _ in segments(payload) if 0xE1 <= marker <= 0xEF or marker == 0xFE] == []


def test_jpeg_payload_decodes_to_nearly_the_same_pixels() -> None:
    pixels = np.asarray(smooth(64, 96))
    decoded = np.asarray(pillow(encode_image(pixels, "jpeg", 95))).astype(float)
    assert decoded.shape == pixels.shape
    assert np.abs(decoded - pixels).mean() < 2


def test_whole_picture_that_would_become_huge_is_refused() -> None:
    ribbon = np.zeros((1, 5000, 3), np.uint8)
    with pytest.raises(BadImage, match="5000×1 would become 1280000×256"):
        check_rescaled_size(ribbon, 256, True)
    check_rescaled_size(ribbon, 256, False)  # only the square of it is ever made
    check_rescaled_size(np.zeros((300, 400, 3), np.uint8), 256, True)
    check_rescaled_size(np.zeros((10, 50, 3), np.uint8), 4096, True)  # 84 million pixels
    with pytest.raises(BadImage, match="would become 32768×4096"):
        check_rescaled_size(np.zeros((10, 80, 3), np.uint8), 4096, True)  # 134 million

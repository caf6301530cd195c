"""prep.images.formats: signatures, accepted formats, missing packages, and AVIF, HEIC and JPEG XL files."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from prep.images import formats
from prep.images.codec import BadImage, decode_image
from prep.images.formats import HEAD_BYTES, has_image_signature, unknown_format, unreadable_reason
from tests.prep.images.small_images import PHOTO, file_of, smooth

PLUGINS = {"AVIF": "PIL", "HEIF": "pillow_heif", "JXL": "pillow_jxl"}


def modern_file(format: str, image: Image.Image = PHOTO, **options: object) -> bytes:
    plugin = pytest.importorskip(PLUGINS[format])
    if format == "HEIF":
        plugin.register_heif_opener()
    return file_of(image, format, **options)


def test_the_signature_of_every_format_is_recognized() -> None:
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", *PLUGINS):
        content = modern_file(format) if format in PLUGINS else file_of(PHOTO, format)
        assert has_image_signature(content[:HEAD_BYTES])
        assert unreadable_reason(content[:HEAD_BYTES]) == ""
    assert has_image_signature(file_of(PHOTO.convert("1"), "PPM")[:HEAD_BYTES])
    movie = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2avc1mp41"
    for head in (b"", b"\0" * 32, b"%!PS-Ado", b"<html><b", b"\x7fELF\2\1\1", b"\xff\xd8", movie):
        assert not has_image_signature(head)
        assert unreadable_reason(head) == unknown_format()


def test_a_general_brand_is_read_as_the_format_of_its_compatible_brands() -> None:
    """Some programs write AVIF files with the major brand mif1, and list the brand avif after it."""
    content = modern_file("AVIF")
    assert content[8:12] == b"avif" and content[16:20] == b"avif"
    renamed = content[:8] + b"mif1" + content[12:]
    assert np.array_equal(decode_image(renamed).pixels, decode_image(content).pixels)


@pytest.mark.parametrize("format", PLUGINS)
def test_modern_formats_are_decoded_and_counted(format: str) -> None:
    photo = smooth(60, 83, 7)
    image = decode_image(modern_file(format, photo, quality=95))
    assert image.converted == (format.lower(),)
    assert np.abs(image.pixels.astype(int) - np.asarray(photo)).mean() < 5
    transparent = photo.copy()
    transparent.putalpha(0)
    over_white = decode_image(modern_file(format, transparent, quality=95))
    assert over_white.converted == (format.lower(), "alpha") and over_white.pixels.min() == 255


@pytest.mark.parametrize("format", PLUGINS)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_modern_files_are_bad(format: str, share: float) -> None:
    content = modern_file(format)
    with pytest.raises(BadImage, match=r"^cannot be decoded: \S") as caught:
        decode_image(content[: max(40, int(len(content) * share))])
    assert "\n" not in str(caught.value)


def test_an_unknown_file_is_refused_with_the_accepted_formats(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("JPEG", "PNG", "GIF", "BMP", "WebP", "TIFF", "PNM", "AVIF", "HEIC", "JPEG XL"):
        assert name in unknown_format()
    monkeypatch.setattr(formats, "_can_read", lambda format: format == "AVIF")
    unknown_format.cache_clear()
    try:
        heic, jxl = "pip install 'pillow-heif>=1.0'", "pip install 'pillow-jxl-plugin>=1.3'"
        assert unknown_format().endswith(f"PNM, AVIF, HEIC after {heic}, JPEG XL after {jxl})")
        with pytest.raises(BadImage, match=f"^a HEIC image, whose decoder is not installed: {heic}$"):
            decode_image(b"\0\0\0\x18ftypheic" + bytes(100))
        with pytest.raises(BadImage, match=f"^a JPEG XL image.*: {jxl}$"):
            decode_image(b"\xff\x0a" + bytes(100))
    finally:
        unknown_format.cache_clear()

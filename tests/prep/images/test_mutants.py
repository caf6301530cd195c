"""Randomly changed files of every format.

For each file, the decoder returns an image or raises BadImage within seconds, and prints nothing.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prep.images.codec import BadImage, decode_image
from prep.images.formats import HEAD_BYTES, unreadable_reason
from tests.prep.images.small_images import file_of, smooth

PHOTO = smooth(40, 56, 3)
MAX_CPU_S = 10.0  # the slowest of 25,000 changed files took less than 3 s


def seed_files() -> dict[str, bytes]:
    """Return an intact file of each format."""
    transparent, grey = PHOTO.copy(), PHOTO.convert("L")
    transparent.putalpha(grey)
    kinds: list[tuple[str, Image.Image, dict[str, Any]]] = [
        *[
            (format, PHOTO, {})
            for format in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "HEIF", "JXL")
        ],
        *[(format, transparent, {}) for format in ("PNG", "WEBP", "TIFF", "AVIF", "HEIF", "JXL")],
        *[("TIFF", PHOTO, {"compression": name}) for name in ("tiff_lzw", "jpeg", "tiff_deflate", "packbits")],
        *[("TIFF", PHOTO.convert("1"), {"compression": name}) for name in ("group3", "group4")],
        *[("JPEG", PHOTO, {"progressive": True}), ("JPEG", grey, {}), ("JPEG", PHOTO.convert("CMYK"), {})],
        ("PNG", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), {}),
        ("PNG", PHOTO.quantize(9), {"transparency": b"\0\x80"}),
    ]
    files = {}
    for number, (format, image, options) in enumerate(kinds):
        head = {"HEIF": b"\0\0\0\x18ftypheic", "JXL": b"\xff\x0a"}.get(format, b"\xff\xd8\xff")
        if not unreadable_reason(head.ljust(HEAD_BYTES, b"\0")):  # this call loads the plugin, if it is installed
            files[f"{number} {format} {image.mode} {options}"] = file_of(image, format, **options)
    return files


@pytest.mark.parametrize("mutants", [6, pytest.param(900, marks=pytest.mark.soak)])
def test_mutants_are_images_or_bad(mutants: int, capfd: pytest.CaptureFixture[str]) -> None:
    """One to five bytes of each file are changed. A fifth of the files is also truncated."""
    rng, kept, bad = np.random.default_rng(mutants), 0, 0
    for name, content in seed_files().items():
        assert decode_image(content).pixels.shape == (40, 56, 3), name
        for _ in range(mutants):
            mutant = bytearray(content)
            for offset in rng.integers(0, len(mutant), int(rng.integers(1, 6))):
                mutant[offset] = rng.integers(0, 256)
            length = int(rng.integers(1, len(mutant))) if rng.random() < 0.2 else len(mutant)
            began = time.process_time()
            try:
                image = decode_image(bytes(mutant[:length]))
            except BadImage as reason:
                assert str(reason) and "\n" not in str(reason), name
                bad += 1
            else:
                assert image.pixels.dtype == np.uint8 and image.pixels.ndim == 3 and image.pixels.shape[2] == 3, name
                kept += 1
            assert time.process_time() - began < MAX_CPU_S, name
    assert kept > mutants and bad > mutants
    assert capfd.readouterr().err == ""

"""Small images and image files for the tests of decoding and encoding. Pillow is the independent reference."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a smooth RGB image of random colours, which JPEG changes little."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of the file that Pillow writes for `image` in the format `format`."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pillow(content: bytes) -> Image.Image:
    """Return the image that Pillow decodes from a file."""
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


PHOTO = smooth(60, 83)

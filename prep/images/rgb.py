"""RGB pixels of an image that Pillow has decoded: conversions, 16-bit channels, transparency.

A transparent image is drawn over a background colour. A pixel with value v and alpha a over a background b becomes
(a·v + (255 − a)·b) / 255, rounded to the nearest integer. An opaque pixel therefore keeps its value. Of channels with
more than 8 bits, only the highest 8 bits are kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from prep.images.formats import BadImage
from prep.store.manifest import DROPPED

LEVELS = {"white": 255, "black": 0, "grey": 128}  # background -> grey level of R, G and B
_BLOCK_ROWS = 256  # images are computed in blocks of rows, to save memory
_ALPHA_MODES = ("LA", "PA", "RGBA", "La", "RGBa")
_CONVERTED_MODES = {  # Pillow's mode -> name in DecodedImage.converted
    "L": "grey",
    "LA": "grey",
    "1": "grey",
    "CMYK": "cmyk",
    "P": "palette",
    "PA": "palette",
}
_OTHER_MODES = ("RGB", "RGBA", "RGBa", "La", "YCbCr", "LAB", "HSV", "RGBX")
_TIFF_PHOTOMETRIC, _TIFF_BITS = 262, 258
_MAX_BOXES_BYTES = 20_000  # AVIF and HEIC files describe the image within their first 20 kB


class FileFacts(NamedTuple):
    """Properties of the pixels in a file that Pillow's `mode` does not show."""

    bits: int = 8  # number of bits of a channel
    is_grey: bool = False  # whether the file has grey levels, with or without alpha
    # Whether this is a TIFF in which grey level 0 is white. Pillow inverts such grey levels only if they have 8 bits.
    zero_is_white: bool = False


def file_facts(image: Image.Image, content: bytes) -> FileFacts:
    """Return the FileFacts of an image that Pillow has opened, but not loaded."""
    if image.format == "PNG":
        return FileFacts(bits=content[24], is_grey=content[25] in (0, 4))
    if image.format == "TIFF":
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        photometric = tags.get(_TIFF_PHOTOMETRIC)
        return FileFacts(max(tags.get(_TIFF_BITS, (1,))), photometric in (0, 1), photometric == 0)
    if image.format == "PPM":
        (codec, _, _, arguments), *_ = image.tile  # type: ignore[attr-defined]
        # The last of `arguments` is the largest value that a channel can have.
        is_deep = image.mode == "I" or (codec.startswith("ppm") and arguments[-1] > 255)
        return FileFacts(bits=16 if is_deep else 8, is_grey=image.mode in ("1", "L", "I"))
    if image.format in ("AVIF", "HEIF"):
        # The box `pixi` has a version and flags (4 bytes), the number of channels, and the bits of each channel.
        at = content.find(b"pixi", 0, _MAX_BOXES_BYTES) + 8
        return FileFacts(bits=content[at + 1] if at > 8 and at + 1 < len(content) else 8)
    return FileFacts()


def rgb_pixels(image: Image.Image, facts: FileFacts, background: str) -> tuple[npt.NDArray[np.uint8], list[str]]:
    """Return the RGB pixels (H, W, 3) of a loaded image, and its conversions (see DecodedImage.converted)."""
    mode, is_transparent = image.mode, _has_transparency(image)
    names = [f"{facts.bits}-bit"] * (facts.bits > 8)
    is_deep_grey = mode.startswith("I;16") or (mode == "I" and image.format == "PPM")  # 16-bit PGMs have the mode I
    kind = "grey" if is_deep_grey or facts.is_grey else _CONVERTED_MODES.get(mode, "")
    names += [kind] * bool(kind) + ["alpha"] * is_transparent
    if is_deep_grey:
        return _deep_grey_pixels(image, facts, background), names
    if mode not in _OTHER_MODES and mode not in _CONVERTED_MODES:
        raise BadImage(f"pixel type {mode}, expected 8 or 16 bits per channel")
    if is_transparent:
        _repair_transparent_color(image, facts.bits)
        return _over_background(image, background), names
    return np.asarray(image if mode == "RGB" else image.convert("RGB")), names


def _deep_grey_pixels(image: Image.Image, facts: FileFacts, background: str) -> npt.NDArray[np.uint8]:
    """Return the highest 8 bits of grey levels of 12 or 16 bits, as RGB pixels (H, W, 3)."""
    levels, key = np.asarray(image), image.info.get("transparency")
    pixels = np.empty((*levels.shape, 3), np.uint8)
    for top in range(0, len(levels), _BLOCK_ROWS):
        block = levels[top : top + _BLOCK_ROWS]
        high = (block >> (4 if facts.bits == 12 else 8)).astype(np.uint8)
        high = 255 - high if facts.zero_is_white else high
        if isinstance(key, int) and background != DROPPED:
            high[block == key] = LEVELS[background]
        pixels[top : top + _BLOCK_ROWS] = high[..., None]
    return pixels


def _has_transparency(image: Image.Image) -> bool:
    """Return whether an open image has an alpha channel, a transparent colour or transparent palette entries."""
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def _over_background(image: Image.Image, background: str) -> npt.NDArray[np.uint8]:
    """Return the RGB pixels (H, W, 3) of a transparent image over "white", "black" or "grey".

    If `background` is DROPPED, the alpha channel is dropped, and each pixel keeps its colour.
    """
    if background == DROPPED:
        return np.asarray(image.convert("RGB"))
    level = LEVELS[background]
    if image.mode in ("La", "RGBa"):  # Pillow converts La only to LA, and RGBa only to RGBA
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    width, height = image.size
    pixels = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _BLOCK_ROWS):
        bottom = min(top + _BLOCK_ROWS, height)
        block = np.asarray(image.crop((0, top, width, bottom))).astype(np.uint32)
        alpha = block[..., 3:]
        pixels[top:bottom] = (alpha * block[..., :3] + (255 - alpha) * level + 127) // 255
    return pixels


def _repair_transparent_color(image: Image.Image, bits: int) -> None:
    """Convert the transparent colour of a PNG to the range of Pillow's 8-bit pixels.

    Pillow scales pixels with 2-bit and 4-bit grey levels to 0..255, and keeps the high bytes of 16-bit pixels, but does
    not convert the transparent colour in the same way. `bits` is the number of bits of a channel in the file.
    """
    color = image.info.get("transparency")
    if image.mode == "L" and isinstance(color, int) and bits in (2, 4):
        image.info["transparency"] = color * 255 // (2**bits - 1)
    elif image.mode == "RGB" and isinstance(color, tuple) and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in color)

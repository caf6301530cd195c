"""Image decoding (JPEG, PNG, GIF, BMP, WebP, TIFF, PNM to RGB) with limits for hostile files; JPEG and PPM encoding.

The format is detected from the content, never from the file name: ILSVRC has one PNG file that is named .JPEG. 22 of
ILSVRC's JPEGs are CMYK and are converted to RGB. EXIF orientation is reported but not applied; the authors' data
preparation did not apply it either. An alpha channel is dropped. Nearly all files of ILSVRC are colour JPEGs.
libjpeg-turbo (prep.images.jpeg) decodes colour JPEGs a quarter faster than Pillow and gives the same pixels. Pillow
decodes the other formats, the grey and CMYK JPEGs, and the JPEGs that libjpeg-turbo cannot decode or warns about.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from prep.images.jpeg import decode_jpeg, encode_jpeg
from prep.images.rescale import rescaled_size

MAX_PIXELS = 100_000_000  # limit for inputs and for rescaled images; a larger input may be a decompression bomb
MAX_FILE_BYTES = 256_000_000
UNKNOWN_FORMAT = "not an image in a known format"

T = TypeVar("T")

_EXIF_ORIENTATION = 0x0112
# Pillow's names of the input formats. EPS is excluded, because Pillow starts Ghostscript to decode it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
_SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II", b"MM", b"P")
_MAX_SCANNED_PIXELS = 20 * MAX_PIXELS  # limit for pixels × scans: 20 scans for a progressive JPEG of MAX_PIXELS
_MAX_SEGMENTS = 10_000  # limit for a JPEG's segments before its first scan; Pillow needs at least 1 µs for each segment
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_USUAL_CONTAINER = "jpeg"  # format of ILSVRC's files; an image in another format counts as converted
_CONVERTED_MODES = {  # Pillow's mode -> name in DecodedImage.converted
    "L": "grey",
    "LA": "grey",
    "1": "grey",
    "CMYK": "cmyk",
    "P": "palette",
    "PA": "palette",
    "RGBA": "alpha",
}


class BadImage(ValueError):
    """A file that cannot be used as an image. The message is the reason, without the file's name."""


@dataclass(frozen=True)
class DecodedImage:
    """RGB pixels of a decoded file, with its conversions and EXIF orientation."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    converted: tuple[str, ...]  # conversions made: "grey", "cmyk", "palette", "alpha", "16-bit", "png"…
    orientation: int  # EXIF orientation, 1..8, not applied to `pixels`; 1 if the file has none


def decode_image(content: bytes) -> DecodedImage:
    """Decode a JPEG, PNG, GIF, BMP, WebP, TIFF or PNM file to RGB. Raises BadImage with the reason.

    Only the first image of an animation or of a file with several images is decoded. MAX_PIXELS limits
    the memory. A limit on the scans of a progressive JPEG limits the decoding time.
    """
    if not content:
        raise BadImage("empty file")
    image = _decode_color_jpeg(content) if content.startswith(_SIGNATURES[0]) else None
    return image or _with_pillow(content, lambda opened: _decode_with_pillow(opened, content))


def has_image_signature(head: bytes) -> bool:
    """Whether a file that begins with `head` (at least 4 bytes) may be in a format that decode_image reads."""
    return head.startswith(_SIGNATURES)


def _decode_color_jpeg(content: bytes) -> DecodedImage | None:
    """Decode an RGB or YCbCr JPEG with libjpeg-turbo. Raises BadImage for too many pixels, scans or segments.

    Returns None for another colour space, or if libjpeg-turbo cannot decode the file or warns about it.
    """
    has_exif = _has_exif(content)
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height)
        _check_scans(width, height, content)
        if color_space not in ("YCbCr", "RGB"):
            return None
        pixels = decode_jpeg(content)
    except BadImage:
        raise
    except ValueError:
        return None
    orientation = 1
    if has_exif:
        with suppress(BadImage):  # ignore a broken EXIF block: the pixels are good
            orientation = _with_pillow(content, _exif_orientation)
    return DecodedImage(pixels, (), orientation)


def _has_exif(content: bytes) -> bool:
    """Whether a JPEG has an EXIF segment before its first scan. Raises BadImage for too many segments.

    A segment begins with a byte FF, any number of further FF bytes as padding, a marker byte and the segment's length.
    """
    offset = 2
    for _ in range(_MAX_SEGMENTS):
        while content[offset : offset + 2] == b"\xff\xff":
            offset += 1
        if content[offset : offset + 1] != b"\xff" or content[offset + 1 : offset + 2] == b"\xda":
            return False
        if content[offset + 1 : offset + 2] == b"\xe1" and content.startswith(b"Exif\0\0", offset + 4):
            return True
        offset += 2 + max(int.from_bytes(content[offset + 2 : offset + 4]), 2)
        if offset + 4 > len(content):
            return False
    raise BadImage(f"more than {_MAX_SEGMENTS:,} segments before the first scan")


def _with_pillow(content: bytes, use: Callable[[Image.Image], T]) -> T:
    """Open `content` with Pillow and return `use(image)`. Raises BadImage if Pillow raises an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd EXIF data (harmless) and large sizes (checked here)
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return use(image)
        except BadImage:
            raise
        except UnidentifiedImageError:
            raise BadImage(UNKNOWN_FORMAT) from None
        except Image.DecompressionBombError:
            raise BadImage(f"more than {MAX_PIXELS:,} pixels") from None
        except Exception as error:  # Pillow's decoders can raise any exception for broken bytes
            raise BadImage(f"cannot be decoded: {error}" if str(error) else f"cannot be decoded: {error!r}") from None


def _decode_with_pillow(image: Image.Image, content: bytes) -> DecodedImage:
    width, height = image.size
    _check_size(width, height)
    if image.format in ("JPEG", "MPO"):  # a JPEG that _decode_color_jpeg left to Pillow
        _check_scans(width, height, content)
    converted = []
    container = (image.format or "unknown").lower()
    if container not in (_USUAL_CONTAINER, "mpo"):  # an MPO is a JPEG followed by more JPEGs
        converted.append(container)
    orientation = _exif_orientation(image)
    if container == "tiff" and orientation in _UNDO_ORIENTATION:  # undo Pillow, which turns a TIFF upright
        image.load()
        image = image.transpose(_UNDO_ORIENTATION[orientation])
    mode = image.mode
    if mode in _CONVERTED_MODES:
        converted.append(_CONVERTED_MODES[mode])
    if mode.startswith("I;16") or (mode == "I" and container == "ppm"):  # Pillow gives a 16-bit PGM the mode I
        converted += ["16-bit", "grey"]
        levels = np.asarray(image)
        pixels = np.empty((*levels.shape, 3), np.uint8)
        for top in range(0, len(levels), 256):  # in blocks, to save memory
            pixels[top : top + 256] = (levels[top : top + 256] >> 8)[..., None]
    elif mode in ("RGB", "YCbCr", "LAB", "HSV", "RGBX", *_CONVERTED_MODES):
        pixels = np.asarray(image if mode == "RGB" else image.convert("RGB"))
    else:
        raise BadImage(f"pixel type {mode}, expected 8 or 16 bits per channel")
    return DecodedImage(pixels, tuple(converted), orientation)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}×{height}: more than {MAX_PIXELS:,} pixels")


def _check_scans(width: int, height: int, content: bytes) -> None:
    # Count no scans in small files: a scan has at least ten bytes, so a small file has few scans.
    if width * height * len(content) > 16 * _MAX_SCANNED_PIXELS:
        scans = content.count(b"\xff\xda")
        if width * height * scans > _MAX_SCANNED_PIXELS:
            raise BadImage(f"{width}×{height} px in {scans:,} scans: decoding would take minutes")


def _exif_orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # ignore a broken EXIF block: the pixels may be good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def check_rescaled_size(pixels: npt.NDArray[np.uint8], side_px: int, keep_aspect: bool) -> None:
    """Raise BadImage if `keep_aspect` is set and the rescaled image would be too large.

    The limits are MAX_PIXELS for the image and 65,000 px for a side (libjpeg's limit is 65,500 px).
    """
    height, width = pixels.shape[:2]
    new_width, new_height = rescaled_size(width, height, side_px)
    if keep_aspect and (new_width * new_height > MAX_PIXELS or max(new_width, new_height) > 65_000):
        raise BadImage(f"{width}×{height} would become {new_width}×{new_height}")


def encode_image(pixels: npt.NDArray[np.uint8], format: str, quality: int) -> bytes:
    """Encode an image, uint8 (H, W, 3), for a record: as a baseline 4:2:0 JPEG, or as a PPM if `format` is "ppm".

    The header of a PPM is as long as one row of pixels (see ppm_header). `quality` is used for JPEG only.
    """
    if format == "ppm":
        return ppm_header(*pixels.shape[:2]) + pixels.tobytes()
    return encode_jpeg(pixels, quality)


def ppm_header(height: int, width: int) -> bytes:
    """A P6 header of 3·width bytes: a comment pads the header to the size of one row of pixels.

    Any image library can open a PPM with this header. Code that knows the header's size can view the file's bytes as
    uint8 (height + 1, width, 3) and skip the first row, without decoding or copying. Raises ValueError if `width` is so
    small that the header would be longer than a row.
    """
    head, tail = b"P6\n#", f"\n{width} {height}\n255\n".encode()
    padding = 3 * width - len(head) - len(tail)
    if padding < 0:
        raise ValueError(f"width {width} px: a row of pixels is shorter than a PPM header")
    return head + b" " * padding + tail

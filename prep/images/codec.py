"""One picture: a file's bytes to RGB pixels, and pixels to the bytes that a record carries.

The format is sniffed from the content, never taken from the name: ILSVRC holds a PNG and 22 CMYK JPEGs under .JPEG.
EXIF orientation is reported, not applied, as in 2012. Alpha is dropped. Plain colour JPEGs, nearly all there are, go
through libjpeg-turbo alone (simplejpeg), a quarter faster than through Pillow and the same pixels; what it refuses or
warns of, and every other format, is for Pillow to judge.
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

MAX_PIXELS = 100_000_000  # of a source, and of what it is rescaled to: beyond it a file is a bomb, not a photograph
MAX_FILE_BYTES = 256_000_000

T = TypeVar("T")

_ORIENTATION = 0x0112
_READ = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # Pillow's names: never EPS, which starts a program
_HEADS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II", b"MM", b"P")
_MAX_SCANNED = 20 * MAX_PIXELS  # pixels times scans: a progressive JPEG of ten scans may have twice MAX_PIXELS
_MAX_SEGMENTS = 10_000  # of a JPEG before its picture: Pillow takes a microsecond and more for each
_UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_SAME = "jpeg"  # what a record of ILSVRC usually is; any other container is accounted as a conversion
_MODES = {"L": "grey", "LA": "grey", "1": "grey", "CMYK": "cmyk", "P": "palette", "PA": "palette", "RGBA": "alpha"}


class BadImage(ValueError):
    """A file that is no usable picture; the message is the reason, without the file's name."""


@dataclass(frozen=True)
class DecodedImage:
    """RGB pixels and what it took to get them."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    converted: tuple[
        str, ...
    ]  # what it was, where not an RGB JPEG: "grey", "cmyk", "palette", "alpha", "16-bit", "png"…
    orientation: int  # EXIF orientation, 1 where there is none: said, not applied


def decode_image(content: bytes) -> DecodedImage:
    """Decode a JPEG, PNG, GIF, BMP, WebP, TIFF or PNM file to RGB; raises BadImage with the reason.

    Of an animation or a file of several pictures the first. Bounded by MAX_PIXELS in memory and, by the number of
    scans of a progressive JPEG, in time.
    """
    if not content:
        raise BadImage("empty file")
    picture = _read_jpeg(content) if content.startswith(_HEADS[0]) else None
    return picture or _with_pillow(content, lambda image: _decode(image, content))


def has_image_signature(head: bytes) -> bool:
    """Whether a file that begins with `head`, 4 bytes at the least, can be of a format that decode_image knows."""
    return head.startswith(_HEADS)


def _read_jpeg(content: bytes) -> DecodedImage | None:
    """An RGB or YCbCr JPEG that libjpeg-turbo reads without a warning; None for any other."""
    has_exif = _has_exif(content)
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height)
        _check_scans(width, height, content)
        if colours not in ("YCbCr", "RGB"):
            return None
        pixels = decode_jpeg(content)
    except BadImage:
        raise
    except ValueError:
        return None
    orientation = 1
    if has_exif:
        with suppress(BadImage):  # a broken EXIF block says nothing about the picture
            orientation = _with_pillow(content, _orientation)
    return DecodedImage(pixels, (), orientation)


def _has_exif(content: bytes) -> bool:
    """Walks the segments before the first scan: FF, more of them as filling, a marker, a length."""
    at = 2
    for _ in range(_MAX_SEGMENTS):
        while content[at : at + 2] == b"\xff\xff":
            at += 1
        if content[at : at + 1] != b"\xff" or content[at + 1 : at + 2] == b"\xda":
            return False
        if content[at + 1 : at + 2] == b"\xe1" and content.startswith(b"Exif\0\0", at + 4):
            return True
        at += 2 + max(int.from_bytes(content[at + 2 : at + 4]), 2)
        if at + 4 > len(content):
            return False
    raise BadImage(f"more than {_MAX_SEGMENTS:,} segments before the picture")


def _with_pillow(content: bytes, use: Callable[[Image.Image], T]) -> T:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Pillow warns of is either harmless (odd EXIF) or judged here (size)
        try:
            with Image.open(io.BytesIO(content), formats=_READ) as image:
                return use(image)
        except BadImage:
            raise
        except UnidentifiedImageError:
            raise BadImage("not a picture in a format that is known") from None
        except Image.DecompressionBombError:
            raise BadImage(f"more than {MAX_PIXELS:,} pixels") from None
        except Exception as error:  # Pillow's decoders raise whatever the broken bytes lead them to
            raise BadImage(f"cannot be decoded: {error}" if str(error) else f"cannot be decoded: {error!r}") from None


def _decode(image: Image.Image, content: bytes) -> DecodedImage:
    width, height = image.size
    _check_size(width, height)
    if image.format in ("JPEG", "MPO"):  # libjpeg takes more kinds than simplejpeg has a name for
        _check_scans(width, height, content)
    converted = []
    container = (image.format or "unknown").lower()
    if container not in (_SAME, "mpo"):  # an MPO is a JPEG that is followed by others
        converted.append(container)
    orientation = _orientation(image)
    if container == "tiff" and orientation in _UNDO:  # of this format alone Pillow applies it
        image.load()
        image = image.transpose(_UNDO[orientation])
    mode = image.mode
    if mode in _MODES:
        converted.append(_MODES[mode])
    if mode.startswith("I;16") or (mode == "I" and container == "ppm"):  # the latter a PGM
        converted += ["16-bit", "grey"]
        numbers = np.asarray(image)
        pixels = np.empty((*numbers.shape, 3), np.uint8)
        for top in range(0, len(numbers), 256):
            pixels[top : top + 256] = (numbers[top : top + 256] >> 8)[..., None]
    elif mode in ("RGB", "YCbCr", "LAB", "HSV", "RGBX", *_MODES):
        pixels = np.asarray(image if mode == "RGB" else image.convert("RGB"))
    else:
        raise BadImage(f"pixel type {mode}, expected 8 or 16 bits a channel")
    return DecodedImage(pixels, tuple(converted), orientation)


def _check_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImage(f"{width}×{height}: more than {MAX_PIXELS:,} pixels")


def _check_scans(width: int, height: int, content: bytes) -> None:
    if width * height * len(content) > 16 * _MAX_SCANNED:  # a scan has a header of ten bytes and more
        scans = content.count(b"\xff\xda")
        if width * height * scans > _MAX_SCANNED:
            raise BadImage(f"{width}×{height} px in {scans:,} scans: would take minutes to decode")


def _orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing about the picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def check_rescaled_size(pixels: npt.NDArray[np.uint8], side_px: int, keep_aspect: bool) -> None:
    """Raise BadImage where the whole rescaled picture, which `keep_aspect` keeps, would be beyond reason."""
    height, width = pixels.shape[:2]
    new_width, new_height = rescaled_size(width, height, side_px)
    if keep_aspect and (new_width * new_height > MAX_PIXELS or max(new_width, new_height) > 65_000):
        raise BadImage(f"{width}×{height} would become {new_width}×{new_height}")


def encode_image(pixels: npt.NDArray[np.uint8], format: str, quality: int) -> bytes:
    """uint8 (H, W, 3) to a baseline 4:2:0 JPEG of `quality`, or to a PPM whose header fills exactly one row."""
    if format == "ppm":
        return ppm_header(*pixels.shape[:2]) + pixels.tobytes()
    return encode_jpeg(pixels, quality)


def ppm_header(height: int, width: int) -> bytes:
    """A P6 header of 3·width bytes: a comment pads it to one row of pixels.

    Any image library opens the file, and one that knows may take its bytes as uint8 (height + 1, width, 3) whose first
    row is not picture: no decoder, no copy. Raises ValueError where `width` is too small for a header (under 11 px).
    """
    head, tail = b"P6\n#", f"\n{width} {height}\n255\n".encode()
    padding = 3 * width - len(head) - len(tail)
    if padding < 0:
        raise ValueError(f"width {width} px is too small for a header of one row")
    return head + b" " * padding + tail

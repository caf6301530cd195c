"""Image decoding to RGB with limits for hostile files (formats.py lists the formats); JPEG and PPM encoding.

22 of ILSVRC's JPEGs are CMYK and are converted to RGB. EXIF orientation is reported but not applied; the authors' data
preparation did not apply it either. Transparent images are drawn over a background colour. From channels of 16 bits,
only the high bytes are kept. Nearly all files of ILSVRC are colour JPEGs. libjpeg-turbo (prep.images.jpeg) decodes
these files a quarter faster than Pillow, and gives the same pixels. Pillow decodes the other formats, the grey and CMYK
JPEGs, and the JPEGs that libjpeg-turbo cannot decode or warns about. Whatever exception a decoder raises for damaged
bytes, decode_image raises BadImage in its place.
"""

from __future__ import annotations

import io
import os
import re
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, UnidentifiedImageError

from prep.images.formats import HEAD_BYTES, JPEG_SIGNATURE, pillow_formats, unknown_format, unreadable_reason
from prep.images.formats import BadImage as BadImage
from prep.images.jpeg import check_jpeg, decode_jpeg, encode_jpeg, file_kind, find_warning
from prep.images.library_output import caught_stderr
from prep.images.limits import MAX_PIXELS, MAX_RESCALED_PIXELS
from prep.images.rescale import rescaled_size
from prep.images.rgb import file_facts, rgb_pixels
from prep.store.datum import Datum, DatumError
from prep.store.manifest import DEFAULT_BACKGROUND, Settings

T = TypeVar("T")

_EXIF_ORIENTATION = 0x0112
_MAX_RESCALED_SIDE_PX = 65_000  # libjpeg allows 65,500 px
# Largest number of scans of a JPEG of `max_pixels` pixels; half as many pixels may have twice as many scans.
_MAX_SCANS = 20
# Largest number of segments of a JPEG before its first scan; Pillow needs at least 1 µs for each segment.
_MAX_SEGMENTS = 10_000
_UNDO_ORIENTATION = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_USUAL_CONTAINER = "jpeg"  # format of the files of ILSVRC; an image in another format counts as converted


@dataclass(frozen=True)
class DecodeOptions:
    """Options of decode_image."""

    max_pixels: int = MAX_PIXELS  # an image with more pixels is refused before it is decoded
    background: str = DEFAULT_BACKGROUND  # colour behind transparent pixels, see prep.images.rgb
    # JPEGs with more pixels than this are decoded at 1/2, 1/4 or 1/8 of their height and width; 0: no JPEG is reduced.
    # The shorter side keeps at least `min_side_px` pixels. Large photographs then need less memory, but their pixels
    # change slightly.
    reduce_above: int = 0
    min_side_px: int = 1


DEFAULT_OPTIONS = DecodeOptions()


@dataclass(frozen=True)
class DecodedImage:
    """RGB pixels of a decoded file, with its conversions, EXIF orientation and warnings."""

    pixels: npt.NDArray[np.uint8]  # (H, W, 3)
    # Names of the conversions: a format other than JPEG (such as "png"), a depth over 8 bits (such as "16-bit"),
    # "grey", "cmyk", "palette", "alpha", and "reduced" (see DecodeOptions.reduce_above).
    converted: tuple[str, ...]
    orientation: int  # EXIF orientation, 1..8, which is not applied to `pixels`; 1 if the file has no orientation
    warnings: tuple[str, ...] = ()  # warnings of the decoding library about damage that the library ignored
    # Number of pixels of the image in the file; larger than the number in `pixels` if the image was reduced.
    file_pixels: int = 0


def decode_image(content: bytes, options: DecodeOptions = DEFAULT_OPTIONS) -> DecodedImage:
    """Decode an image file to RGB. Raises BadImage, with the reason, if a file cannot be decoded.

    Only the first image of an animation or of a file with several images is decoded. `options.max_pixels` limits the
    memory for decoding. A limit on the scans of a progressive JPEG limits the decoding time.
    """
    if not content:
        raise BadImage("empty file")
    reason = unreadable_reason(content[:HEAD_BYTES])
    if reason:
        raise BadImage(reason)
    if content.startswith(JPEG_SIGNATURE):
        image = _decode_color_jpeg(content, options)
        if image is not None:
            return image
    decoded, said = _with_pillow(content, options, lambda image: _decode_with_pillow(image, content, options))
    return replace(decoded, warnings=(*said, *decoded.warnings))


def _decode_color_jpeg(content: bytes, options: DecodeOptions) -> DecodedImage | None:
    """Decode an RGB or YCbCr JPEG with libjpeg-turbo. Raises BadImage if the file has too many pixels or scans.

    Returns None for a JPEG in another colour space, or if libjpeg-turbo cannot decode the file or warns about it.
    """
    has_exif = _has_exif(content)
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        check_size(width, height, options)
        _check_scans(width, height, content, options)
        if color_space not in ("YCbCr", "RGB"):
            return None
    except BadImage:
        raise
    except Exception:  # simplejpeg raises KeyError for an unusual sampling of the colour channels
        return None
    factor = _reduction(width, height, options)
    try:
        pixels = decode_jpeg(content, None if factor == 1 else (-(-height // factor), -(-width // factor)))
    except ValueError:
        return None
    orientation = 1
    if has_exif:
        with suppress(BadImage):  # a broken EXIF block is ignored, because the pixels are good
            orientation, _ = _with_pillow(content, options, _exif_orientation)
    converted = ("reduced",) if factor > 1 else ()
    return DecodedImage(pixels, converted, orientation, file_pixels=width * height)


def _reduction(width: int, height: int, options: DecodeOptions) -> int:
    """Return the factor by which the decoder reduces both sides of a JPEG: 1, 2, 4 or 8.

    The factor is the smallest one with which the image has at most options.reduce_above pixels. A smaller factor is
    returned if the shorter side would otherwise have fewer than options.min_side_px pixels.
    """
    factor = 1
    while (
        factor < 8
        and options.reduce_above
        and (width // factor) * (height // factor) > options.reduce_above
        and min(width, height) // (2 * factor) >= options.min_side_px
    ):
        factor *= 2
    return factor


def _has_exif(content: bytes) -> bool:
    """Return whether a JPEG has an EXIF segment before its first scan.

    Raises BadImage if the file has too many segments. A segment begins with a byte FF, any number of further FF bytes
    as padding, a marker byte and the segment's length.
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


_pillow_lock = threading.Lock()  # _with_pillow sets a limit and a warning filter that the whole process shares


def _unlock_in_child() -> None:
    """In a forked child, replace the lock: a thread of the parent that holds it would never release it in the child."""
    global _pillow_lock
    _pillow_lock = threading.Lock()


os.register_at_fork(after_in_child=_unlock_in_child)


def _with_pillow(content: bytes, options: DecodeOptions, use: Callable[[Image.Image], T]) -> tuple[T, list[str]]:
    """Open `content` with Pillow.

    Returns two values: `use(image)`, and the lines that libraries wrote to standard error. Raises BadImage if Pillow
    raises an exception. The reason in the BadImage then contains the lines from standard error.
    """
    formats, said = pillow_formats(content[:HEAD_BYTES]), list[str]()
    with _pillow_lock, warnings.catch_warnings():
        # Pillow warns about odd EXIF data, which is harmless, and about large sizes, which this module checks.
        warnings.simplefilter("ignore")
        # Pillow refuses an image only if it has more than twice MAX_IMAGE_PIXELS; check_size applies the exact limit.
        largest, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, options.max_pixels
        try:
            with caught_stderr() as said, Image.open(io.BytesIO(content), formats=formats) as image:
                result = use(image)
            return result, said
        except BadImage:
            raise
        except UnidentifiedImageError:
            # A file of an unknown format may begin with a short signature, such as BM or P, by chance.
            if not said and len(formats) > 1:
                raise BadImage(unknown_format()) from None
            raise BadImage(f"cannot be decoded: {'; '.join(said) or 'damaged or truncated'}") from None
        except Image.DecompressionBombError as error:
            (pixels,) = re.findall(r"\d+", str(error))[:1] or ("0",)
            raise BadImage(_too_many_pixels(options), limit="max_pixels", pixels=int(pixels)) from None
        except MemoryError:
            raise BadImage("cannot be decoded: not enough memory") from None
        except Exception as error:
            text = f"{'; '.join(said)} ({_text(error)})" if said else _text(error)
            raise BadImage(f"cannot be decoded: {text}") from None
        finally:
            Image.MAX_IMAGE_PIXELS = largest


def _decode_with_pillow(image: Image.Image, content: bytes, options: DecodeOptions) -> DecodedImage:
    """Decode an open image."""
    width, height = image.size
    check_size(width, height, options)
    converted, facts = [], file_facts(image, content)
    is_jpeg = image.format in ("JPEG", "MPO")  # an MPO is a JPEG followed by more JPEGs
    if is_jpeg:
        _check_scans(width, height, content, options)
        factor = _reduction(width, height, options)
        if factor > 1:
            image.draft(None, (width // factor, height // factor))  # a mode of None keeps the mode of the file
            converted.append("reduced")
    else:
        converted.append((image.format or "unknown").lower())
    orientation = _exif_orientation(image)
    image.load()
    warning = ""
    if is_jpeg:
        warning = find_warning(content, {"L": "GRAY", "CMYK": "CMYK"}.get(image.mode, "RGB"))
    elif image.format == "TIFF" and orientation in _UNDO_ORIENTATION:  # Pillow turns a TIFF upright: undo the turn
        image = image.transpose(_UNDO_ORIENTATION[orientation])
    pixels, names = rgb_pixels(image, facts, options.background)
    return DecodedImage(
        pixels, (*converted, *names), orientation, (warning,) if warning else (), file_pixels=width * height
    )


def _too_many_pixels(options: DecodeOptions) -> str:
    return f"more than {options.max_pixels:,} pixels; --max-pixels sets this limit"


def _text(error: Exception) -> str:
    """Return the message of an exception on one line."""
    return " ".join(str(error).split()) or repr(error)


def check_size(width: int, height: int, options: DecodeOptions) -> None:
    """Raise BadImage if an image of this size has more pixels than options.max_pixels."""
    if width * height > options.max_pixels:
        reason = f"{width}×{height}: {_too_many_pixels(options)}"
        raise BadImage(reason, limit="max_pixels", pixels=width * height)


def _check_scans(width: int, height: int, content: bytes, options: DecodeOptions) -> None:
    most = _MAX_SCANS * options.max_pixels
    # The scans of a small file are not counted: a scan has at least ten bytes, so a small file has few scans.
    if width * height * len(content) > 16 * most:
        scans = content.count(b"\xff\xda")
        if width * height * scans > most:
            raise BadImage(f"{width}×{height} px in {scans:,} scans: decoding would take minutes")


def _exif_orientation(image: Image.Image) -> int:
    if "exif" not in image.info and image.format != "TIFF":
        return 1
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block is ignored, because the pixels may be good
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def check_rescaled_size(pixels: npt.NDArray[np.uint8], side_px: int, keep_aspect: bool) -> None:
    """Raise BadImage if `keep_aspect` is set and the rescaled image would be too large.

    The rescaled image may have at most MAX_RESCALED_PIXELS, and a side at most _MAX_RESCALED_SIDE_PX.
    """
    height, width = pixels.shape[:2]
    new_width, new_height = rescaled_size(width, height, side_px)
    is_too_large = new_width * new_height > MAX_RESCALED_PIXELS or max(new_width, new_height) > _MAX_RESCALED_SIDE_PX
    if keep_aspect and is_too_large:
        limits = f"at most {MAX_RESCALED_PIXELS:,} pixels and {_MAX_RESCALED_SIDE_PX:,} px on a side"
        raise BadImage(f"{width}×{height} would become {new_width}×{new_height} px, expected {limits}")


def encode_image(pixels: npt.NDArray[np.uint8], format: str, quality: int) -> bytes:
    """Encode an image, uint8 (H, W, 3), for a record: as a baseline 4:2:0 JPEG, or as a PPM if `format` is "ppm".

    The header of a PPM is as long as one row of pixels (see ppm_header). `quality` is used for JPEG only.
    """
    if format == "ppm":
        return ppm_header(*pixels.shape[:2]) + pixels.tobytes()
    return encode_jpeg(pixels, quality)


def ppm_header(height: int, width: int) -> bytes:
    """Return a P6 header of 3·width bytes. A comment pads the header to the size of one row of pixels.

    Any image library can open a PPM with this header. Code that knows the size of the header can view the bytes of the
    file as uint8 (height + 1, width, 3) and skip the first row, without copying pixels. Raises ValueError if `width` is
    so small that the header would be longer than a row.
    """
    head, tail = b"P6\n#", f"\n{width} {height}\n255\n".encode()
    padding = 3 * width - len(head) - len(tail)
    if padding < 0:
        raise ValueError(f"width {width} px: a row of pixels is shorter than a PPM header")
    return head + b" " * padding + tail


def checked_datum(value: bytes, settings: Settings, classes: int) -> Datum:
    """Return the fields of a record. `classes` is the number of classes of the store.

    The size, the label and the header of the image are checked. The pixels are not decoded. Raises DatumError if a
    field is wrong, or if the header of the image contradicts the settings of the store or the size in the record.
    """
    datum = Datum.decode(value)
    if fault := settings.size_fault(datum.height, datum.width):
        raise DatumError(fault)
    if datum.channels != 3:
        raise DatumError(f"{datum.channels:,} channels, expected 3")
    if datum.label >= classes:
        raise DatumError(f"label {datum.label:,}, expected 0 to {classes - 1:,}")
    fault = _fault(datum, settings.format)
    if fault:
        raise DatumError(fault)
    return datum


def _fault(datum: Datum, format: str) -> str:
    """Return why the image of a record is not a file that encode_image writes; empty if it is such a file."""
    if format == "jpeg":
        return check_jpeg(datum.data, datum.height, datum.width)
    if not datum.data.startswith(ppm_header(datum.height, datum.width)):
        return f"{file_kind(datum.data)}, expected a PPM file whose header fills one row"
    size_bytes = 3 * datum.width * (datum.height + 1)
    return "" if len(datum.data) == size_bytes else f"{len(datum.data):,} bytes of PPM, expected {size_bytes:,}"

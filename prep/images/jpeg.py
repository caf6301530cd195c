"""JPEG decoding and encoding with libjpeg-turbo (simplejpeg). No other module sets options of the decoder or encoder.

Decoding uses the accurate ("slow") integer DCT, and smooth ("fancy") upsampling of the colour channels. Pillow uses the
same DCT and upsampling, and so does DALI on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import simplejpeg

Pixels = npt.NDArray[np.uint8]  # (H, W, 3) RGB


def decode_jpeg(content: bytes, reduced_to: tuple[int, int] | None = None) -> Pixels:
    """Decode a JPEG to RGB pixels, uint8 (H, W, 3). Decoding runs without Python's global interpreter lock (GIL).

    If `reduced_to` is given, the decoded image has this (height, width): those of the file, divided by 2, 4 or 8 and
    rounded up. libjpeg makes the smaller image directly from the coefficients, so the whole image is never in memory.

    Raises ValueError for a file that libjpeg cannot decode or warns about. EXIF orientation is not applied.
    """
    min_height, min_width = reduced_to or (0, 0)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            content, "RGB", fastdct=False, fastupsample=False, min_height=min_height, min_width=min_width, strict=True
        )
    except ValueError:
        raise
    except Exception as error:  # simplejpeg raises KeyError for an unusual header
        raise ValueError(f"cannot be decoded: {error!r}") from None
    return pixels


def find_warning(content: bytes, color_space: str) -> str:
    """Return libjpeg-turbo's first warning about a JPEG that Pillow can decode; empty if there is no warning.

    For a file with an unusual sampling of the colour channels, the returned text says that the file cannot be checked.
    `color_space` is simplejpeg's name of a colour space to which libjpeg can convert the image: "GRAY", "RGB" or
    "CMYK".
    """
    fast = {"fastdct": True, "fastupsample": True}
    try:
        simplejpeg.decode_jpeg(content, color_space, strict=True, **fast)
    except Exception as warning:
        try:
            simplejpeg.decode_jpeg(content, color_space, strict=False, **fast)
        except Exception as error:
            return f"cannot be checked for damage: {error}"
        return str(warning)
    return ""


def encode_jpeg(pixels: Pixels, quality: int) -> bytes:
    """Encode RGB pixels, uint8 (H, W, 3), as a baseline 4:2:0 JPEG of libjpeg quality `quality`, 1 to 100."""
    return bytes(simplejpeg.encode_jpeg(pixels, quality, "RGB", "420", fastdct=False))


MAX_SCANS = 100  # largest number of scans of a record's JPEG; libjpeg's progressive files have ten scans
_SCAN = 0xDA  # marker of the header of a scan
_MAX_SEGMENTS = 10_000  # largest number of segments before the first scan
_SIGNATURES = {
    b"\x89PNG": "a PNG file",
    b"GIF8": "a GIF file",
    b"BM": "a BMP file",
    b"RIFF": "a WebP file",
    b"II*\0": "a TIFF file",
    b"MM\0*": "a TIFF file",
    b"P6": "a PPM file",
    b"\xff\xd8": "a JPEG file",
}


def file_kind(content: bytes | memoryview) -> str:
    """Return the format of an image file, such as `a PNG file`, or its first bytes if the format is not known."""
    head = bytes(content[:8])
    kinds = (kind for signature, kind in _SIGNATURES.items() if head.startswith(signature))
    return next(kinds, f"a file that begins with the bytes {head.hex(' ')}" if head else "an empty file")


def check_jpeg(content: bytes | memoryview, height: int, width: int) -> str:
    """Return why `content` is not a JPEG file of `height` × `width` pixels; empty if `content` is such a file.

    Only the header is read: `content` must begin as a baseline or progressive JPEG file of `height` × `width` pixels
    with three channels of 8 bits. A file of several scans may have at most MAX_SCANS scans, because each scan takes as
    long as decoding the whole image. is_jpeg_of in prep/store/kernels.c has the same rule.
    """
    if bytes(content[:2]) != b"\xff\xd8":
        return f"{file_kind(content)}, expected a JPEG file"
    frame = 0  # the marker of the frame header; 0 until the loop has found it
    for offset, marker, segment in _segments(content):
        if marker == _SCAN:
            if not frame or not segment:
                break
            # In a file that is not progressive, a first scan with all three channels is the only scan.
            is_single = frame != 0xC2 and segment[0] == 3
            scans = 1 if is_single else bytes(content[offset:]).count(bytes([0xFF, _SCAN]))
            return f"a JPEG file of {scans:,} scans, expected at most {MAX_SCANS}" if scans > MAX_SCANS else ""
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame or len(segment) < 6 or marker > 0xC2:
                return f"a JPEG file with the frame header {marker:#x}, expected one header of 0xc0, 0xc1 or 0xc2"
            size = int.from_bytes(segment[1:3]), int.from_bytes(segment[3:5])
            if size != (height, width):
                return f"a JPEG file of {size[1]}×{size[0]} px, the record gives {width}×{height} px"
            if (segment[0], segment[5]) != (8, 3):
                return f"a JPEG file with {segment[5]} channels of {segment[0]} bits, expected 3 channels of 8 bits"
            frame = marker
    return "a JPEG file that is damaged or cut off before its first scan"


def quantization_tables(content: bytes) -> list[bytes]:
    """Return the contents of the segments of a JPEG file that hold quantization tables, in their order.

    The tables depend only on the quality with which encode_jpeg made the file.
    """
    return [segment for _, marker, segment in _segments(content) if marker == 0xDB]


def _segments(content: bytes | memoryview) -> Iterator[tuple[int, int, bytes]]:
    """Yield (offset, marker, content) of the segments of a JPEG file, up to the header of its first scan.

    The iteration ends earlier if a segment is damaged or cut off. Segments with quantization tables are yielded with
    their whole content. Of other segments, at most the first 64 bytes are yielded.
    """
    offset = 2
    for _ in range(_MAX_SEGMENTS):
        head = bytes(content[offset : offset + 4])
        length = int.from_bytes(head[2:])
        if len(head) < 4 or head[0] != 0xFF or length < 2 or offset + 2 + length > len(content):
            return
        end = offset + 2 + length if head[1] == 0xDB else min(offset + 2 + length, offset + 68)
        yield offset, head[1], bytes(content[offset + 4 : end])
        if head[1] == _SCAN:
            return
        offset += 2 + length

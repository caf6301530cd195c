"""Image files that no camera writes, each with the expected result of a build.

Most of the files are damaged, state a false size, or are not images. Files that no library would write are made byte by
byte. All files are made with the same random generator. Always make all files in the same order, so that each file
always has the same content.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, PngImagePlugin

RNG = np.random.default_rng(2012)


@dataclass(frozen=True)
class Expected:
    """The expected result for a file: the file is bad, or is kept with these conversions and this EXIF orientation."""

    bad: str = ""  # regular expression that matches the reason why the file is bad; empty: the file is kept
    converted: tuple[str, ...] = ()
    orientation: int = 1
    is_warned: bool = False  # whether the decoder warns about the file; such a file is kept
    bad_if_whole: str = ""  # regular expression that matches the reason why the file is bad only with --keep-aspect


def decoder_warns(content: bytes) -> bool:
    """Return whether libjpeg-turbo warns about a JPEG. Versions before 3.1 do not warn about a bad ICC marker."""
    try:
        simplejpeg.decode_jpeg(content, strict=True)
    except ValueError:
        return True
    return False


KEPT = Expected()
WARNED = Expected(is_warned=True)
UNKNOWN = Expected(bad=r"^not an image in a known format \(accepted: JPEG, PNG, .*\)$")
BROKEN = Expected(bad="^cannot be decoded: .")
BOMB = Expected(bad="more than 200,000,000 pixels")


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


def file_of(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


PHOTO = noise(48, 64)
JPEG = file_of(PHOTO, "JPEG", quality=90)


# JPEG -----------------------------------------------------------------------------------------------------------------


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    return jpeg[:2] + segment(marker, content) + jpeg[2:]


def claiming(jpeg: bytes, height: int, width: int) -> bytes:
    """Return the file `jpeg` with the size `height` × `width` in its frame header."""
    at = next(m.start() for m in re.finditer(rb"\xff[\xc0\xc2]\x00\x11\x08", jpeg))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def many_scans(width: int, height: int, scans: int, sampling: Sequence[int] = (0x22, 0x11, 0x11)) -> bytes:
    """Return a progressive JPEG of one colour: a DC scan, then AC scans whose blocks have no coefficients.

    A scan has only a few bytes, but a decoder must process all blocks of the image for each scan.
    """
    parts = len(sampling)
    across, down = max(s >> 4 for s in sampling), max(s & 15 for s in sampling)
    frame = struct.pack(">BHHB", 8, height, width, parts) + b"".join(
        bytes([k + 1, s, 0]) for k, s in enumerate(sampling)
    )
    units = -(-width // (8 * across)) * -(-height // (8 * down)) * sum((s >> 4) * (s & 15) for s in sampling)
    zeros = bytes(units // 8) + (bytes([(1 << (8 - units % 8)) - 1]) if units % 8 else b"")
    blocks = -(-width * (sampling[0] >> 4) // (8 * across)) * -(-height * (sampling[0] & 15) // (8 * down))
    bits = ""
    while blocks > 0:  # a code of 15 bits (a 0, then n in 14 bits) ends a run of 2^14 + n blocks
        bits += "0" + format(min(max(blocks - 16384, 0), 16383), "014b")
        blocks -= 32767
    bits += "1" * (-len(bits) % 8)
    ends = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    one_code = bytes([1] + [0] * 15)
    return (
        b"\xff\xd8"
        + segment(0xDB, bytes([0, *[1] * 64]))
        + segment(0xC2, frame)
        + segment(0xC4, b"\x00" + one_code + b"\x00")
        + segment(0xC4, b"\x10" + one_code + b"\xe0")
        + segment(0xDA, bytes([parts]) + b"".join(bytes([k + 1, 0]) for k in range(parts)) + b"\0\0\0")
        + zeros
        + (segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + ends) * scans
        + b"\xff\xd9"
    )


def exif(entries: bytes, count: int, order: str = "<", first: int = 8) -> bytes:
    head = b"II*\0" if order == "<" else b"MM\0*"
    return b"Exif\0\0" + head + struct.pack(order + "I", first) + struct.pack(order + "H", count) + entries


def entry(tag: int, kind: int, count: int, value: int, order: str = "<") -> bytes:
    return struct.pack(order + "HHII", tag, kind, count, value)


def exifs() -> Iterator[tuple[str, bytes, int]]:
    """Yield (name, EXIF block, orientation that must be read from the block)."""
    turn = entry(0x0112, 3, 1, 6)
    yield "whole", exif(turn, 1), 6
    yield "whole and big-endian", exif(struct.pack(">HHIHH", 0x0112, 3, 1, 8, 0), 1, ">"), 8
    yield "cut", exif(turn, 1)[:-5], 1
    yield "no entries", exif(b"", 0), 1
    yield "claims 65535 entries", exif(turn, 65535), 6
    yield "cyclic", exif(turn, 1) + struct.pack("<I", 8), 6
    yield "cyclic below", exif(entry(0x8769, 4, 1, 8) + turn, 2), 6
    yield "far offset", exif(b"", 0, first=0xFFFFFFF0), 1
    yield "offset into its own header", exif(turn, 1, first=0), 1
    yield "of zeros", b"Exif\0\0" + bytes(60), 1
    yield "of noise", b"Exif\0\0II*\0\x08\0\0\0" + RNG.bytes(400), 1
    yield "of 64 KB", exif(turn, 1) + bytes(65_000), 6
    for value in (0, 9, 65535):
        yield f"turned by {value}", exif(entry(0x0112, 3, 1, value), 1), 1
    for kind in (0, 14, 65535):
        yield f"of kind {kind}", exif(entry(0x0112, kind, 1, 6), 1), 1
    for kind in range(1, 13):
        yield f"kind {kind} far away", exif(entry(0x0112, kind, 5, 0xFFFFFF00) + entry(0x9286, kind, 2**31, 8), 2), 1
        yield f"kind {kind} of 2^32 values", exif(entry(0x0100, kind, 2**32 - 1, 26), 1), 1


def jpegs() -> Iterator[tuple[str, bytes, Expected]]:
    for share in (10, 50, 90):
        yield f"cut at {share}%", JPEG[: len(JPEG) * share // 100], BROKEN
    progressive = file_of(PHOTO, "JPEG", progressive=True)
    yield "cut progressive", progressive[: len(progressive) // 2], BROKEN
    yield "head alone", JPEG[:4], Expected(bad="^(not an image|cannot be decoded)")
    yield "noise behind the head", JPEG[:20] + RNG.bytes(3000), Expected(bad="^(not an image|cannot be decoded)")
    yield "trailing garbage", JPEG + RNG.bytes(5000), KEPT
    yield "trailing zip", JPEG + b"PK\x03\x04" + bytes(500), KEPT
    yield "two in one", JPEG + JPEG, KEPT
    yield "progressive", progressive, KEPT
    yield "4:4:4", file_of(PHOTO, "JPEG", subsampling="4:4:4"), KEPT
    yield "grey", file_of(PHOTO.convert("L"), "JPEG"), Expected(converted=("grey",))
    yield "cmyk", file_of(PHOTO.convert("CMYK"), "JPEG"), Expected(converted=("cmyk",))
    yield "mpo", file_of(PHOTO, "MPO", save_all=True, append_images=[noise(20, 20)]), KEPT
    yield "icc of noise", file_of(PHOTO, "JPEG", icc_profile=RNG.bytes(300)), KEPT
    yield "icc of 3 MB", file_of(PHOTO, "JPEG", icc_profile=RNG.bytes(3_000_000)), KEPT
    first_of_255 = with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\x01\xff" + bytes(100))
    yield "icc that says 255 parts", first_of_255, Expected(is_warned=decoder_warns(first_of_255))
    yield "adobe marker of noise", with_segment(JPEG, 0xEE, b"Adobe" + RNG.bytes(3)), KEPT
    yield "photoshop marker of noise", with_segment(JPEG, 0xED, b"Photoshop 3.0\0" + RNG.bytes(300)), KEPT
    yield "a thousand comments", JPEG[:2] + segment(0xFE, bytes(60_000)) * 1000 + JPEG[2:], KEPT
    for name, block, orientation in exifs():
        yield f"exif {name}", with_segment(JPEG, 0xE1, block), Expected(orientation=orientation)
    yield "claims 65500x65500", claiming(JPEG, 65_500, 65_500), BOMB
    yield "claims 9000x9000", claiming(JPEG, 9000, 9000), WARNED  # the scan is too short, but libjpeg only warns
    yield "claims no height", claiming(JPEG, 0, 64), UNKNOWN
    scans = Expected(bad="scans")
    yield "10 scans", many_scans(640, 480, 10), KEPT
    yield "2000 scans of a large picture", many_scans(9000, 8000, 2000), scans
    yield "2000 scans, grey", many_scans(9000, 8000, 2000, (0x11,)), scans
    yield "2000 scans, four colours", many_scans(9000, 8000, 2000, (0x11,) * 4), scans
    yield "2000 scans, odd sampling", many_scans(9000, 8000, 2000, (0x31, 0x11, 0x11)), scans
    yield (
        "65500 wide",
        file_of(Image.new("RGB", (65_500, 3), (9, 99, 200)), "JPEG"),
        Expected(bad_if_whole="would become"),
    )
    yield "1x1", file_of(noise(1, 1), "JPEG"), KEPT
    yield "1x5000", file_of(noise(5000, 1), "JPEG"), Expected(bad_if_whole="1×5000 would become 32×160000")
    yield "5000x1", file_of(noise(1, 5000), "JPEG"), Expected(bad_if_whole="5000×1 would become 160000×32")


# Other formats --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"", kind: int = 0, depth: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def pngs() -> Iterator[tuple[str, bytes, Expected]]:
    whole = file_of(PHOTO, "PNG")
    yield "png", whole, Expected(converted=("png",))
    for share in (10, 50, 90):
        yield f"cut at {share}%.png", whole[: len(whole) * share // 100], BROKEN
    yield "bent.png", whole[:200] + RNG.bytes(50) + whole[250:], BROKEN
    yield "palette.png", file_of(PHOTO.quantize(9), "PNG"), Expected(converted=("png", "palette"))
    palette_alpha = file_of(PHOTO.quantize(9), "PNG", transparency=b"\x00\x80")
    yield "palette and alpha.png", palette_alpha, Expected(converted=("png", "palette", "alpha"))
    yield "alpha.png", file_of(PHOTO.convert("RGBA"), "PNG"), Expected(converted=("png", "alpha"))
    yield "grey and alpha.png", file_of(PHOTO.convert("LA"), "PNG"), Expected(converted=("png", "grey", "alpha"))
    yield "1-bit.png", file_of(PHOTO.convert("1"), "PNG"), Expected(converted=("png", "grey"))
    deep = Image.fromarray(RNG.integers(0, 65536, (40, 50), dtype=np.uint16))
    yield "16-bit.png", file_of(deep, "PNG"), Expected(converted=("png", "16-bit", "grey"))
    yield "16-bit colour.png", png(40, 40, (b"\0" + RNG.bytes(240)) * 40, 2, 16), Expected(converted=("png", "16-bit"))
    frames = file_of(PHOTO, "PNG", save_all=True, append_images=[noise(48, 64)])
    yield "animated.png", frames, Expected(converted=("png",))
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "0" * 50_000_000, zip=True)
    yield "text of 50 MB.png", file_of(PHOTO, "PNG", pnginfo=text), BROKEN
    yield "icc of noise.png", file_of(PHOTO, "PNG", icc_profile=RNG.bytes(5000)), Expected(converted=("png",))
    yield "20000x20000.png", png(20_000, 20_000, bytes(20_001 * 2000)), BOMB
    yield "2^31 wide.png", png(2**31 - 1, 2**31 - 1), BOMB
    yield "no height.png", png(50, 0), UNKNOWN
    grey = Expected(converted=("png", "grey"))
    yield "99 million pixels.png", png(11_000, 9000, bytes(1376 * 9000), depth=1), grey  # the PNG file has 16 KB
    yield "210 million pixels.png", png(20_000, 10_500, bytes(2501 * 9000), depth=1), BOMB
    yield "9999x9999 without rows.png", png(9999, 9999), BROKEN


def gif(width: int, height: int, inner_width: int, inner_height: int) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return (
        b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, inner_width, inner_height, 0) + b"\x02\x02\x4c\x01\0;"
    )


def tiff(*tags: tuple[int, int, int], pixels: bytes = b"") -> bytes:
    """Return a TIFF with the entries `tags`: (tag, type 3 or 4, value). The pixels begin at byte 8."""
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + body + bytes(4)


def claimed_tiff(width: int, height: int, pixels: bytes = bytes(300)) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    return tiff(*tags, (278, 4, height), (279, 4, len(pixels)), pixels=pixels)


def bmp(width: int, height: int) -> bytes:
    content = file_of(Image.new("L", (1, 1)), "BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


def others() -> Iterator[tuple[str, bytes, Expected]]:
    yield "gif", file_of(PHOTO, "GIF"), Expected(converted=("gif", "palette"))
    frames = file_of(PHOTO, "GIF", save_all=True, append_images=[noise(48, 64)] * 3)
    yield "animated.gif", frames, Expected(converted=("gif", "palette"))
    yield "cut.gif", file_of(PHOTO, "GIF")[:1500], BROKEN
    yield "claims 65535x65535.gif", gif(65_535, 65_535, 65_535, 65_535), BOMB
    yield "frame larger than its screen.gif", gif(9, 9, 65_535, 65_535), BOMB
    yield "webp", file_of(PHOTO, "WEBP"), Expected(converted=("webp",))
    frames = file_of(PHOTO, "WEBP", save_all=True, append_images=[noise(48, 64)])
    yield "animated.webp", frames, Expected(converted=("webp",))
    yield "cut.webp", file_of(PHOTO, "WEBP", lossless=True)[:900], BROKEN
    yield "claims 16384x16384.webp", frames[:24] + b"\xff\x3f\0" * 2 + frames[30:], BOMB
    yield "wave named .JPEG", b"RIFF" + struct.pack("<I", 500) + b"WAVEfmt " + bytes(492), UNKNOWN
    yield "bmp", file_of(PHOTO, "BMP"), Expected(converted=("bmp",))
    yield "cut.bmp", file_of(PHOTO, "BMP")[:900], BROKEN
    yield "claims 60000x60000.bmp", bmp(60_000, 60_000), BOMB
    yield "claims 9000 rows upside down.bmp", bmp(9000, -9000), BROKEN
    yield "tiff", file_of(PHOTO, "TIFF"), Expected(converted=("tiff",))
    yield "cut.tiff", file_of(PHOTO, "TIFF")[:900], Expected(bad="not an image|cannot be decoded")
    pages = file_of(PHOTO, "TIFF", save_all=True, append_images=[noise(20, 20)])
    yield "two pages.tiff", pages, Expected(converted=("tiff",))
    deep = Image.fromarray(RNG.integers(0, 65536, (40, 50), dtype=np.uint16))
    yield "16-bit.tiff", file_of(deep, "TIFF"), Expected(converted=("tiff", "16-bit", "grey"))
    floats = Image.fromarray(RNG.random((40, 50)).astype(np.float32))
    yield "float.tiff", file_of(floats, "TIFF"), Expected(bad="^pixel type F")
    yield "32-bit.tiff", file_of(Image.new("I", (40, 50)), "TIFF"), Expected(bad="^pixel type I")
    yield "cmyk.tiff", file_of(PHOTO.convert("CMYK"), "TIFF"), Expected(converted=("tiff", "cmyk"))
    yield "ycbcr.tiff", file_of(PHOTO.convert("YCbCr"), "TIFF"), Expected(converted=("tiff",))
    yield "in jpeg.tiff", file_of(PHOTO, "TIFF", compression="jpeg"), Expected(converted=("tiff",))
    yield "claims 60000x60000.tiff", claimed_tiff(60_000, 60_000), BOMB
    yield "claims 9000x9000.tiff", claimed_tiff(9000, 9000), BROKEN
    yield "small by hand.tiff", claimed_tiff(20, 15), Expected(converted=("tiff", "grey"))
    yield "cyclic.tiff", b"II*\0\x08\0\0\0\0\0\x08\0\0\0", UNKNOWN
    yield "ppm", file_of(PHOTO, "PPM"), Expected(converted=("ppm",))
    yield "cut.ppm", file_of(PHOTO, "PPM")[:900], BROKEN
    yield "claims 60000x60000.ppm", b"P6\n60000 60000\n255\n", BOMB
    yield "claims eleven digits.ppm", b"P6\n99999999999 99999999999\n255\n", BROKEN
    yield "float.pfm", b"Pf\n4 4\n-1.0\n" + bytes(64), Expected(bad="^pixel type F")


def not_images() -> Iterator[tuple[str, bytes, Expected]]:
    yield "empty.JPEG", b"", Expected(bad="^empty file$")
    yield "zeros.JPEG", bytes(5000), UNKNOWN
    for number in range(3):
        yield f"noise {number}.JPEG", b"\x01" + RNG.bytes(5000), UNKNOWN
    yield "text.JPEG", b"This was not found.\n", UNKNOWN
    yield "page.JPEG", b"<!DOCTYPE html><html><title>404</title></html>", UNKNOWN
    yield (
        "drawing.JPEG",
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        UNKNOWN,
    )
    script = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n0 0 moveto 90 90 lineto stroke showpage\n"
    )
    yield "postscript.JPEG", script, UNKNOWN
    yield "encapsulated.eps", script, UNKNOWN
    preview = b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIIIH", 30, len(script), 0, 0, 0, 0, 0xFFFF)
    yield "encapsulated for dos.JPEG", preview + script, UNKNOWN
    yield "document.JPEG", b"%PDF-1.4\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n", UNKNOWN
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("a.JPEG", JPEG)
    yield "zip.JPEG", out.getvalue(), UNKNOWN
    yield "program.JPEG", b"\x7fELF" + bytes(500), UNKNOWN
    yield "sun raster.JPEG", file_of(Image.new("RGB", (9, 9)), "TGA"), UNKNOWN
    yield "icon.JPEG", file_of(Image.new("RGB", (16, 16)), "ICO"), UNKNOWN
    yield "jpeg 2000.JPEG", file_of(PHOTO, "JPEG2000"), UNKNOWN
    yield "windows metafile.JPEG", b"\xd7\xcd\xc6\x9a" + bytes(100), UNKNOWN


@cache
def corpus() -> dict[str, tuple[bytes, Expected]]:
    """Return {name: (content, expected result)} of all files."""
    files: dict[str, tuple[bytes, Expected]] = {}
    for name, content, expected in (*jpegs(), *pngs(), *others(), *not_images()):
        assert name not in files
        files[name] = content, expected
    return files

"""Files that no camera wrote, through the command as a process of its own: each ends kept, converted or bad, as told.

The corpus is made here, byte by byte where no library would write it. What must come of each file stands beside it. The
command must end by itself with exit code 0, within bounds of time and memory, with counts that add up to the files, and
without starting any other program.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import resource
import socket
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from prep.store.manifest import Store

MOST_S = 60.0  # the corpus takes a few seconds; one bomb that goes off takes minutes
MOST_BYTES = 2_000_000_000  # of any one process: a picture of 100 million pixels takes about one

RNG = np.random.default_rng(2012)


@dataclass(frozen=True)
class Fate:
    """What must come of a file: `bad` with a reason, or kept with what it was `converted` from, and its turn."""

    bad: str = ""  # a regular expression
    converted: tuple[str, ...] = ()
    turned: int = 1
    whole: str = ""  # the reason where --keep-aspect makes it bad


KEPT = Fate()
UNKNOWN = Fate(bad="^not an image in a known format$")
BROKEN = Fate(bad="^cannot be decoded: .")
BOMB = Fate(bad="more than 100,000,000 pixels")


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
    """The same JPEG with another size in its frame header."""
    at = next(m.start() for m in re.finditer(rb"\xff[\xc0\xc2]\x00\x11\x08", jpeg))
    return jpeg[: at + 5] + struct.pack(">HH", height, width) + jpeg[at + 9 :]


def many_scans(width: int, height: int, scans: int, sampling: Sequence[int] = (0x22, 0x11, 0x11)) -> bytes:
    """A flat progressive JPEG: its DC scan, then scans of AC coefficients of which every block is at its end.

    A few bytes each, they cost a decoder a pass over all blocks of the picture.
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
    while blocks > 0:  # each code is the bit 0, then 14 bits of how many blocks beyond 2^14 are at their end
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
    """Name, EXIF block, and the orientation that it must be read as."""
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


def jpegs() -> Iterator[tuple[str, bytes, Fate]]:
    for share in (10, 50, 90):
        yield f"cut at {share}%", JPEG[: len(JPEG) * share // 100], BROKEN
    progressive = file_of(PHOTO, "JPEG", progressive=True)
    yield "cut progressive", progressive[: len(progressive) // 2], BROKEN
    yield "head alone", JPEG[:4], Fate(bad="^(not an image|cannot be decoded)")
    yield "noise behind the head", JPEG[:20] + RNG.bytes(3000), Fate(bad="^(not an image|cannot be decoded)")
    yield "trailing garbage", JPEG + RNG.bytes(5000), KEPT
    yield "trailing zip", JPEG + b"PK\x03\x04" + bytes(500), KEPT
    yield "two in one", JPEG + JPEG, KEPT
    yield "progressive", progressive, KEPT
    yield "4:4:4", file_of(PHOTO, "JPEG", subsampling="4:4:4"), KEPT
    yield "grey", file_of(PHOTO.convert("L"), "JPEG"), Fate(converted=("grey",))
    yield "cmyk", file_of(PHOTO.convert("CMYK"), "JPEG"), Fate(converted=("cmyk",))
    yield "mpo", file_of(PHOTO, "MPO", save_all=True, append_images=[noise(20, 20)]), KEPT
    yield "icc of noise", file_of(PHOTO, "JPEG", icc_profile=RNG.bytes(300)), KEPT
    yield "icc of 3 MB", file_of(PHOTO, "JPEG", icc_profile=RNG.bytes(3_000_000)), KEPT
    yield "icc that says 255 parts", with_segment(JPEG, 0xE2, b"ICC_PROFILE\0\x01\xff" + bytes(100)), KEPT
    yield "adobe marker of noise", with_segment(JPEG, 0xEE, b"Adobe" + RNG.bytes(3)), KEPT
    yield "photoshop marker of noise", with_segment(JPEG, 0xED, b"Photoshop 3.0\0" + RNG.bytes(300)), KEPT
    yield "a thousand comments", JPEG[:2] + segment(0xFE, bytes(60_000)) * 1000 + JPEG[2:], KEPT
    for name, block, turned in exifs():
        yield f"exif {name}", with_segment(JPEG, 0xE1, block), Fate(turned=turned)
    yield "claims 65500x65500", claiming(JPEG, 65_500, 65_500), BOMB
    yield "claims 9000x9000", claiming(JPEG, 9000, 9000), KEPT  # it says that it ends there: libjpeg warns, no more
    yield "claims no height", claiming(JPEG, 0, 64), UNKNOWN
    scans = Fate(bad="scans")
    yield "10 scans", many_scans(640, 480, 10), KEPT
    yield "2000 scans of a large picture", many_scans(9000, 8000, 2000), scans
    yield "2000 scans, grey", many_scans(9000, 8000, 2000, (0x11,)), scans
    yield "2000 scans, four colours", many_scans(9000, 8000, 2000, (0x11,) * 4), scans
    yield "2000 scans, odd sampling", many_scans(9000, 8000, 2000, (0x31, 0x11, 0x11)), scans
    yield "65500 wide", file_of(Image.new("RGB", (65_500, 3), (9, 99, 200)), "JPEG"), Fate(whole="would become")
    yield "1x1", file_of(noise(1, 1), "JPEG"), KEPT
    yield "1x5000", file_of(noise(5000, 1), "JPEG"), Fate(whole="1×5000 would become 32×160000")
    yield "5000x1", file_of(noise(1, 5000), "JPEG"), Fate(whole="5000×1 would become 160000×32")


# Other formats --------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, rows: bytes = b"", kind: int = 0, depth: int = 8) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")


def pngs() -> Iterator[tuple[str, bytes, Fate]]:
    whole = file_of(PHOTO, "PNG")
    yield "png", whole, Fate(converted=("png",))
    for share in (10, 50, 90):
        yield f"cut at {share}%.png", whole[: len(whole) * share // 100], BROKEN
    yield "bent.png", whole[:200] + RNG.bytes(50) + whole[250:], BROKEN
    yield "palette.png", file_of(PHOTO.quantize(9), "PNG"), Fate(converted=("png", "palette"))
    palette_alpha = file_of(PHOTO.quantize(9), "PNG", transparency=b"\x00\x80")
    yield "palette and alpha.png", palette_alpha, Fate(converted=("png", "palette"))
    yield "alpha.png", file_of(PHOTO.convert("RGBA"), "PNG"), Fate(converted=("png", "alpha"))
    yield "grey and alpha.png", file_of(PHOTO.convert("LA"), "PNG"), Fate(converted=("png", "grey"))
    yield "1-bit.png", file_of(PHOTO.convert("1"), "PNG"), Fate(converted=("png", "grey"))
    deep = Image.fromarray(RNG.integers(0, 65536, (40, 50), dtype=np.uint16))
    yield "16-bit.png", file_of(deep, "PNG"), Fate(converted=("png", "16-bit", "grey"))
    yield "16-bit colour.png", png(40, 40, (b"\0" + RNG.bytes(240)) * 40, 2, 16), Fate(converted=("png",))
    frames = file_of(PHOTO, "PNG", save_all=True, append_images=[noise(48, 64)])
    yield "animated.png", frames, Fate(converted=("png",))
    text = PngImagePlugin.PngInfo()
    text.add_text("bomb", "0" * 50_000_000, zip=True)
    yield "text of 50 MB.png", file_of(PHOTO, "PNG", pnginfo=text), BROKEN
    yield "icc of noise.png", file_of(PHOTO, "PNG", icc_profile=RNG.bytes(5000)), Fate(converted=("png",))
    yield "20000x20000.png", png(20_000, 20_000, bytes(20_001 * 2000)), BOMB
    yield "2^31 wide.png", png(2**31 - 1, 2**31 - 1), BOMB
    yield "no height.png", png(50, 0), UNKNOWN
    grey = Fate(converted=("png", "grey"))
    yield "99 million pixels.png", png(11_000, 9000, bytes(1376 * 9000), depth=1), grey  # of 16 KB
    yield "108 million pixels.png", png(12_000, 9000, bytes(1501 * 9000), depth=1), BOMB
    yield "9999x9999 without rows.png", png(9999, 9999), BROKEN


def gif(width: int, height: int, inner_width: int, inner_height: int) -> bytes:
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    return (
        b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, inner_width, inner_height, 0) + b"\x02\x02\x4c\x01\0;"
    )


def tiff(*tags: tuple[int, int, int], pixels: bytes = b"") -> bytes:
    """(tag, kind 3 or 4, value), one value each; the strip begins at byte 8."""
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + body + bytes(4)


def claimed_tiff(width: int, height: int, pixels: bytes = bytes(300)) -> bytes:
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1)]
    return tiff(*tags, (278, 4, height), (279, 4, len(pixels)), pixels=pixels)


def bmp(width: int, height: int) -> bytes:
    content = file_of(Image.new("L", (1, 1)), "BMP")
    return content[:18] + struct.pack("<ii", width, height) + content[26:]


def others() -> Iterator[tuple[str, bytes, Fate]]:
    yield "gif", file_of(PHOTO, "GIF"), Fate(converted=("gif", "palette"))
    frames = file_of(PHOTO, "GIF", save_all=True, append_images=[noise(48, 64)] * 3)
    yield "animated.gif", frames, Fate(converted=("gif", "palette"))
    yield "cut.gif", file_of(PHOTO, "GIF")[:1500], BROKEN
    yield "claims 65535x65535.gif", gif(65_535, 65_535, 65_535, 65_535), BOMB
    yield "frame larger than its screen.gif", gif(9, 9, 65_535, 65_535), BOMB
    yield "webp", file_of(PHOTO, "WEBP"), Fate(converted=("webp",))
    frames = file_of(PHOTO, "WEBP", save_all=True, append_images=[noise(48, 64)])
    yield "animated.webp", frames, Fate(converted=("webp",))
    yield "cut.webp", file_of(PHOTO, "WEBP", lossless=True)[:900], BROKEN
    yield "claims 16384x16384.webp", frames[:24] + b"\xff\x3f\0" * 2 + frames[30:], BOMB
    yield "wave named .JPEG", b"RIFF" + struct.pack("<I", 500) + b"WAVEfmt " + bytes(492), UNKNOWN
    yield "bmp", file_of(PHOTO, "BMP"), Fate(converted=("bmp",))
    yield "cut.bmp", file_of(PHOTO, "BMP")[:900], BROKEN
    yield "claims 60000x60000.bmp", bmp(60_000, 60_000), BOMB
    yield "claims 9000 rows upside down.bmp", bmp(9000, -9000), BROKEN
    yield "tiff", file_of(PHOTO, "TIFF"), Fate(converted=("tiff",))
    yield "cut.tiff", file_of(PHOTO, "TIFF")[:900], Fate(bad="not an image|cannot be decoded")
    pages = file_of(PHOTO, "TIFF", save_all=True, append_images=[noise(20, 20)])
    yield "two pages.tiff", pages, Fate(converted=("tiff",))
    deep = Image.fromarray(RNG.integers(0, 65536, (40, 50), dtype=np.uint16))
    yield "16-bit.tiff", file_of(deep, "TIFF"), Fate(converted=("tiff", "16-bit", "grey"))
    floats = Image.fromarray(RNG.random((40, 50)).astype(np.float32))
    yield "float.tiff", file_of(floats, "TIFF"), Fate(bad="^pixel type F")
    yield "32-bit.tiff", file_of(Image.new("I", (40, 50)), "TIFF"), Fate(bad="^pixel type I")
    yield "cmyk.tiff", file_of(PHOTO.convert("CMYK"), "TIFF"), Fate(converted=("tiff", "cmyk"))
    yield "ycbcr.tiff", file_of(PHOTO.convert("YCbCr"), "TIFF"), Fate(converted=("tiff",))
    yield "in jpeg.tiff", file_of(PHOTO, "TIFF", compression="jpeg"), Fate(converted=("tiff",))
    yield "claims 60000x60000.tiff", claimed_tiff(60_000, 60_000), BOMB
    yield "claims 9000x9000.tiff", claimed_tiff(9000, 9000), BROKEN
    yield "small by hand.tiff", claimed_tiff(20, 15), Fate(converted=("tiff", "grey"))
    yield "cyclic.tiff", b"II*\0\x08\0\0\0\0\0\x08\0\0\0", UNKNOWN
    yield "ppm", file_of(PHOTO, "PPM"), Fate(converted=("ppm",))
    yield "cut.ppm", file_of(PHOTO, "PPM")[:900], BROKEN
    yield "claims 60000x60000.ppm", b"P6\n60000 60000\n255\n", BOMB
    yield "claims eleven digits.ppm", b"P6\n99999999999 99999999999\n255\n", BROKEN
    yield "float.pfm", b"Pf\n4 4\n-1.0\n" + bytes(64), Fate(bad="^pixel type F")


def no_pictures() -> Iterator[tuple[str, bytes, Fate]]:
    yield "empty.JPEG", b"", Fate(bad="^empty file$")
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
def corpus() -> dict[str, tuple[bytes, Fate]]:
    found: dict[str, tuple[bytes, Fate]] = {}
    for name, content, fate in (*jpegs(), *pngs(), *others(), *no_pictures()):
        assert name not in found
        found[name] = content, fate
    return found


# On the disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fates() -> dict[str, Fate]:
    return {}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, fates: dict[str, Fate]) -> Iterator[Path]:
    """The corpus in two class folders, every second file in the other; `fates` is filled by path."""
    root = tmp_path_factory.mktemp("hostile") / "photos"
    for folder in ("a", "b"):
        (root / folder).mkdir(parents=True)
    for number, (name, (content, fate)) in enumerate(corpus().items()):
        path = f"{'ab'[number % 2]}/{name}"
        (root / path).write_bytes(content)
        fates[path] = fate
    with open(root / "a" / "sparse.JPEG", "wb") as file:
        file.truncate(10_000_000_000)
    fates["a/sparse.JPEG"] = Fate(bad="^10,000,000,000 bytes: more than 256,000,000$")
    (root / "a" / "unreadable.JPEG").write_bytes(JPEG)
    (root / "a" / "unreadable.JPEG").chmod(0)
    fates["a/unreadable.JPEG"] = Fate(bad="^cannot be read: Permission denied$")
    (root / "a" / "folder.JPEG").mkdir()
    fates["a/folder.JPEG"] = Fate(bad="^a folder, not a file$")
    os.mkfifo(root / "a" / "fifo.JPEG")
    fates["a/fifo.JPEG"] = Fate(bad="^a FIFO, not a file$")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(root / "b" / "s.JPEG"))
    fates["b/s.JPEG"] = Fate(bad="^a socket, not a file$")
    os.symlink("nowhere", root / "b" / "dangling.JPEG")
    fates["b/dangling.JPEG"] = Fate(bad="^cannot be looked at: No such file")
    os.symlink("/etc/passwd", root / "b" / "out.JPEG")
    fates["b/out.JPEG"] = Fate(bad="^a symbolic link out of the source, to /etc/passwd")
    os.symlink("../a/progressive", root / "b" / "link.JPEG")
    fates["b/link.JPEG"] = KEPT if (root / "a" / "progressive").exists() else fates["b/dangling.JPEG"]
    yield root
    (root / "a" / "unreadable.JPEG").chmod(0o600)


def _as_anyone() -> None:
    """In the child: root may read what no one may, so those two rights are dropped before the command starts."""
    libc = ctypes.CDLL(None)
    for right in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, right, 0, 0, 0)  # PR_CAPBSET_DROP
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# A process begins with the peak of the one that it was forked from, and this one may have trained networks: so a small
# one stands between, and writes the peak of the largest process beneath it, in KiB.
MEASURED = (
    "import resource, subprocess, sys; code = subprocess.call(sys.argv[2:]); "
    "open(sys.argv[1], 'w').write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)); sys.exit(code)"
)


@dataclass(frozen=True)
class Ended:
    code: int
    stdout: str
    stderr: str
    seconds: float
    peak_bytes: int  # of the largest of its processes


@pytest.fixture
def alexprep(tmp_path: Path) -> Callable[..., Ended]:
    """Runs the command as a process, with programs beside it that leave a mark when something starts them."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("gs", "convert", "magick", "djpeg", "inkscape", "pdftoppm"):
        (programs / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
        (programs / name).chmod(0o755)

    def run(*words: object) -> Ended:
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "peak")]
        command += [sys.executable, "-c", "from prep.cli import main; main()", "build-lmdb", *map(str, words)]
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        began = time.monotonic()
        with open(tmp_path / "out", "wb+") as out, open(tmp_path / "err", "wb+") as err:
            pid = os.fork()
            if pid == 0:
                try:
                    os.setsid()
                    _as_anyone()
                    os.dup2(out.fileno(), 1)
                    os.dup2(err.fileno(), 2)
                    os.execve(command[0], command, environment)
                finally:
                    os._exit(127)
            code = _wait(pid, began)
        assert not (tmp_path / "started").exists(), "it started another program"
        text = [(tmp_path / name).read_text() for name in ("out", "err")]
        return Ended(code, text[0], text[1], time.monotonic() - began, 1024 * int((tmp_path / "peak").read_text()))

    return run


def _wait(pid: int, began: float) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > MOST_S:
            os.killpg(pid, 9)
            os.waitpid(pid, 0)
            pytest.fail(f"it has not ended after {MOST_S} s")
        time.sleep(0.02)


def told(store: Path) -> dict[str, dict[str, Any]]:
    """inputs.jsonl by name: what is not in there was kept as it is."""
    lines = (store / "train" / "inputs.jsonl").read_text().splitlines()
    found = {fate["source"]: fate for fate in map(json.loads, lines)}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize("whole", [False, True])
def test_every_file_has_the_fate_that_it_must_have(
    whole: bool,
    photos: Path,
    fates: dict[str, Fate],
    alexprep: Callable[..., Ended],
    records_of: Callable[[Path, str], list[tuple[bytes, Any]]],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    options = ["--side", "32", "--jobs", "2", "--on-bad", "skip", "--json", *["--keep-aspect"] * whole]
    ended = alexprep(photos, "--store", store, *options)
    assert ended.code == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.peak_bytes < MOST_BYTES
    on_disk = {f"{folder.name}/{name}" for folder in photos.iterdir() for name in os.listdir(folder)}
    assert on_disk == set(fates)

    found, wrong = told(store), []
    for name, must in fates.items():
        bad = must.bad or (must.whole if whole else "")
        has = found.get(name, {"fate": "kept"})
        if bad:
            right = has["fate"] == "bad" and re.search(bad, has["why"]) is not None and "\n" not in has["why"]
        else:
            expected = {"fate": "converted", "how": list(must.converted)} if must.converted else {"fate": "kept"}
            expected |= {"exif_orientation": must.turned} if must.turned != 1 else {}
            right = {key: value for key, value in has.items() if key != "source"} == expected
        if not right:
            wrong.append(f"{name}: {has}, expected {must}")
    assert not wrong, "\n".join(wrong)

    left_out = {name for name, has in found.items() if has["fate"] == "bad"}
    answer = json.loads(ended.stdout)
    assert (answer["records"], answer["skipped"]) == (len(fates) - len(left_out), len(left_out))
    account = Store.open(store).split("train").account
    assert (account["inputs"], account["kept"]) == (len(fates), len(fates) - len(left_out))
    assert sum(account["bad"].values()) == len(left_out)
    records = [message for _, message in records_of(store, "train")]
    assert {message.source.decode() for message in records} == set(fates) - left_out
    assert len(records) == len(fates) - len(left_out)
    for message in records:
        with Image.open(io.BytesIO(message.data)) as image:
            image.load()
            assert image.format == "JPEG"
            assert image.size == (message.width, message.height)
            assert min(image.size) == 32
            assert whole or image.size == (32, 32)


def test_the_first_bad_file_ends_a_strict_build(
    photos: Path, fates: dict[str, Fate], alexprep: Callable[..., Ended], tmp_path: Path
) -> None:
    ended = alexprep(photos, "--store", tmp_path / "store", "--side", "32", "--jobs", "1", "--on-bad", "fail")
    assert ended.code == 1
    lines = ended.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Error: ")
    named = re.search(r"\(first: (.+?): ", lines[0])
    assert named is not None
    assert fates[named[1]].bad
    seen = [
        json.loads(line) for line in (tmp_path / "store" / "train" / ".build" / "bad.jsonl").read_text().splitlines()
    ]
    assert all(fates[fate["source"]].bad for fate in seen)
    plain = {name for name, _, _ in no_pictures()} - {"zip.JPEG"}  # its first letter is that of a PPM's
    plain |= {"unreadable.JPEG", "folder.JPEG", "fifo.JPEG", "s.JPEG", "dangling.JPEG", "out.JPEG", "sparse.JPEG"}
    assert {fate["source"].split("/")[1] for fate in seen} >= plain  # all of them, before any work
    assert not (tmp_path / "store" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["cut at 90%", "2000 scans of a large picture", "20000x20000.png", "exif of noise"])
def test_what_only_decoding_shows_ends_a_strict_build_too(
    name: str, alexprep: Callable[..., Ended], tmp_path: Path
) -> None:
    """And a file that is merely odd does not."""
    content, fate = corpus()[name]
    for folder in ("a", "b"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
        (tmp_path / "photos" / folder / "good.JPEG").write_bytes(JPEG)
    (tmp_path / "photos" / "b" / "odd.JPEG").write_bytes(content)
    ended = alexprep(tmp_path / "photos", "--store", tmp_path / "store", "--side", "32", "--jobs", "1")
    if not fate.bad:
        assert ended.code == 0, ended.stderr
        return
    assert ended.code == 1
    assert len(ended.stderr.splitlines()) == 1
    why = re.fullmatch(r"Error: b/odd\.JPEG: (.+?)\. Correct it, or .*", ended.stderr.strip())
    assert why is not None, ended.stderr
    assert re.search(fate.bad, why[1])

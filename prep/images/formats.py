"""Image formats that alexnet reads: signatures, the list of accepted formats, and the packages that some formats need.

The format is detected from the content, never from the file name. Pillow reads most formats itself. HEIC and JPEG XL
are read with Pillow plugins, which pip installs with the extras `heic` and `jxl` of this project.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

from PIL import features

from prep.version import pip_command

HEAD_BYTES = 32  # number of bytes at the beginning of a file that show its format

JPEG_SIGNATURE = b"\xff\xd8\xff"
_SIGNATURES = (JPEG_SIGNATURE, b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II", b"MM", b"P")
# Pillow's names of the formats that begin with one of _SIGNATURES. EPS is excluded, because Pillow starts Ghostscript
# to decode it.
_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")

_JXL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_AVIF_BRANDS = (b"avif", b"avis")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1")

# Pillow's name of a format that needs a plugin -> (usual name, module of the plugin, pip extra that installs it)
_PLUGINS = {"HEIF": ("HEIC", "pillow_heif", "heic"), "JXL": ("JPEG XL", "pillow_jxl", "jxl")}


class BadImage(ValueError):
    """A file that cannot be used as an image. The message gives the reason, without the name of the file.

    If the image exceeds a limit that an option sets, `limit` holds the name of the option and the size of the image,
    such as {"limit": "max_pixels", "pixels": 240000000}. The keys of `limit` become keys of the input's line in
    inputs.jsonl.
    """

    def __init__(self, reason: str, **limit: Any) -> None:
        super().__init__(reason)
        self.limit = limit


def has_image_signature(head: bytes) -> bool:
    """Return whether a file with the first HEAD_BYTES bytes `head` may be an image.

    A file in a format whose plugin is not installed also counts as an image.
    """
    return head.startswith(_SIGNATURES) or _modern_format(head) is not None


def unreadable_reason(head: bytes) -> str:
    """Return why a file with the first HEAD_BYTES bytes `head` cannot be read; empty if the file may be readable."""
    if not has_image_signature(head):
        return unknown_format()
    format = _modern_format(head)
    if format is None or _can_read(format):
        return ""
    if format == "AVIF":
        return "an AVIF image, which this Pillow cannot read: pip install 'pillow>=11.3'"
    name, _, extra = _PLUGINS[format]
    return f"a {name} image, whose decoder is not installed: {pip_command(extra)}"


def pillow_formats(head: bytes) -> tuple[str, ...]:
    """Return Pillow's names of the formats to try for a file that begins with `head`.

    Loads the plugin that the file needs.
    """
    format = _modern_format(head)
    return _FORMATS if format is None else (format,)


@cache
def unknown_format() -> str:
    """Return the reason for refusing a file in an unknown format, with the list of the accepted formats."""
    accepted = ["JPEG", "PNG", "GIF", "BMP", "WebP", "TIFF", "PNM", *["AVIF"] * _can_read("AVIF")]
    accepted += [name for format, (name, _, _) in _PLUGINS.items() if _can_read(format)]
    accepted += [f"{name} after {pip_command(extra)}" for f, (name, _, extra) in _PLUGINS.items() if not _can_read(f)]
    return f"not an image in a known format (accepted: {', '.join(accepted)})"


def _modern_format(head: bytes) -> str | None:
    """Return Pillow's name of the format of an AVIF, HEIC or JPEG XL file, or None for other files."""
    if head.startswith(_JXL_SIGNATURES):
        return "JXL"
    if head[4:8] != b"ftyp":
        return None
    # the main brand of the file and four compatible brands
    brands = [head[first : first + 4] for first in (8, *range(16, HEAD_BYTES, 4))]
    if any(brand in _AVIF_BRANDS for brand in brands):
        return "AVIF"
    return "HEIF" if any(brand in _HEIC_BRANDS for brand in brands) else None


@cache
def _can_read(format: str) -> bool:
    """Return whether the installed Pillow can read files of the format AVIF, HEIF or JXL.

    Loads the plugin of the format.
    """
    if format == "AVIF":
        return "avif" in features.get_supported_modules()
    try:
        plugin = importlib.import_module(_PLUGINS[format][1])
    except ImportError:
        return False
    if format == "HEIF":
        plugin.register_heif_opener(thumbnails=False)
    return True

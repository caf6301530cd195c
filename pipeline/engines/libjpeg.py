"""Finds libjpeg-turbo, whose functions the C kernel calls: the library in Pillow's wheel, or that of the system."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

_LIBJPEG_FUNCTIONS = (  # same order as the fields of struct jpeg_library in kernels.c
    *("jpeg_std_error", "jpeg_CreateDecompress", "jpeg_mem_src", "jpeg_read_header", "jpeg_start_decompress"),
    *("jpeg_crop_scanline", "jpeg_skip_scanlines", "jpeg_read_scanlines", "jpeg_abort_decompress"),
    "jpeg_destroy_decompress",
)


class JpegLibrary(ctypes.Structure):
    """Addresses of the functions of libjpeg-turbo. Raises AttributeError if the library lacks a function."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in _LIBJPEG_FUNCTIONS)

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library  # this reference keeps the library loaded
        super().__init__(*(ctypes.cast(library[name], ctypes.c_void_p).value for name in _LIBJPEG_FUNCTIONS))


def find_libjpeg() -> JpegLibrary | None:
    """Return the libjpeg-turbo of Pillow's wheel, otherwise the libjpeg-turbo of the system, otherwise None."""
    pillow = find_spec("PIL")
    folders = [Path(folder).parent for folder in (pillow and pillow.submodule_search_locations) or ()]
    bundled = [path for folder in folders for path in folder.glob("pillow.libs/libjpeg-*.so*")]
    for name in [*map(str, bundled), "libjpeg.so.62"]:
        try:
            return JpegLibrary(ctypes.CDLL(name))
        except (OSError, AttributeError):
            continue
    return None

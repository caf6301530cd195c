"""Reads NumPy files: the header is compared with the expected type and shape before an array is allocated."""

from __future__ import annotations

import errno
import math
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.console import UserError, count_noun, escaped
from prep.schema.regular_file import open_regular, read_regular

_HEADER_BYTES = 1024  # largest allowed header of a .npy file; for arrays of few dimensions, NumPy writes at most 128
_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[<>|=]?[a-zA-Z]\d{0,9})', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,15}, ?)*(?:\d{1,15})?)\),? ?\}\s*"
)


@dataclass(frozen=True)
class ArrayShape:
    """NumPy types and shape that an array in a file may have.

    A type is a dtype, such as `<f4`, or a kind of dtype, such as `U`. None in `shape` allows any length.
    """

    types: tuple[str, ...]
    shape: tuple[int | None, ...]

    def allows(self, dtype: np.dtype[Any], shape: tuple[int, ...]) -> bool:
        """Return whether an array may have this type and shape. Types that hold Python objects are never allowed."""
        is_type = not dtype.hasobject and dtype.names is None and (dtype.str in self.types or dtype.kind in self.types)
        return (
            is_type
            and len(shape) == len(self.shape)
            and all(length == wanted or wanted is None for length, wanted in zip(shape, self.shape, strict=True))
        )

    def __str__(self) -> str:
        lengths = ", ".join("any" if length is None else str(length) for length in self.shape)
        return f"{' or '.join(_type_name(name) for name in self.types)} of shape ({lengths})"


def _type_name(name: str) -> str:
    return {"U": "text"}.get(name) or np.dtype(name).name


def read_npy(
    path: Path, expected: ArrayShape, advice: str, error: Callable[[str], UserError] = UserError
) -> npt.NDArray[Any]:
    """Return the array of a .npy file.

    If a length of `expected` is None, the file may have any size. Raises the errors of read_regular and decode_npy.
    """
    if None in expected.shape:
        return decode_npy(read_regular(path, path.stat().st_size, advice, error), expected, str(path), advice, error)
    # Up to 16 bytes are allowed for each number, so that an array of a larger type than expected is still read. The
    # error then names the wrong type, not the size of the file.
    max_bytes = _HEADER_BYTES + 16 * math.prod(length or 0 for length in expected.shape)
    return decode_npy(read_regular(path, max_bytes, advice, error), expected, str(path), advice, error)


def decode_npy(
    content: bytes, expected: ArrayShape, name: str, advice: str, error: Callable[[str], UserError] = UserError
) -> npt.NDArray[Any]:
    """Return the array in the bytes of a .npy file; the array is a copy and can be written to.

    Raises the errors of view_npy.
    """
    return view_npy(content, expected, name, advice, error).copy()


def view_npy(
    content: bytes | memoryview,
    expected: ArrayShape,
    name: str,
    advice: str,
    error: Callable[[str], UserError] = UserError,
) -> npt.NDArray[Any]:
    """Return the array in the bytes of a .npy file, without a copy.

    Raises `error`, with `name` and `advice` in its message, unless type, shape and number of bytes are as expected.
    Python objects are never read.
    """
    try:
        dtype, shape, is_fortran, start = _header(bytes(content[: _HEADER_BYTES + 12]))
    except (ValueError, TypeError) as invalid:
        raise error(escaped(f"{name}: cannot be read as a .npy file ({invalid}). {advice}")) from None
    if not expected.allows(dtype, shape):
        raise error(escaped(f"{name} is {dtype} of shape {shape}, expected {expected}. {advice}"))
    size = math.prod(shape) * dtype.itemsize
    if len(content) - start != size:
        found = count_noun(len(content) - start, "byte")
        raise error(escaped(f"{name} has {found} of data, expected {size:,}. {advice}"))
    if size == 0:
        return np.empty(shape, dtype)
    flat = np.frombuffer(content, dtype, offset=start)
    return flat.reshape(shape, order="F" if is_fortran else "C")


def read_npz(
    path: Path,
    expected: Mapping[str, ArrayShape],
    max_bytes: int,
    advice: str,
    error: Callable[[str], UserError] = UserError,
) -> dict[str, npt.NDArray[Any]]:
    """Return {name: array} for the names in `expected` from a .npz file. Other arrays of the file are not read.

    `max_bytes` is the largest size of the file, and the largest total size of the unpacked arrays in `expected`. Raises
    FileNotFoundError or another OSError if the file cannot be read. Raises `error`, with `advice` in its message, if
    the file is larger than `max_bytes`, is damaged, or lacks an array. Also raises `error` if an array is not as
    expected.
    """
    with open_regular(path, advice, error) as file:
        try:
            with zipfile.ZipFile(file) as archive:
                sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
                wanted = {name: f"{name}.npy" for name in expected}
                missing = [name for name, entry in wanted.items() if entry not in sizes]
                if missing:
                    raise error(escaped(f"{path} has no array {missing[0]}, expected {', '.join(wanted)}. {advice}"))
                total = sum(sizes[entry] for entry in wanted.values())
                if total > max_bytes:
                    raise error(escaped(f"{path}: arrays of {total:,} bytes, expected at most {max_bytes:,}. {advice}"))
                contents = {name: archive.read(entry) for name, entry in wanted.items()}
        except UserError:
            raise
        except OSError as failure:
            if failure.errno != errno.EINVAL:  # EINVAL: the directory in the ZIP file states a negative position
                raise OSError(failure.errno, failure.strerror or str(failure), str(path)) from None
            raise error(escaped(f"{path}: cannot be read as a .npz file ({failure.strerror}). {advice}")) from None
        except Exception as invalid:  # for a damaged file, zipfile and its decompressors raise many types of errors
            raise error(escaped(f"{path}: cannot be read as a .npz file ({invalid}). {advice}")) from None
    return {
        name: decode_npy(contents.pop(name), shape, f"{path}: {name}", advice, error)
        for name, shape in expected.items()
    }


def _header(content: bytes) -> tuple[np.dtype[Any], tuple[int, ...], bool, int]:
    """Return (type, shape, whether in Fortran order, position of the data) from the header of a .npy file.

    NumPy's own reader parses the header as Python code. This function reads only headers in the form that NumPy writes
    for a dtype without fields. Raises ValueError or TypeError for any other header.
    """
    if not content.startswith((b"\x93NUMPY\1\0", b"\x93NUMPY\2\0")):
        raise ValueError(f"begins with {content[:8]!r}, expected NumPy format 1.0 or 2.0")
    start = 10 if content[6] == 1 else 12
    end = start + int.from_bytes(content[8:start], "little")
    header = _HEADER.fullmatch(content, start, min(end, len(content)))
    if header is None or end - start > _HEADER_BYTES:
        raise ValueError(f"header {content[start : min(end, start + 60)]!r}")
    shape = tuple(int(length) for length in header["shape"].replace(b" ", b"").split(b",") if length)
    return np.dtype(header["type"].decode()), shape, header["order"] == b"True", end

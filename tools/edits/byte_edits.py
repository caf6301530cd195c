"""Edits of whole files: a file is emptied, truncated, encoded anew, made huge, or replaced by a pipe, folder or link.

Also edits .npy files and the members of .npz files.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import socket
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Apply = Callable[[Path], object]  # a function that changes the file at a path
_HUGE_BYTES = 3_000_000_000
_BOMB_BYTES = 2_000_000_000


def any_file_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) that apply to a file of any format."""
    yield "empty", lambda path: _write(path, b"")
    yield "truncated to 1 byte", lambda path: _write(path, path.read_bytes()[:1])
    for part in (1, 2, 3):
        yield f"truncated to {part}/4", lambda path, part=part: _truncate(path, part / 4)  # type: ignore[misc]
    yield "without last byte", lambda path: _write(path, path.read_bytes()[:-1])
    yield "random bytes", lambda path: _write(path, random.Random(1).randbytes(path.stat().st_size))
    yield "zero bytes", lambda path: _write(path, bytes(path.stat().st_size))
    yield "FIFO", lambda path: _replace(path, os.mkfifo)
    yield "socket", _make_socket
    yield "folder", lambda path: _replace(path, Path.mkdir)
    yield "link to a device", lambda path: _replace(path, lambda path: path.symlink_to("/dev/zero"))
    yield "link to itself", lambda path: _replace(path, lambda path: path.symlink_to(path.name))
    yield "link out of the folder", _link_outside
    yield "missing", lambda path: path.unlink()
    yield "3 GB", lambda path: os.truncate(path, _HUGE_BYTES)


def text_file_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for a file of JSON or of JSON lines."""
    yield "byte order mark", lambda path: _write(path, b"\xef\xbb\xbf" + path.read_bytes())
    yield "UTF-16", lambda path: _write(path, path.read_text().encode("utf-16"))
    yield "broken UTF-8", lambda path: _write(path, path.read_bytes().replace(b'"', b'"\xff\xc3', 1))
    yield "NUL byte", lambda path: _write(path, path.read_bytes().replace(b'"', b'"\0', 1))
    yield "text after the end", lambda path: _write(path, path.read_bytes() + b"x")
    for kind, content in (
        *(("null", "null"), ("true", "true"), ("a number", "7"), ("a text", '"text"'), ("a list", "[]")),
        *(("an object", "{}"), ("nested lists", "[" * 10_000), ("nested objects", '{"a":' * 10_000)),
        *(("many digits", "1" * 100_000), ("NaN", "NaN"), ("escape codes", "\x1b[31m")),
    ):
        yield kind, lambda path, content=content: _write(path, content.encode())  # type: ignore[misc]


def npy_file_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for a .npy file of floating-point or integer numbers."""
    for kind, header in (
        ("dtype object", {"descr": "|O"}),
        ("dtype float64", {"descr": "<f8"}),
        ("dtype big-endian", {"descr": ">f4"}),
        ("dtype text", {"descr": "<U9"}),
        ("dtype void", {"descr": "|V0"}),
        ("dtype fields", {"descr": [("a", "<f4"), ("b", "|O")]}),
        ("dtype unknown", {"descr": "\x1b[31m"}),
        ("shape 10^18", {"shape": (10**9, 10**9)}),
        ("shape 10^10", {"shape": (10**10,)}),
        ("shape 10^30", {"shape": (10**30,)}),
        ("shape negative", {"shape": (-1,)}),
        ("shape 0", {"shape": (0, 0, 3)}),
        ("shape scalar", {"shape": ()}),
        ("shape of 40 axes", {"shape": (1,) * 40}),
        ("shape fraction", {"shape": (1.5,)}),
        ("shape text", {"shape": "text"}),
        ("Fortran order", {"fortran_order": True}),
        ("order text", {"fortran_order": "text"}),
        ("unknown field", {"unknown": 1}),
    ):
        yield kind, lambda path, header=header: _write_npy(path, header)  # type: ignore[misc]
    yield "header of 1 MB", lambda path: _write_npy(path, {}, padding=1_000_000)
    yield "header of 4 GB", lambda path: _write(path, b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + path.read_bytes()[10:])
    yield "header of code", lambda path: _write(path, _npy_start(b"__import__('os').system('touch executed')\n"))
    yield "header nested", lambda path: _write(path, _npy_start(b"(" * 5_000 + b")" * 5_000 + b"\n"))
    yield "version 9", lambda path: _write(path, b"\x93NUMPY\x09\x00" + path.read_bytes()[8:])
    for kind, number in (("NaN", np.nan), ("Infinity", np.inf), ("1e30", 1e30), ("negative", -1.0)):
        yield f"first number {kind}", lambda path, number=number: _set_number(path, number)  # type: ignore[misc]


def npz_file_edits() -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for a .npz file as a whole. npz_member_edits edits single members."""
    yield "unknown member", lambda path: _rezip(path, {"unknown.npy": b"text"})
    yield "member outside", lambda path: _rezip(path, {"../../outside.npy": b"text"})
    yield "without members", lambda path: _write(path, b"PK\5\6" + bytes(18))


def npz_member_edits(member: str) -> Iterator[tuple[str, Apply]]:
    """Yield pairs (kind, edit) for one member of a .npz file, such as `labels`."""
    name = f"{member}.npy"
    yield "missing", lambda path: _rezip(path, {name: None})
    yield "empty", lambda path: _rezip(path, {name: b""})
    yield "not an array", lambda path: _rezip(path, {name: b"text"})
    yield "zip bomb", lambda path: _rezip(path, {name: _bomb()}, zipfile.ZIP_DEFLATED)
    for kind, edit in npy_file_edits():
        yield kind, lambda path, edit=edit: _edit_member(path, name, edit)  # type: ignore[misc]
    for kind, change in (
        ("half of the rows", lambda array: array[: len(array) // 2] if array.ndim else array),
        ("rows repeated", lambda array: np.concatenate([array, array]) if array.ndim else array),
        ("one more axis", lambda array: array[None]),
        ("largest numbers", lambda array: np.full_like(array, np.iinfo(array.dtype).max) if _is_int(array) else array),
        ("smallest numbers", lambda array: np.full_like(array, np.iinfo(array.dtype).min) if _is_int(array) else array),
        ("as text", lambda array: array.astype(str)),
    ):
        yield kind, lambda path, change=change: _change_member(path, name, change)  # type: ignore[misc]


def npz_members(path: Path) -> list[str]:
    """Return the names of the arrays in a .npz file."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _is_int(array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> bool:
    return array.dtype.kind in "iu"


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _replace(path: Path, make: Apply) -> None:
    path.unlink()
    make(path)


def _truncate(path: Path, share: float) -> None:
    _write(path, path.read_bytes()[: int(path.stat().st_size * share)])


def _make_socket(path: Path) -> None:
    path.unlink()
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's address has at most 107 bytes, so `bind` gets the name without the folder
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def _link_outside(path: Path) -> None:
    outside = Path(f"{path.absolute().parents[0]}-outside-{path.name}")
    shutil.move(path, outside)
    path.symlink_to(outside)


def _npy_start(header: bytes) -> bytes:
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(header)) + header


def _npy_content(content: bytes, changes: dict[str, object], padding: int = 0) -> bytes:
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": fortran_order, "shape": shape, **changes}
    return _npy_start(repr(header).encode() + b" " * padding + b"\n") + file.read()


def _write_npy(path: Path, changes: dict[str, object], padding: int = 0) -> None:
    _write(path, _npy_content(path.read_bytes(), changes, padding))


def _set_number(path: Path, number: float) -> None:
    array = np.load(path, allow_pickle=False)
    if array.size and array.dtype.kind == "f":
        array.reshape(-1)[0] = number
    elif array.size and _is_int(array):
        array.reshape(-1)[0] = np.iinfo(array.dtype).min
    with path.open("wb") as file:
        np.save(file, array)


def _rezip(path: Path, changes: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> None:
    """Write an archive again. `changes` is {name of a member: new content}; the content None removes the member."""
    with zipfile.ZipFile(path) as archive:
        members: dict[str, bytes | None] = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**members, **changes}.items():
            if content is not None:
                archive.writestr(name, content)


def _bomb() -> bytes:
    """Return a .npy file that holds 2 GB of zeros. In a compressed archive, the file takes 2 MB."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (_BOMB_BYTES // 4,)})
    return header.getvalue() + bytes(_BOMB_BYTES)


def _edit_member(path: Path, name: str, edit: Apply) -> None:
    with zipfile.ZipFile(path) as archive:
        content = archive.read(name)
    member = path.with_name(f".{path.name}.member")
    member.write_bytes(content)
    edit(member)
    _rezip(path, {name: member.read_bytes()})
    member.unlink()


def _change_member(
    path: Path, name: str, change: Callable[[np.ndarray[tuple[int, ...], np.dtype[np.generic]]], object]
) -> None:
    with zipfile.ZipFile(path) as archive:
        array = np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
    content = io.BytesIO()
    np.save(content, change(array), allow_pickle=False)  # type: ignore[arg-type]  # `change` returns an array
    _rezip(path, {name: content.getvalue()})

"""Tests of the readers of NumPy files. The content of the files is intact, damaged or arbitrary."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from prep.console import UserError
from prep.schema import ArrayShape, decode_npy, read_npy, read_npz

ADVICE = "Build the store again."
MEAN = ArrayShape(("<f4",), (4, 4, 3))


def npy(array: npt.NDArray[np.generic]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def with_header(header: str, data: bytes = b"", version: bytes = b"\1\0") -> bytes:
    """Return a .npy file with the text `header` as its header."""
    text = header.encode().ljust(118 if len(header) < 118 else len(header) + 1)
    return b"\x93NUMPY" + version + len(text).to_bytes(2, "little") + text + data


def test_arrays_are_equal_to_the_ones_saved(tmp_path: Path) -> None:
    array = np.random.default_rng(0).random((4, 4, 3)).astype(np.float32)
    for stored in (array, np.asfortranarray(array)):
        (tmp_path / "a.npy").write_bytes(npy(stored))
        read = read_npy(tmp_path / "a.npy", MEAN, ADVICE)
        assert np.array_equal(read, array) and read.dtype == np.float32 and read.flags.writeable
    assert decode_npy(npy(np.array(["a", "bc"])), ArrayShape(("U",), (None,)), "x", ADVICE).tolist() == ["a", "bc"]
    assert decode_npy(npy(np.empty((0, 2), np.int64)), ArrayShape(("<i8",), (None, 2)), "x", ADVICE).shape == (0, 2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "cannot be read as a .npy file"),
        (b"PK\3\4" + b"\0" * 200, "cannot be read as a .npy file"),
        (with_header("{'descr': '<f4', 'fortran_order': False}"), "cannot be read as a .npy file"),
        (with_header("(" * 5000), "cannot be read as a .npy file"),
        (with_header("{'descr': '|O', 'fortran_order': False, 'shape': (4, 4, 3), }"), "is object of shape"),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4, -3), }"),
            "cannot be read as a .npy file",
        ),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4), }"), r"expected float32 of shape"),
        (with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4, True), }"), "cannot be read"),
        (with_header("{'descr': '<z9', 'fortran_order': False, 'shape': (4, 4, 3), }"), "cannot be read"),
        (
            with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 4, 3), }"),
            "0 bytes of data, expected 192",
        ),
        (npy(np.zeros((4, 4, 3), np.float32)) + b"x", "193 bytes of data, expected 192"),
        (npy(np.zeros((4, 4, 3), np.float64)), "is float64 of shape"),
        (npy(np.zeros((4, 4, 3), ">f4")), "expected float32"),
        (npy(np.zeros((4, 4, 3), np.float32)).replace(b"NUMPY\1", b"NUMPY\3"), "expected NumPy format 1.0 or 2.0"),
    ],
)
def test_wrong_content_gives_one_line(content: bytes, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as caught:
        decode_npy(content, MEAN, "mean_image.npy", ADVICE)
    assert str(caught.value).startswith("mean_image.npy") and str(caught.value).isprintable()


def test_a_claim_of_a_huge_array_allocates_nothing(tmp_path: Path) -> None:
    claim = with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, ), }")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("a.npy", claim)
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(50_000_000))
    tracemalloc.start()
    shape = {"a": ArrayShape(("<f4",), (None,))}
    with pytest.raises(UserError, match="0 bytes of data, expected 4,000,000,000,000"):
        read_npz(tmp_path / "a.npz", shape, 1_000_000, ADVICE)
    with pytest.raises(UserError, match="arrays of 50,000,000 bytes, expected at most 1,000,000"):
        read_npz(tmp_path / "bomb.npz", shape, 1_000_000, ADVICE)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 5_000_000


def test_npz_files_are_read_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.arange(3), b=np.arange(6.0).reshape(2, 3), c=np.array([{}], object))
    expected = {"a": ArrayShape(("<i8",), (None,)), "b": ArrayShape(("<f8",), (None, 3))}
    read = read_npz(path, expected, 10_000, ADVICE)
    assert read["a"].tolist() == [0, 1, 2] and read["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(UserError, match=r"a\.npz: c is object of shape"):
        read_npz(path, {"c": ArrayShape(("<i8",), (None,))}, 10_000, ADVICE)
    with pytest.raises(UserError, match="has no array d, expected a, d"):
        read_npz(path, {"a": expected["a"], "d": expected["a"]}, 10_000, ADVICE)


def test_every_cut_and_every_changed_byte_of_an_npz_file_gives_an_array_or_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.arange(3))
    content, expected = path.read_bytes(), {"a": ArrayShape(("<i8",), (3,))}
    changed = [content[:n] for n in range(len(content))]
    changed += [content[:n] + bytes([content[n] ^ 0xFF]) + content[n + 1 :] for n in range(len(content))]
    for damaged in changed:
        path.write_bytes(damaged)
        try:
            assert read_npz(path, expected, 10_000, ADVICE)["a"].tolist() == [0, 1, 2]
        except UserError as error:
            assert str(error).isprintable()

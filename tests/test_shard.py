"""prep.shard against the lmdb library used directly, and hashlib over the bytes that the docstring names."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lmdb
import numpy as np
import pytest

from prep.manifest import StoreError
from prep.shard import key_of, read, write


def some_records(count: int, seed: int = 0) -> list[tuple[bytes, bytes]]:
    rng = np.random.default_rng(seed)
    return [(f"{i:08d}".encode(), rng.bytes(int(rng.integers(0, 9000)))) for i in range(count)]


def by_lmdb(folder: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
        assert txn.stat()["entries"] == env.stat()["entries"]
        return [(bytes(key), bytes(value)) for key, value in txn.cursor()]


def test_keys_sort_as_numbers() -> None:
    numbers = [0, 1, 9, 10, 99, 100, 4095, 4096, 1_281_166, 99_999_999]
    keys = [key_of(number) for number in numbers]
    assert keys == sorted(keys)
    assert all(len(key) == 8 for key in keys)
    assert [int(key) for key in keys] == numbers


def test_what_is_written_is_in_the_lmdb(tmp_path: Path) -> None:
    records = some_records(150)
    folder = tmp_path / "train" / "00000"
    count, size, _ = write(folder, iter(records))
    assert by_lmdb(folder) == records
    assert count == 150
    assert size == sum(len(value) for _, value in records)
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]  # no lock file


def test_what_is_written_is_read(tmp_path: Path) -> None:
    records = some_records(40)
    write(tmp_path / "s", records)
    assert list(read(tmp_path / "s")) == records
    assert list(read(tmp_path / "s")) == records  # and once more


def test_lmdb_written_by_another_is_read(tmp_path: Path) -> None:
    records = some_records(20)
    with lmdb.open(str(tmp_path / "s"), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for key, value in reversed(records):
            txn.put(key, value)
    assert list(read(tmp_path / "s")) == records


def test_digest_is_sha256_of_keys_lengths_and_values(tmp_path: Path) -> None:
    records = some_records(50)
    expected = hashlib.sha256(b"".join(k + len(v).to_bytes(8, "little") + v for k, v in records)).hexdigest()
    assert write(tmp_path / "a", records)[2] == expected


def test_digest_knows_order_keys_and_borders(tmp_path: Path) -> None:
    variants = [
        [(b"00000000", b"ab"), (b"00000001", b"cd")],
        [(b"00000000", b"cd"), (b"00000001", b"ab")],
        [(b"00000000", b"abc"), (b"00000001", b"d")],
        [(b"00000000", b"ab"), (b"00000002", b"cd")],
        [(b"00000000", b"ab")],
        [],
    ]
    digests = [write(tmp_path / str(i), records)[2] for i, records in enumerate(variants)]
    assert len(set(digests)) == len(variants)


def test_the_map_grows_with_the_records(tmp_path: Path) -> None:
    """150 MB, more than twice the first map, with one record of 80 MB: all there, in a file that is no larger."""
    sizes = [1_000_000] * 30 + [80_000_000] + [4_000_000] * 10
    filler = np.random.default_rng(3).bytes(1_000_003)

    def value(number: int) -> bytes:
        return (filler[number:] * (sizes[number] // len(filler) + 2))[: sizes[number]]

    def records() -> Iterator[tuple[bytes, bytes]]:
        return ((key_of(number), value(number)) for number in range(len(sizes)))

    folder = tmp_path / "s"
    try:
        count, size, _ = write(folder, records())
        assert (count, size) == (len(sizes), sum(sizes))
        assert (folder / "data.mdb").stat().st_size < 1.01 * size + 200_000
        with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
            for number, (key, found) in enumerate(txn.cursor()):
                assert int(key) == number
                assert found == value(number)
            assert number == len(sizes) - 1
    finally:
        shutil.rmtree(folder)


def test_an_error_of_the_source_comes_through(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[bytes, bytes]]:
        yield b"00000000", b"x"
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write(tmp_path / "s", broken())


@pytest.mark.parametrize("content", [None, b"", b"x" * 100, b"not an lmdb" * 2000])
def test_what_is_no_lmdb_is_named(tmp_path: Path, content: bytes | None) -> None:
    folder = tmp_path / "s"
    if content is not None:
        folder.mkdir()
        (folder / "data.mdb").write_bytes(content)
    with pytest.raises(StoreError, match=str(folder)):
        list(read(folder))
    if content is None:
        assert not folder.exists()


def test_damaged_page_is_a_store_error(tmp_path: Path) -> None:
    """All pages but the two of the header are overwritten."""
    folder = tmp_path / "s"
    write(folder, some_records(50))
    file = folder / "data.mdb"
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(StoreError, match=str(folder)):
        list(read(folder))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_a_store_error(tmp_path: Path, share: float) -> None:
    """As a copy that broke off leaves it. In a process of its own: reading a map past its file's end is SIGBUS."""
    folder = tmp_path / "s"
    write(folder, some_records(100))
    file = folder / "data.mdb"
    with open(file, "r+b") as handle:
        handle.truncate(int(file.stat().st_size * share))
    program = "import sys, pathlib; from prep.shard import read; list(read(pathlib.Path(sys.argv[1])))"
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended
    assert ended.stderr.splitlines()[-1].startswith(f"prep.manifest.StoreError: {folder}")

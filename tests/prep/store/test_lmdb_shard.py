"""prep.store.lmdb_shard against the lmdb library used directly, and hashlib over the bytes that the docstring names.

Readers are held against what was written, by place, with keys that have gaps where inputs were left out.
"""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lmdb
import numpy as np
import pytest

from prep.store.lmdb_shard import ShardReader, read, record_key, write
from prep.store.manifest import StoreError


def some_records(count: int, seed: int = 0) -> list[tuple[bytes, bytes]]:
    rng = np.random.default_rng(seed)
    return [(f"{i:08d}".encode(), rng.bytes(int(rng.integers(0, 9000)))) for i in range(count)]


def by_lmdb(folder: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
        assert txn.stat()["entries"] == env.stat()["entries"]
        return [(bytes(key), bytes(value)) for key, value in txn.cursor()]


def test_keys_sort_as_numbers() -> None:
    numbers = [0, 1, 9, 10, 99, 100, 4095, 4096, 1_281_166, 99_999_999]
    keys = [record_key(number) for number in numbers]
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
        return ((record_key(number), value(number)) for number in range(len(sizes)))

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


@pytest.fixture(params=[None, b"", b"x" * 100, b"not an lmdb" * 2000], ids=["absent", "empty", "short", "long"])
def no_lmdb(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that is not there, or whose data.mdb is something else."""
    folder = tmp_path / "s"
    if request.param is not None:
        folder.mkdir()
        (folder / "data.mdb").write_bytes(request.param)
    return folder


def test_what_is_no_lmdb_is_named(no_lmdb: Path) -> None:
    was_there = no_lmdb.exists()
    with pytest.raises(StoreError, match=str(no_lmdb)):
        list(read(no_lmdb))
    assert no_lmdb.exists() == was_there


def test_damaged_page_is_a_store_error(tmp_path: Path) -> None:
    """All pages but the two of the header are overwritten."""
    folder = tmp_path / "s"
    write(folder, some_records(50))
    file = folder / "data.mdb"
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(StoreError, match=str(folder)):
        list(read(folder))


def said_of_a_cut_file(folder: Path, size: int, program: str) -> str:
    """The last line that a process of its own says: reading a map past its file's end is SIGBUS."""
    os.truncate(folder / "data.mdb", size)
    program = (
        "import sys, pathlib; from prep.store.lmdb_shard import ShardReader, read\nfolder = pathlib.Path(sys.argv[1])\n"
        + program
    )
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_a_store_error(tmp_path: Path, share: float) -> None:
    """As a copy that broke off leaves it."""
    folder = tmp_path / "s"
    write(folder, some_records(100))
    size = int((folder / "data.mdb").stat().st_size * share)
    said = said_of_a_cut_file(folder, size, "list(read(folder))")
    assert said.startswith(f"prep.store.manifest.StoreError: {folder}")


def with_keys(numbers: list[int]) -> list[tuple[bytes, bytes]]:
    return [(record_key(number), value) for number, (_, value) in zip(numbers, some_records(len(numbers)), strict=True)]


def open_handles(folder: Path) -> int:
    """How often the LMDB at `folder` is open in this process."""
    gc.collect()
    found = 0
    for handle in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{handle}") == os.path.realpath(folder / "data.mdb")
        except OSError:
            continue
    return found


@pytest.mark.parametrize(
    "numbers",
    [
        [0],
        list(range(50)),
        list(range(700, 760)),
        ([0, 2, 3]),
        ([5, 6, 8]),
        ([1, 3, 4, 9, 10, 99_999_999]),
        [k for k in range(300) if k % 7],
        [],
    ],
    ids=lambda numbers: f"{len(numbers)}-from-{min(numbers, default=0)}",
)
def test_a_reader_finds_by_place_what_was_written_in_that_place(tmp_path: Path, numbers: list[int]) -> None:
    records = with_keys(numbers)
    write(tmp_path / "s", records)
    reader = ShardReader(tmp_path / "s", len(numbers))
    backwards = [(reader.key(place), bytes(reader[place])) for place in reversed(range(len(numbers)))]
    assert backwards[::-1] == records == list(read(tmp_path / "s"))
    reader.close()
    assert open_handles(tmp_path / "s") == 0


def test_a_reader_copies_nothing(tmp_path: Path) -> None:
    write(tmp_path / "s", some_records(30))
    reader = ShardReader(tmp_path / "s", 30)
    assert all(isinstance(reader[place], memoryview) and reader[place].readonly for place in range(30))
    addresses = [np.frombuffer(reader[7], np.uint8).ctypes.data for _ in range(2)]
    assert addresses[0] == addresses[1]
    reader.close()


@pytest.mark.parametrize("promised", [0, 29, 31])
def test_a_reader_refuses_another_number_of_records(tmp_path: Path, promised: int) -> None:
    write(tmp_path / "s", some_records(30))
    with pytest.raises(StoreError, match=f"30 records, the manifest says {promised}. mend it") as refused:
        ShardReader(tmp_path / "s", promised, "mend it")
    assert refused.value and open_handles(tmp_path / "s") == 0  # though the error is kept


def test_a_key_that_is_missing_between_others_is_named(tmp_path: Path) -> None:
    """As many keys as there should be, the first and the last right."""
    with lmdb.open(str(tmp_path / "s"), map_size=1 << 20, lock=False) as env, env.begin(write=True) as txn:
        for key in (b"00000000", b"000000005", b"00000002"):
            txn.put(key, key)
    reader = ShardReader(tmp_path / "s", 3, "mend it")
    assert bytes(reader[2]) == b"00000002"
    with pytest.raises(StoreError, match=r"00000001\. mend it"):
        reader[1]
    reader.close()


def test_readers_of_one_shard_share_it_until_the_last_is_closed(tmp_path: Path) -> None:
    """Also by another path, and beside `read`: LMDB allows a file to be opened once in a process."""
    records = some_records(40)
    write(tmp_path / "s", records)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    first, second, third = (ShardReader(tmp_path / name, 40) for name in ("s", "link", "s"))
    assert open_handles(tmp_path / "s") == 1
    passing = read(tmp_path / "link")
    assert next(passing) == records[0]
    for gone in (first, third):
        gone.close()
        assert [bytes(second[place]) for place in range(40)] == [value for _, value in records]
    second.close()
    second.close()
    assert list(passing) == records[1:]
    assert open_handles(tmp_path / "s") == 0
    again = ShardReader(tmp_path / "s", 40)
    assert bytes(again[39]) == records[39][1]
    again.close()


def test_threads_read_one_shard_at_once(tmp_path: Path) -> None:
    records = some_records(200)
    write(tmp_path / "s", records)
    reader = ShardReader(tmp_path / "s", 200)

    def some(seed: int) -> bool:
        places = np.random.default_rng(seed).integers(0, 200, 2000).tolist()
        return all(reader[place] == records[place][1] for place in places)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(some, range(8)))
    reader.close()


def test_a_shard_that_was_replaced_is_read_anew(tmp_path: Path) -> None:
    for seed in range(3):
        records = some_records(20, seed)
        write(tmp_path / "s", records)
        reader = ShardReader(tmp_path / "s", 20)
        assert [bytes(reader[place]) for place in range(20)] == [value for _, value in records]
        reader.close()
        shutil.rmtree(tmp_path / "s")


def test_a_reader_names_what_is_no_lmdb(no_lmdb: Path) -> None:
    with pytest.raises(StoreError, match=str(no_lmdb)):
        ShardReader(no_lmdb, 3)
    assert open_handles(no_lmdb) == 0


def test_damaged_pages_are_a_store_error_to_a_reader(tmp_path: Path) -> None:
    """Each page but the two of the header is overwritten in its turn; a record that is found may be damaged."""
    folder = tmp_path / "s"
    write(folder, some_records(60))
    content = (folder / "data.mdb").read_bytes()
    refused = 0
    for page in range(2, len(content) // 4096):
        (folder / "data.mdb").write_bytes(content[: page * 4096] + b"\xff" * 4096 + content[(page + 1) * 4096 :])
        try:
            reader = ShardReader(folder, 60)
            for place in range(60):
                len(reader[place])
            reader.close()
        except StoreError as error:
            assert str(error).startswith(str(folder))
            refused += 1
    assert refused


@pytest.mark.parametrize("cut", [1, 4096, 100_000])
def test_a_reader_refuses_a_file_that_was_cut(tmp_path: Path, cut: int) -> None:
    """Be it by one byte."""
    folder = tmp_path / "s"
    write(folder, some_records(100))
    size = (folder / "data.mdb").stat().st_size - cut
    program = "reader = ShardReader(folder, 100)\nprint(sum(bytes(reader[k])[-1] for k in range(100) if reader[k]))"
    said = said_of_a_cut_file(folder, size, program)
    assert said.startswith(f"prep.store.manifest.StoreError: {folder}")

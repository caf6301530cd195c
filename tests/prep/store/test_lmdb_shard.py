"""prep.store.lmdb_shard is compared with the lmdb library, and its digest with hashlib.

In some tests of ShardReader, the keys are not consecutive numbers, as in a store whose build left inputs out.
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


def random_records(count: int, seed: int = 0) -> list[tuple[bytes, bytes]]:
    rng = np.random.default_rng(seed)
    return [(f"{i:08d}".encode(), rng.bytes(int(rng.integers(0, 9000)))) for i in range(count)]


def read_with_lmdb(folder: Path) -> list[tuple[bytes, bytes]]:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as txn:
        assert txn.stat()["entries"] == env.stat()["entries"]
        return [(bytes(key), bytes(value)) for key, value in txn.cursor()]


def test_keys_sort_as_numbers() -> None:
    numbers = [0, 1, 9, 10, 99, 100, 4095, 4096, 1_281_166, 99_999_999]
    keys = [record_key(number) for number in numbers]
    assert keys == sorted(keys)
    assert all(len(key) == 8 for key in keys)
    assert [int(key) for key in keys] == numbers


def test_written_records_are_in_the_lmdb(tmp_path: Path) -> None:
    records = random_records(150)
    folder = tmp_path / "train" / "00000"
    count, size, _ = write(folder, iter(records))
    assert read_with_lmdb(folder) == records
    assert count == 150
    assert size == sum(len(value) for _, value in records)
    assert [path.name for path in folder.iterdir()] == ["data.mdb"]  # no lock file is left


def test_written_records_are_read_back(tmp_path: Path) -> None:
    records = random_records(40)
    write(tmp_path / "s", records)
    assert list(read(tmp_path / "s")) == records
    assert list(read(tmp_path / "s")) == records  # the records can be read twice


def test_an_lmdb_written_in_another_way_is_read_in_key_order(tmp_path: Path) -> None:
    records = random_records(20)
    with lmdb.open(str(tmp_path / "s"), map_size=1 << 24) as env, env.begin(write=True) as txn:
        for key, value in reversed(records):
            txn.put(key, value)
    assert list(read(tmp_path / "s")) == records


def test_the_digest_is_sha256_of_keys_lengths_and_values(tmp_path: Path) -> None:
    records = random_records(50)
    expected = hashlib.sha256(b"".join(k + len(v).to_bytes(8, "little") + v for k, v in records)).hexdigest()
    assert write(tmp_path / "a", records)[2] == expected


def test_the_digest_depends_on_order_keys_and_record_boundaries(tmp_path: Path) -> None:
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
    """The 150 MB of records are more than twice the initial map size. One record has 80 MB.

    The file must have little unused space.
    """
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
            for number, (key, stored) in enumerate(txn.cursor()):
                assert int(key) == number
                assert stored == value(number)
            assert number == len(sizes) - 1
    finally:
        shutil.rmtree(folder)


def test_an_exception_of_the_iterator_of_records_is_raised(tmp_path: Path) -> None:
    def broken() -> Iterator[tuple[bytes, bytes]]:
        yield b"00000000", b"x"
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write(tmp_path / "s", broken())


@pytest.fixture(params=[None, b"", b"x" * 100, b"not an lmdb" * 2000], ids=["absent", "empty", "short", "long"])
def not_an_lmdb(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder that does not exist, or whose data.mdb is not an LMDB file."""
    folder = tmp_path / "s"
    if request.param is not None:
        folder.mkdir()
        (folder / "data.mdb").write_bytes(request.param)
    return folder


def test_a_folder_that_is_not_an_lmdb_is_named(not_an_lmdb: Path) -> None:
    existed = not_an_lmdb.exists()
    with pytest.raises(StoreError, match=str(not_an_lmdb)):
        list(read(not_an_lmdb))
    assert not_an_lmdb.exists() == existed


def test_reading_damaged_pages_raises_store_error(tmp_path: Path) -> None:
    """All pages except the two header pages are overwritten."""
    folder = tmp_path / "s"
    write(folder, random_records(50))
    file = folder / "data.mdb"
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    with pytest.raises(StoreError, match=str(folder)):
        list(read(folder))


def error_of_truncated_file(folder: Path, size: int, program: str) -> str:
    """Truncate data.mdb, run `program`, and return the last line of its standard error.

    The program runs in a separate process, because reading a map beyond the end of its file kills the process (SIGBUS).
    """
    os.truncate(folder / "data.mdb", size)
    program = (
        "import sys, pathlib; from prep.store.lmdb_shard import ShardReader, read\nfolder = pathlib.Path(sys.argv[1])\n"
        + program
    )
    ended = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1, ended
    return ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_reading_a_truncated_file_raises_store_error(tmp_path: Path, share: float) -> None:
    """An interrupted copy leaves a truncated file."""
    folder = tmp_path / "s"
    write(folder, random_records(100))
    size = int((folder / "data.mdb").stat().st_size * share)
    error = error_of_truncated_file(folder, size, "list(read(folder))")
    assert error.startswith(f"prep.store.manifest.StoreError: {folder}")


def records_with_keys(numbers: list[int]) -> list[tuple[bytes, bytes]]:
    return [
        (record_key(number), value) for number, (_, value) in zip(numbers, random_records(len(numbers)), strict=True)
    ]


def open_handles(folder: Path) -> int:
    """Return the number of open file handles of the LMDB at `folder` in this process."""
    gc.collect()
    count = 0
    for handle in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{handle}") == os.path.realpath(folder / "data.mdb")
        except OSError:
            continue
    return count


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
def test_a_reader_returns_the_record_written_at_each_index(tmp_path: Path, numbers: list[int]) -> None:
    records = records_with_keys(numbers)
    write(tmp_path / "s", records)
    reader = ShardReader(tmp_path / "s", len(numbers))
    backwards = [(reader.key(index), bytes(reader[index])) for index in reversed(range(len(numbers)))]
    assert backwards[::-1] == records == list(read(tmp_path / "s"))
    reader.close()
    assert open_handles(tmp_path / "s") == 0


def test_a_reader_returns_views_without_a_copy(tmp_path: Path) -> None:
    write(tmp_path / "s", random_records(30))
    reader = ShardReader(tmp_path / "s", 30)
    assert all(isinstance(reader[index], memoryview) and reader[index].readonly for index in range(30))
    addresses = [np.frombuffer(reader[7], np.uint8).ctypes.data for _ in range(2)]
    assert addresses[0] == addresses[1]
    reader.close()


@pytest.mark.parametrize("expected", [0, 29, 31])
def test_a_reader_refuses_a_wrong_number_of_records(tmp_path: Path, expected: int) -> None:
    write(tmp_path / "s", random_records(30))
    with pytest.raises(StoreError, match=f"30 records, the manifest says {expected}. ADVICE") as refused:
        ShardReader(tmp_path / "s", expected, "ADVICE")
    # The file is closed although `refused` still refers to the reader.
    assert refused.value and open_handles(tmp_path / "s") == 0


def test_a_missing_key_between_others_is_named(tmp_path: Path) -> None:
    """The number of keys, the first key and the last key are right, but a key between them is missing."""
    with lmdb.open(str(tmp_path / "s"), map_size=1 << 20, lock=False) as env, env.begin(write=True) as txn:
        for key in (b"00000000", b"000000005", b"00000002"):
            txn.put(key, key)
    reader = ShardReader(tmp_path / "s", 3, "ADVICE")
    assert bytes(reader[2]) == b"00000002"
    with pytest.raises(StoreError, match=r"00000001\. ADVICE"):
        reader[1]
    reader.close()


def test_readers_of_one_shard_are_independent(tmp_path: Path) -> None:
    """`read` and several readers may use one shard at the same time, also through a symbolic link."""
    records = random_records(40)
    write(tmp_path / "s", records)
    (tmp_path / "link").symlink_to(tmp_path / "s")
    first, second, third = (ShardReader(tmp_path / name, 40) for name in ("s", "link", "s"))
    iterator = read(tmp_path / "link")
    assert next(iterator) == records[0]
    for reader in (first, third):
        reader.close()
        assert [bytes(second[index]) for index in range(40)] == [value for _, value in records]
    second.close()
    second.close()
    assert list(iterator) == records[1:]
    assert open_handles(tmp_path / "s") == 0


def test_threads_read_one_shard_concurrently(tmp_path: Path) -> None:
    records = random_records(200)
    write(tmp_path / "s", records)
    reader = ShardReader(tmp_path / "s", 200)

    def reads_are_right(seed: int) -> bool:
        indices = np.random.default_rng(seed).integers(0, 200, 2000).tolist()
        return all(reader[index] == records[index][1] for index in indices)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(reads_are_right, range(8)))
    reader.close()


def test_a_replaced_shard_is_opened_again(tmp_path: Path) -> None:
    for seed in range(3):
        records = random_records(20, seed)
        write(tmp_path / "s", records)
        reader = ShardReader(tmp_path / "s", 20)
        assert [bytes(reader[index]) for index in range(20)] == [value for _, value in records]
        reader.close()
        shutil.rmtree(tmp_path / "s")


def test_a_reader_names_a_folder_that_is_not_an_lmdb(not_an_lmdb: Path) -> None:
    with pytest.raises(StoreError, match=str(not_an_lmdb)):
        ShardReader(not_an_lmdb, 3)
    assert open_handles(not_an_lmdb) == 0


def test_a_reader_of_damaged_pages_raises_store_error_or_nothing(tmp_path: Path) -> None:
    """The test overwrites one page at a time, but no header page. A reader may return a damaged record."""
    folder = tmp_path / "s"
    write(folder, random_records(60))
    content = (folder / "data.mdb").read_bytes()
    refused = 0
    for page in range(2, len(content) // 4096):
        (folder / "data.mdb").write_bytes(content[: page * 4096] + b"\xff" * 4096 + content[(page + 1) * 4096 :])
        try:
            reader = ShardReader(folder, 60)
            for index in range(60):
                len(reader[index])
            reader.close()
        except StoreError as error:
            assert str(error).startswith(str(folder))
            refused += 1
    assert refused


@pytest.mark.parametrize("cut", [1, 4096, 100_000])
def test_a_reader_refuses_a_truncated_file(tmp_path: Path, cut: int) -> None:
    """A file is refused even if only one byte is missing."""
    folder = tmp_path / "s"
    write(folder, random_records(100))
    size = (folder / "data.mdb").stat().st_size - cut
    program = "reader = ShardReader(folder, 100)\nprint(sum(bytes(reader[k])[-1] for k in range(100) if reader[k]))"
    error = error_of_truncated_file(folder, size, program)
    assert error.startswith(f"prep.store.manifest.StoreError: {folder}")

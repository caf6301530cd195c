"""The search for records in mapped LMDB files is compared with py-lmdb and locate_image, also for damaged files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lmdb
import numpy as np
import pytest

from prep import compiled
from prep.store import kernels, lmdb_shard
from prep.store.datum import Datum, DatumError, locate_image
from prep.store.lmdb_file import LmdbFile
from prep.store.lmdb_shard import ShardReader
from tests.conftest import compile_changed

needs_kernels = pytest.mark.skipif(kernels.native is None, reason="the kernels were not compiled")


def datum(number: int, size: int) -> bytes:
    data = np.random.default_rng(number).bytes(size)
    return Datum(256 + number % 300, 256, data, number % 1000, b"class/%d.jpg" % number).encode()


def find(reader: ShardReader, numbers: list[int]) -> list[tuple[int, ...]]:
    """Return (address of the image, size in bytes, height, width, label) of the records at these indices."""
    assert kernels.native
    shards = np.array([reader.map_entry()], kernels.SHARD_DTYPE)
    shard_of = np.zeros(len(numbers), np.int64)
    found: list[tuple[int, ...]] = kernels.native.find_records(
        shards, shard_of, reader.key_numbers(np.array(numbers, np.int64))
    ).tolist()
    return found


@needs_kernels
@pytest.mark.parametrize(
    ("count", "size", "step"),
    [(1, 30_000, 1), (1, 5, 1), (200, 9_000, 1), (300, 40, 1), (5_000, 20, 1), (30_000, 3, 7), (400, 2_000, 3)],
)
def test_every_record_is_found_as_py_lmdb_finds_it(tmp_path: Path, count: int, size: int, step: int) -> None:
    """LMDB stores short values in leaf pages, and long values in pages of their own. The trees have 1 to 3 levels."""
    keys = [5 + step * k for k in range(count)]
    lmdb_shard.write(tmp_path / "s", [(b"%08d" % key, datum(key, size + key % 70)) for key in keys])
    reader = ShardReader(tmp_path / "s", count)
    order = np.random.default_rng(0).permutation(count).tolist()
    base, size_bytes = reader.map_entry()[:2]
    content = (tmp_path / "s" / "data.mdb").read_bytes()
    assert size_bytes == len(content)
    for index, (image, image_bytes, *numbers) in zip(order, find(reader, order), strict=True):
        value = reader[index]
        start, end, *expected = locate_image(value)
        assert numbers == expected and image
        assert content[image - base : image - base + image_bytes] == value[start:end]
    reader.close()


@needs_kernels
def test_missing_and_unusual_keys_are_not_found(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path / "s"), map_size=1 << 20, lock=False) as env, env.begin(write=True) as txn:
        for key in (b"00000000", b"0000000", b"000000012", b"0000000/", b"abc"):
            txn.put(key, datum(1, 30))
    with LmdbFile(tmp_path / "s", "") as file:
        tree = file.pages.tree
    assert kernels.native
    content = np.fromfile(tmp_path / "s" / "data.mdb", np.uint8)
    shards = np.array([(content.ctypes.data, len(content), tree.page_bytes, tree.root)], kernels.SHARD_DTYPE)
    keys = np.array([0, 1, 12, -1, 10**8, 99_999_999, -(10**9)])
    found = kernels.native.find_records(shards, np.zeros(len(keys), np.int64), keys)
    assert (found["image"] != 0).tolist() == [True] + 6 * [False]
    shards["root"] = -1
    assert not kernels.native.find_records(shards, np.zeros(len(keys), np.int64), keys)["image"].any()


@needs_kernels
def test_the_tree_of_the_last_transaction_is_used(tmp_path: Path) -> None:
    """Each transaction of LMDB writes one of the two header pages, alternately."""
    lmdb_shard.write(tmp_path / "s", [(b"%08d" % k, datum(k, 20)) for k in range(3)])
    for label in range(4):
        with lmdb.open(str(tmp_path / "s"), map_size=1 << 20, lock=False) as env, env.begin(write=True) as txn:
            txn.put(b"00000001", Datum(256, 256, b"new", label, b"").encode())
        reader = ShardReader(tmp_path / "s", 3)
        assert find(reader, [1])[0][1:] == (3, 256, 256, label)
        reader.close()


@needs_kernels
def test_a_record_of_another_format_is_not_found(tmp_path: Path) -> None:
    """Records are changed at random. The search finds a record if and only if locate_image accepts the record."""
    rng, values = np.random.default_rng(4), []
    for k in range(3_000):
        value = bytearray(datum(k, 30))
        for _ in range(k % 3):
            value[rng.integers(0, 50)] = int(rng.choice([0, 1, 8, 16, 24, 34, 40, 127, 128, 255]))
        values.append(bytes(value[: rng.integers(0, len(value))] if k % 5 == 0 else value))
    lmdb_shard.write(tmp_path / "s", [(b"%08d" % k, value) for k, value in enumerate(values)])
    reader = ShardReader(tmp_path / "s", len(values))
    for k, (image, size, *numbers) in enumerate(find(reader, list(range(len(values))))):
        try:
            start, end, *expected = locate_image(memoryview(values[k]))
        except DatumError:
            assert image == 0
        else:
            assert image and [size, *numbers] == [end - start, *expected]
    reader.close()


@needs_kernels
def test_damaged_files_are_searched_without_a_crash() -> None:
    """Random bytes of a file are changed. In memory, a protected page follows the file.

    A read beyond the end of the file therefore kills the process.
    """
    program = """
import ctypes, mmap, os, sys, tempfile, numpy as np
from pathlib import Path
from prep.store import kernels, lmdb_shard
from prep.store.datum import Datum
from prep.store.lmdb_file import LmdbFile
libc, page = ctypes.CDLL(None), mmap.PAGESIZE
rng, read = np.random.default_rng(0), 0
with tempfile.TemporaryDirectory() as folder:
    for size in (3, 6000):
        path = Path(folder, str(size))
        items = [(b"%08d" % k, Datum(256, 256, bytes(size), k, b"x").encode()) for k in range(700)]
        lmdb_shard.write(path, items)
        content = np.fromfile(path / "data.mdb", np.uint8)
        pages = len(content) // page
        area = mmap.mmap(-1, (pages + 1) * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(area))
        assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, 0) == 0
        copy = np.frombuffer(area, np.uint8, len(content))
        with LmdbFile(path, "") as file:
            tree = file.pages.tree
        shards = np.array([(start, len(content), page, tree.root)], kernels.SHARD_DTYPE)
        keys = np.arange(700)
        headers = [k for k in range(2, pages) if content[k * page + 10] in (1, 2)]
        for turn in range(1500):
            copy[:] = content
            first = rng.choice(headers) * page
            spread = 40 if turn % 2 else page
            for at in first + rng.integers(0, spread, 1 + turn % 7):
                copy[at] = rng.choice([0, 1, 2, 15, 16, 127, 128, 254, 255])
            shards["root"] = tree.root if turn % 3 else rng.integers(-2, pages + 2)
            found = kernels.native.find_records(shards, np.zeros(700, np.int64), keys)
            hit = found[found["image"] != 0]
            image, size_ = hit["image"].astype(np.int64), hit["bytes"]
            assert ((image >= start) & (size_ >= 0) & (image + size_ <= start + len(content))).all()
            read += len(hit)
print(read)
sys.stdout.flush()
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) > 10_000, (done.returncode, done.stdout, done.stderr)


@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("PAGE_HEADER = 16", "PAGE_HEADER = 18"),
        ("u32(at) | u16(at + 4) << 32", "u32(at) + 1 | u16(at + 4) << 32"),
        ("if (compare(at, key) != 0)", "if (0)"),
        ("value = s->map + number * s->page_bytes + PAGE_HEADER", "value = s->map + number * s->page_bytes"),
        ("*size <= s->map + s->bytes - value ?", "1 ?"),
        ("shift += 7", "shift += 8"),
        ("*at++ == 0x28 && (out->label", "*at++ >= 0 && (out->label"),
        ("r->image = 0", "r->bytes = 0"),
        ("0x1c6e41596, 0x154442bd4", "0x1c6e41597, 0x154442bd4"),
        ("crc_of_byte[k - 1][b] >> 8", "crc_of_byte[k - 1][b] >> 7"),
    ],
)
def test_a_library_that_searches_wrongly_is_not_used(tmp_path: Path, right: str, wrong: str) -> None:
    library = compile_changed(kernels.SOURCE, tmp_path, right, wrong)
    assert compiled.load(library, kernels.NativeKernels, kernels.is_correct) is None

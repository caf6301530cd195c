"""Fuzzing of the files of a store: each reader returns a value or raises an error of one line.

Hypothesis changes bytes and fields of the files of a small store, as tests/fuzzing.py describes.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest

from pipeline.records import Records
from prep.images.codec import BadImage, decode_image
from prep.images.jpeg import decode_jpeg
from prep.remote.journal import read_arrivals, read_source
from prep.remote.urls import open_folder
from prep.store import kernels, lmdb_shard
from prep.store.datum import Datum, DatumError, locate_image
from prep.store.input_log import read_outcomes
from prep.store.lmdb_file import LmdbFile
from prep.store.manifest import Store
from tests.fuzzing import changed_bytes, changed_json, examples, reader_of, try_files


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    """A copy of the test store, into which a test may write."""
    return Path(shutil.copytree(store, tmp_path / "store"))


def read_all(store: Path) -> None:
    """Open a store, and use all fields of its manifest that the streams use."""
    opened = Store.open(store)
    for split in opened.splits:
        opened.shard_paths(split)
        Records(opened, split).close()
    assert opened.fingerprint


@examples(60, 5_000)
def test_manifest(count: int, copy: Path) -> None:
    path = copy / "manifest.json"
    try_files(changed_json(json.loads(path.read_bytes())), count, reader_of(path, lambda: read_all(copy)))


@examples(60, 5_000)
def test_colour_statistics(count: int, copy: Path) -> None:
    path, opened = copy / "train" / "colour.json", Store.open(copy)
    read = reader_of(path, lambda: opened.color_stats("train").channel_stats())
    try_files(changed_json(json.loads(path.read_bytes())), count, read)


@examples(60, 5_000)
def test_mean_image(count: int, copy: Path) -> None:
    path, opened = copy / "train" / "mean_image.npy", Store.open(copy)
    head, rest = path.read_bytes()[:200], path.read_bytes()[200:]
    try_files(changed_bytes(head), count, lambda content: reader_of(path, opened.mean_image)(content + rest))


@examples(60, 5_000)
def test_log_of_inputs(count: int, copy: Path) -> None:
    path = copy / "train" / "inputs.jsonl"
    line = json.loads(path.read_text().splitlines()[0])
    read = reader_of(path, lambda: list(read_outcomes(path)))
    try_files(changed_json(line), count, read)


@examples(30, 5_000)
def test_journal_of_a_copy(count: int, tmp_path: Path) -> None:
    entry = tmp_path / ".copy" / "train" / "file.json"
    entry.parent.mkdir(parents=True)
    folder = open_folder(str(tmp_path))
    arrival = {"size_bytes": 7, "version": "1", "sha256": "0" * 64}
    try_files(changed_json(arrival), count, reader_of(entry, lambda: read_arrivals(folder, ["train/file"])))
    source = {"manifest": "0" * 64, "fingerprint": "1" * 64, "name": "store"}
    try_files(changed_json(source), count, reader_of(entry.parents[1] / "source.json", lambda: read_source(folder)))


def a_record(store: Path) -> bytes:
    """Return the first record of the split train."""
    return next(iter(lmdb_shard.read(store / "train" / "00000")))[1]


@examples(150, 50_000)
def test_record(count: int, store: Path) -> None:
    """The test calls both parsers of records: the parser that checks all fields, and the parser of the streams."""
    value = a_record(store)
    at = value.index(b"\xff\xd8\xff")
    head, rest = value[: at + 4], value[at + 4 :]

    def read(content: bytes) -> None:
        record = content + rest
        try:
            span = locate_image(memoryview(record))
            assert 0 <= span.start <= len(record) and min(span.height, span.width, span.label) >= 0
        except DatumError:
            pass
        Datum.decode(record)

    try_files(changed_bytes(head), count, read, DatumError)


@examples(150, 50_000)
def test_fields_of_a_record_with_a_correct_checksum(count: int, store: Path) -> None:
    value = a_record(store)
    body = value[:40] + value[-60:-6]

    def read(content: bytes) -> None:
        Datum.decode(content + b"\xd5\x3e" + zlib.crc32(content).to_bytes(4, "little"))

    try_files(changed_bytes(body), count, read, DatumError)


@examples(100, 20_000)
def test_image_in_a_record(count: int, store: Path) -> None:
    """The test calls the decoders of the stream and of the build. A decoded image must have three dimensions."""
    image = Datum.decode(a_record(store)).data

    def read(content: bytes) -> None:
        try:
            decode_jpeg(content)
        except ValueError:
            pass
        assert decode_image(content).pixels.ndim == 3

    try_files(changed_bytes(image), count, read, BadImage)


@examples(100, 20_000)
def test_search_in_the_pages_of_a_shard(count: int, store: Path) -> None:
    """Whatever the pages contain, the search must not find a record that lies outside of the file."""
    if kernels.native is None:
        pytest.skip("the C kernels are not compiled")
    content = (store / "train" / "00000" / "data.mdb").read_bytes()
    page = 4096
    with LmdbFile(store / "train" / "00000", "") as file:
        root = file.pages.tree.root
    buffer = (ctypes.c_char * len(content))()
    address = ctypes.addressof(buffer)
    shards = np.array([(address, len(content), page, root)], kernels.SHARD_DTYPE)
    keys = np.arange(30)
    # Find the pages of the tree: the flags of a branch page are 1, and the flags of a leaf page are 2.
    pages = [
        n for n in range(2, len(content) // page) if content[n * page + 10] in (1, 2) and content[n * page + 11] == 0
    ]
    heads = b"".join(content[n * page : n * page + 400] for n in pages)

    def read(changed: bytes) -> None:
        pieces = bytearray(content)
        for index, n in enumerate(pages):
            part = changed[400 * index : 400 * (index + 1)]
            pieces[n * page : n * page + len(part)] = part
        buffer.raw = bytes(pieces)
        assert kernels.native is not None
        found = kernels.native.find_records(shards, np.zeros(len(keys), np.int64), keys)
        for record in found[found["image"] != 0]:
            start = int(record["image"]) - address
            assert 0 <= start <= start + int(record["bytes"]) <= len(content)
            assert min(int(record[name]) for name in ("bytes", "height", "width", "label")) >= 0

    try_files(changed_bytes(heads), count, read)

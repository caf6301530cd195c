"""Tests of windows (the decoded crops of a batch): pixels, errors for damaged records, and blocks of batches.

A loader with a service fetches blocks of consecutive batches. In these tests, a local WindowMaker replaces the service.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.engines import kernels
from pipeline.service import source
from pipeline.service.protocol import StreamKey, block_steps
from pipeline.service.worker import BlockMemory
from pipeline.windows import WindowMaker, WindowRequest, Windows
from prep.store.manifest import Store, StoreError
from tests.pipeline.test_damaged_store import DAMAGE, change


@pytest.fixture(params=["jpeg", "jpeg-whole", "ppm", "ppm-whole"])
def any_store(stores: dict[str, Path], request: pytest.FixtureRequest) -> Path:
    return stores[request.param]


@pytest.fixture
def maker(any_store: Path) -> Iterator[WindowMaker]:
    made = WindowMaker(Store.open(any_store), 2)
    yield made
    made.close()


def request(seed: int, count: int, window_px: int, split: str = "train") -> WindowRequest:
    rng = np.random.default_rng(seed)
    offset = rng.integers(0, 256 - window_px, (count, 2), np.int32, endpoint=True)
    return WindowRequest(split, rng.integers(0, 12, count), offset, window_px)


@pytest.mark.parametrize("window_px", [1, 17, 224, 256])
def test_windows_are_the_pixels_that_pillow_decodes(
    any_store: Path, maker: WindowMaker, records_of: Callable[[Path, str], list[tuple[bytes, Any]]], window_px: int
) -> None:
    """Pixels may differ from Pillow's by up to 3 grey levels, because Pillow may contain another version of libjpeg."""
    # The records are read first, because LMDB opens a file only once in a process.
    datums = [datum for _, datum in records_of(any_store, "train")]
    wanted = request(window_px, 20, window_px)
    windows = maker.make(wanted)
    windows_by_record = zip(windows.pixels, windows.labels, wanted.numbers, wanted.offset, strict=True)
    for pixels, label, number, (row, column) in windows_by_record:
        picture = Image.open(io.BytesIO(datums[number].data)).convert("RGB")
        top, left = (picture.height - 256) // 2 + row, (picture.width - 256) // 2 + column
        expected = np.asarray(picture)[top : top + window_px, left : left + window_px]
        assert np.abs(pixels.astype(int) - expected).max() <= (3 if picture.format == "JPEG" else 0)
        assert label == datums[number].label


@pytest.mark.parametrize("window_px", [3, 224, 256])
def test_without_the_kernel_the_windows_are_the_same(
    maker: WindowMaker, monkeypatch: pytest.MonkeyPatch, window_px: int
) -> None:
    assert kernels.native is not None
    wanted = request(5, 20, window_px)
    with_kernel = maker.make(wanted)
    monkeypatch.setattr(kernels, "native", None)
    without_kernel = maker.make(wanted)
    assert np.array_equal(with_kernel.pixels, without_kernel.pixels)
    assert np.array_equal(with_kernel.labels, without_kernel.labels)


@pytest.mark.parametrize("without_kernel", [False, True])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, without_kernel: bool
) -> None:
    if without_kernel:
        monkeypatch.setattr(kernels, "native", None)
    store = Path(shutil.copytree(stores["jpeg"], tmp_path / "store"))
    key, _ = change(store, "val", 3, DAMAGE[damage])
    made = WindowMaker(Store.open(store), 2)
    with pytest.raises(StoreError, match=re.escape(f"{store}/val/00000, key {key}")):
        made.make(WindowRequest("val", np.array([1, 3, 2]), np.zeros((3, 2), np.int32), 224))
    made.close()


def test_windows_become_records_of_the_same_pixels_without_a_copy(maker: WindowMaker) -> None:
    wanted = request(9, 5, 224, "val")
    windows = maker.make(wanted)
    records = windows.records(wanted.numbers)
    assert records.is_raw and np.array_equal(records.numbers, wanted.numbers)
    for pixels, payload in zip(windows.pixels, records.payloads(), strict=True):
        assert np.shares_memory(pixels, payload) and np.array_equal(pixels.ravel(), payload.ravel())


# The 11 batches of the stream are divided into blocks of 4, 4 and 3 batches. The last batch has one image.
BATCH, BATCHES, BLOCK = 3, 11, 4
KEY = StreamKey(1, "train", "0123", 0, BATCH, 0, 1, "random", 1)


class LocalClient:
    """Replaces ServiceClient: makes the blocks that a WindowSource fetches, and records them in `fetched`."""

    def __init__(self, maker: WindowMaker) -> None:
        self.block_steps, self.maker = BLOCK, maker
        self.fetched: list[tuple[int, int]] = []  # (position of the first batch, number of batches)

    def start(self, position: int) -> None:
        self.fetched.clear()

    def fetch(self, position: int, requests: Sequence[WindowRequest]) -> Windows:
        self.fetched.append((position, len(requests)))
        windows = self.maker.make(WindowRequest.joined(requests))
        windows.labels.flags.writeable = False  # the arrays are read-only, like the arrays that Ray returns
        return windows


def request_at(position: int) -> WindowRequest | None:
    """Return the request of batch `position` of the stream, or None after the last batch."""
    last = position == BATCHES - 1
    return request(position, 1 if last else BATCH, 224) if 0 <= position < BATCHES else None


@pytest.fixture
def open_source(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[WindowMaker, Path], tuple[source.WindowSource, LocalClient]]:
    def open_store(maker: WindowMaker, store: Path) -> tuple[source.WindowSource, LocalClient]:
        client = LocalClient(maker)
        monkeypatch.setattr(source, "ServiceClient", lambda *_: client)
        return source.WindowSource("name", KEY, Store.open(store), 1, lambda: 0.0, None, request_at), client

    return open_store


OpenSource = Callable[[WindowMaker, Path], tuple[source.WindowSource, LocalClient]]


@pytest.mark.parametrize(
    ("first", "fetched"),
    [(0, [(0, 4), (4, 4), (8, 3)]), (4, [(4, 4), (8, 3)]), (6, [(6, 2), (8, 3)]), (10, [(10, 1)])],
)
def test_each_block_is_fetched_once_and_its_batches_are_those_of_their_own_requests(
    open_source: OpenSource, maker: WindowMaker, any_store: Path, first: int, fetched: list[tuple[int, int]]
) -> None:
    """Twelve threads ask for all batches at the same time, twice. The second time, all batches are fetched again."""
    windows, client = open_source(maker, any_store)
    positions = range(first, BATCHES)
    for _ in range(2):
        windows.start(first)
        with ThreadPoolExecutor(12) as pool:
            served = list(pool.map(windows.records, positions))
        for position, records in zip(positions, served, strict=True):
            alone = request_at(position)
            assert alone is not None
            expected = maker.make(alone)
            assert np.array_equal(records.numbers, alone.numbers)
            assert np.array_equal(records.labels, expected.labels) and records.labels.flags.writeable
            pixels = np.stack([payload.reshape(224, 224, 3) for payload in records.payloads()])
            assert np.array_equal(pixels, expected.pixels)
        assert sorted(client.fetched) == fetched


def test_only_the_batches_with_the_damaged_record_of_a_block_fail(
    open_source: OpenSource, stores: dict[str, Path], tmp_path: Path
) -> None:
    store = Path(shutil.copytree(stores["jpeg"], tmp_path / "store"))
    requests = [request_at(position) for position in range(BLOCK)]
    number = int(requests[1].numbers[0])  # type: ignore[union-attr]
    key, _ = change(store, "train", number, DAMAGE["flipped bit"])
    maker = WindowMaker(Store.open(store), 1)
    windows, _ = open_source(maker, store)
    windows.start(0)
    failed = []
    for position in range(BLOCK):
        try:
            assert len(windows.records(position).numbers) == BATCH
        except StoreError as error:
            assert f"key {key}" in str(error)
            failed.append(position)
    assert failed == [p for p in range(BLOCK) if number in requests[p].numbers]  # type: ignore[union-attr]
    assert 0 < len(failed) < BLOCK
    maker.close()


@pytest.mark.parametrize(
    ("batch_size", "ahead", "max_workers", "steps"),
    [
        (128, 16, 2, 4),  # 512 images
        (128, 16, 3, 2),  # there are at least two blocks for each worker
        (128, 16, 16, 1),
        (128, 128, 16, 4),
        (128, 1, 1, 1),
        (4, 16, 1, 8),
        (513, 16, 1, 1),
    ],
)
def test_size_of_a_block(batch_size: int, ahead: int, max_workers: int, steps: int) -> None:
    assert block_steps(batch_size, ahead, max_workers) == steps


def test_the_memory_of_a_block_is_used_again_only_after_the_block_was_deleted() -> None:
    memory = BlockMemory()
    first, second = memory.array((4, 32, 32, 3)), memory.array((4, 32, 32, 3))
    first[:], second[:] = 1, 2
    assert (first == 1).all() and not np.shares_memory(first, second)
    address = first.ctypes.data
    del first
    third = memory.array((3, 32, 32, 3))
    assert third.ctypes.data == address
    third[:] = 3
    assert (second == 2).all()
    del third
    larger = memory.array((5, 32, 32, 3))
    larger[:] = 4
    assert larger.shape == (5, 32, 32, 3) and larger.dtype == np.uint8 and (second == 2).all()

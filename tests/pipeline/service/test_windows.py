"""Tests of WindowMaker: the pixels of windows, with and without the C kernel, and errors for damaged records."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.engines import kernels
from pipeline.windows import WindowMaker, WindowRequest
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
    """The pixels may differ by up to 3 grey levels, because Pillow may contain another version of libjpeg."""
    datums = [datum for _, datum in records_of(any_store, "train")]  # read first: LMDB opens a file once in a process
    wanted = request(window_px, 20, window_px)
    windows = maker.make(wanted)
    for pixels, label, number, (row, column) in zip(*windows, wanted.numbers, wanted.offset, strict=True):
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

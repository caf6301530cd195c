"""Fixtures of the tests of prep.check: small stores of noise images, and worker processes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prep.workers import WorkerPool
from tests.conftest import Build
from tests.helpers.damaged_stores import CLASSES, MakeStore


@pytest.fixture(scope="session")
def make_store(build: Build, tmp_path_factory: pytest.TempPathFactory) -> MakeStore:
    """make_store(count, format) returns a store of `count` noise images of 32×32 px, at most 64 in a shard.

    Tests share the store and must not write into it.
    """
    stores: dict[tuple[int, str], Path] = {}

    def make(count: int, format: str = "ppm") -> Path:
        if (count, format) not in stores:
            photos = tmp_path_factory.mktemp("noise")
            rng = np.random.default_rng(count)
            for name in CLASSES:
                (photos / name).mkdir()
            for number in range(count):
                pixels = rng.integers(0, 256, (4, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)
                pixels[:16] = rng.integers(0, 256, (16, 32, 3), np.uint8) // 4 + 96
                header = b"P6 32 32 255\n"
                (photos / CLASSES[number % 3] / f"p{number}.ppm").write_bytes(header + pixels.tobytes())
            stores[count, format] = build(photos, "--side", "32", "--format", format)
        return stores[count, format]

    return make


@pytest.fixture
def copy_store(make_store: MakeStore, tmp_path: Path) -> MakeStore:
    """copy_store(count, format) returns a copy of the store of `make_store`, which a test may damage."""

    def copy(count: int, format: str = "ppm") -> Path:
        return Path(shutil.copytree(make_store(count, format), tmp_path / "copy"))

    return copy


@pytest.fixture(scope="module")
def workers() -> Iterator[WorkerPool]:
    with WorkerPool(2) as pool:
        yield pool

"""Fixture: two small stores with the same classes, for mixtures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import Build

RECORDS = (12, 5)  # numbers of training records of the two stores


@pytest.fixture(scope="package")
def two(tmp_path_factory: pytest.TempPathFactory, build: Build) -> list[Path]:
    """Two stores with raw records and the classes a and b."""
    stores = []
    for number, count in enumerate(RECORDS):
        source, rng = tmp_path_factory.mktemp("source"), np.random.default_rng(number)
        for k in range(count):
            folder = source / "train" / "ab"[k % 2]
            folder.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
            picture.resize((256, 256)).save(folder / f"{number}-{k}.png", compress_level=1)
        stores.append(build(source, "--format", "ppm"))
    return stores

"""tools.bench.resized: random regions and normalization of the other loaders, bounds, and peers that are left out."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.augment import Augmentation
from pipeline.engines import kernels
from pipeline.records import Records
from pipeline.sampling import choose_regions, draw_regions
from prep.console import UserError
from prep.store.manifest import Store
from tools.bench import resized
from tools.bench.peers.stream_turn import BATCH, RATIO, SCALE, STD_RGB, check_batches, normalize, random_region
from tools.bench.stream import StreamBenchmark


def test_peers_draw_the_same_regions_as_the_stream() -> None:
    """Means and deviations of positions and sizes are nearly equal. Very wide or high records give a central region."""
    random.seed(0)
    size = (300, 500)
    theirs = np.array([random_region(*size) for _ in range(20_000)])
    ours = choose_regions(draw_regions(0, 0, 0, 20_000, SCALE, RATIO), np.full((20_000, 2), size, np.int32), RATIO)
    assert np.abs(theirs.mean(0) - ours.mean(0)).max() < 3 and np.abs(theirs.std(0) - ours.std(0)).max() < 3
    assert random_region(60, 1000) == (0, 460, 60, 80)
    assert random_region(1000, 60) == (460, 0, 80, 60)


def test_normalized_levels_and_their_check() -> None:
    resnet = Augmentation.preset("resnet")
    assert resnet.std is not None and STD_RGB == pytest.approx(resnet.std)
    mean, pixels = np.array(resnet.mean, np.float32), np.zeros((224, 224, 3), np.uint8)
    pixels[0] = 255
    levels = normalize(pixels, mean, is_resized=True)
    assert np.allclose(levels.transpose(1, 2, 0), (pixels - mean) / np.array(STD_RGB), atol=1e-5)
    batches = fake_batches(2.0)
    check_batches(batches, is_resized=True)
    with pytest.raises(ValueError, match=r"values of a batch range from -2\.0 to 2\.0"):
        check_batches(batches)


def fake_batches(level: float, *_: object) -> Iterator[Any]:
    """Yield batches with levels from -level to level. All images differ."""
    images = np.zeros((BATCH, 3, 224, 224), np.float32)
    images[:, 0, 0, :2] = level, -level
    images[:, 1, 0, 0] = np.linspace(0, 1, BATCH)
    for number in range(4):
        images[0, 2, 0, 0] = number / 4
        yield images


@pytest.mark.skipif(kernels.native is None or kernels.native.jpeg is None, reason="no C compiler or no libjpeg")
def test_peers_without_an_interpreter_are_left_out(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("our_batches", "dali_batches"):
        monkeypatch.setattr(resized, name, lambda *_: fake_batches(2.0))
    benchmark = StreamBenchmark(Store.open(stores["jpeg"]), tmp_path, 2, 0.01, is_resized=True)
    with benchmark.cleanup:
        resized.add_contestants(benchmark, None, None, None)
        bounds = [contestant.rate() for contestant in benchmark.contestants if contestant.name == contestant.bound]
    assert len(bounds) == 2 and min(bounds) > 0
    assert [contestant.name for contestant in benchmark.contestants if contestant.name != contestant.bound] == [
        "ours",
        "DALI, example's graph",
    ]
    names = ["FFCV, channels last", "FFCV, channels first", "SPDL, FFmpeg", "SPDL, simplejpeg", "torchvision, Pillow"]
    assert list(benchmark.left_out) == names
    assert "--torchvision-python must name an interpreter" in benchmark.left_out["torchvision, Pillow"]


def test_a_machine_without_the_kernel_is_refused(stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "native", None)
    store = Store.open(stores["jpeg"])
    with pytest.raises(UserError, match="uses DALI"):
        resized.region_jobs(store, Records(store, "train"), Augmentation.preset("resnet"))

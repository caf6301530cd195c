"""Images with each value of the settings `window`, `size_px` and `mean`, and with several views, equal the formula.

The formula is that of pipeline.augment, computed in float64. Pillow decodes, crops and resizes the expected images.
Rows and columns are resized in two calls, because their order within one call depends on the version of Pillow.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import Augmentation, Augmenter
from pipeline.device import Placement
from pipeline.engines import engine as engines
from pipeline.engines import kernels
from pipeline.engines.dali_engine import DaliEngine, OutputFormat
from pipeline.engines.raw_gpu_engine import RawGpuEngine
from pipeline.loader import TrainLoader, eval_loader, train_loader
from pipeline.records import Records
from pipeline.sampling import choose_regions, draw_flips, draw_params, draw_regions, draw_step, epoch_permutation
from pipeline.windows import WindowMaker, WindowRequest
from prep.store.manifest import Store
from tests.conftest import Build
from tests.pipeline.augment_formula import (
    expected_training_images,
    formula,
    formula_shift,
    served,
    stored_images,
    stored_squares,
    ten_views,
)
from tests.pipeline.engines.deferred_stream import DeferredStream
from tests.pipeline.streaming import batches_equal, concatenate_ranks, needs_kernel, take_batches

KINDS = ["jpeg", "jpeg-whole", "ppm", "ppm-whole"]
RESIZED = Augmentation((9.5, 20.0, 30.0), size_px=96, window="resized", flip=0.3, std=(50.0, 60.0, 70.0), divisor=1.1)
TOLERANCE = 1e-3  # grey levels


def pillow(image: Image.Image, box: list[int], size: int) -> np.ndarray:
    """Return the region `box` (top, left, height, width) of an image, resized to (size, size, 3)."""
    top, left, height, width = box
    part = image.crop((left, top, left + width, top + height))
    rows = part.resize((size, height), Image.Resampling.BILINEAR)
    return np.asarray(rows.resize((size, size), Image.Resampling.BILINEAR), np.float64)


def expected_resized(
    store: Store, settings: Augmentation, seed: int, batch_size: int, views: int = 1, epochs: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield label and image (3, size, size) of each record and view, beginning with the first batch."""
    images, size = stored_images(store, "train"), settings.size_px
    for epoch, step in itertools.product(range(epochs), range(len(images) // batch_size)):
        position = seed, epoch, step, batch_size * views
        draws = draw_params(*position, store.settings.side_px - size)
        flips = draw_flips(*position, settings.flip, 1) if settings.flip != 0.5 else draws.flip
        numbers = draw_regions(*position, settings.scale, settings.ratio)
        order = epoch_permutation(len(images), seed, epoch)[step * batch_size : (step + 1) * batch_size]
        for k, number in enumerate(np.repeat(order, views).tolist()):
            label, image = images[number]
            sizes = np.array([[image.height, image.width]], np.int32)
            box = choose_regions(numbers[k : k + 1], sizes, settings.ratio)[0].tolist()
            window = pillow(image, box, size)[:, :: -1 if flips[k] else 1]
            shift = formula_shift(store, settings, draws.normal[k])
            divisor = settings.divisor * np.array(settings.std or (1, 1, 1))
            yield label, ((window + shift - np.array(settings.mean)) / divisor).transpose(2, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("engine")
def test_resized_images_equal_the_formula(stores: dict[str, Path], kind: str) -> None:
    store = Store.open(stores[kind])
    images = served(train_loader(store.root, 10, seed=3, augmentation=RESIZED))
    compared = 0
    for (label, image), (wanted_label, wanted) in zip(images, expected_resized(store, RESIZED, 3, 10), strict=True):
        assert label == wanted_label and np.abs(image - wanted).max() < TOLERANCE
        compared += 1
    assert compared == 30


@pytest.mark.usefixtures("engine")
def test_large_records_that_are_not_square_are_shrunk_as_by_pillow(photo_folder: Path, build: Build) -> None:
    """Records of 500 px are resized to images of 40 px, so a pixel is a mean of up to 26 × 26 pixels."""
    store = Store.open(build(photo_folder, "--split", "train", "--side", "500", "--keep-aspect", "--format", "ppm"))
    settings = replace(RESIZED, size_px=40, scale=(0.5, 1.0), ratio=(0.4, 2.5))
    images = served(train_loader(store.root, 10, seed=1, augmentation=settings))
    for (_, image), (_, wanted) in zip(images, expected_resized(store, settings, 1, 10), strict=True):
        assert np.abs(image - wanted).max() < TOLERANCE


@needs_kernel
def test_a_region_of_any_size_is_resized_as_by_pillow() -> None:
    """Regions of 1 to 120 px at the edges of the image are shrunk and enlarged. All pixels equal Pillow's."""
    assert kernels.native
    rng = np.random.default_rng(0)
    image = np.ascontiguousarray(rng.integers(0, 2, (120, 150, 3)) * 255, np.uint8)
    sides = [1, 2, 7, 31, 32, 33, 100, 119, 120]
    boxes = [(120 - h, 150 - w, h, w) for h in sides for w in sides] + [(0, 0, 120, 150), (3, 0, 1, 150)]
    arrays = [np.full(len(boxes), number, kind) for number, kind in ((kernels.address(image), np.uint64), (0, int))]
    corner, extent = np.split(np.array(boxes, np.int32)[:, None], 2, axis=2)
    for side in (1, 32, 37, 224):
        out = np.zeros((len(boxes), 1, side, side, 3), np.uint8)
        sizes = np.full((len(boxes), 2), image.shape[:2], np.int32)
        kernels.native.copy_squares(kernels.BatchJob.of_squares(None, *arrays, sizes, corner, out, extent))
        for window, box in zip(out[:, 0], boxes, strict=True):
            assert np.array_equal(window, pillow(Image.fromarray(image), list(box), side)), (side, box)


@needs_kernel
@pytest.mark.parametrize("kind", ["ppm", "ppm-whole"])
def test_the_engine_for_raw_records_on_a_gpu_has_the_bits_of_the_c_kernel(stores: dict[str, Path], kind: str) -> None:
    store = Store.open(stores[kind])
    records, augmenter = Records(store, "train"), Augmenter(store, RESIZED)
    draws = draw_step(RESIZED, 5, 0, 0, 8, augmenter.max_offset_px)
    for layout, dtype in (("NCHW", torch.float32), ("NHWC", torch.bfloat16)):
        output = OutputFormat(1, layout, RESIZED.divisor, dtype, RESIZED.size_px, True)
        found = records.batch(np.arange(8))
        crops = augmenter.random_crops(found, *draws)
        stream, images = DeferredStream(), []
        for engine in (
            RawGpuEngine(augmenter, stream, output, 2),
            engines.choose_engine(augmenter, Placement.parse("cpu"), output, 1),
        ):
            images.append(engine.finish(engine.start(found, crops), found, crops))
            stream.record().order(images[-1])
            engine.close()
        assert torch.equal(*images)
    records.close()


def test_the_dali_graph_of_a_gpu_resizes_almost_as_pillow(
    stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI's filter has other weights than Pillow's. The test runs the graph for a GPU with DALI on a CPU."""

    def dali_engine(augmenter: Augmenter, stream: DeferredStream, output: OutputFormat, threads: int) -> DaliEngine:
        return DaliEngine(augmenter, Placement.parse("cpu"), output, stream)

    monkeypatch.setattr(kernels, "native", None)
    monkeypatch.setattr(engines, "RawGpuEngine", dali_engine)
    store, settings = Store.open(stores["jpeg-whole"]), replace(RESIZED, std=None, divisor=1.0)
    images = served(train_loader(store.root, 10, seed=3, augmentation=settings))
    for (label, image), (wanted_label, wanted) in zip(images, expected_resized(store, settings, 3, 10), strict=True):
        difference = np.abs(image - wanted)
        assert label == wanted_label and difference.max() < 3 and difference.mean() < 0.6


@pytest.mark.parametrize("kind", ["jpeg-whole", "ppm"])
@pytest.mark.parametrize("mean", ["image", "aligned", "channel"])
@pytest.mark.usefixtures("engine")
def test_crops_of_other_sizes_equal_the_formula(stores: dict[str, Path], kind: str, mean: str) -> None:
    store, settings = Store.open(stores[kind]), Augmentation(mean=mean, size_px=65, divisor=1.1)
    images = served(train_loader(store.root, 10, seed=3, augmentation=settings))
    for (_, image), (_, wanted) in zip(images, expected_training_images(store, settings, 3, 10), strict=True):
        assert np.abs(image - wanted).max() < TOLERANCE
    one, ten = (served(eval_loader(store.root, 5, views=views, augmentation=settings)) for views in (1, 10))
    for (_, square), (_, image), (_, views) in zip(stored_squares(store, "val"), one, ten, strict=True):
        for number, (view, (corner, flip)) in enumerate(zip(views, ten_views(store, 65), strict=True)):
            wanted = formula(square, corner, flip, 0.0, mean, store, 1.1, 65)
            assert np.abs(view - wanted).max() < TOLERANCE
            assert number != 2 or np.abs(image - wanted).max() < TOLERANCE


@pytest.mark.usefixtures("engine")
def test_training_on_centre_crops_and_std_equal_the_formula(stores: dict[str, Path]) -> None:
    """Training and evaluation subtract the three channel means and divide by the three values of `std`."""
    store = Store.open(stores["jpeg"])
    settings = Augmentation((1.0, 2.0, 3.0), "off", window="centre", size_px=100, flip=1.0, std=(2.0, 4.0, 8.0))
    order, squares = epoch_permutation(30, 0, 0), stored_squares(store, "train")
    train = served(train_loader(store.root, 10, augmentation=settings))
    evaluated = served(eval_loader(store.root, 10, split="train", augmentation=settings))
    for images, numbers, flip in ((train, order, -1), (evaluated, np.arange(30), 1)):
        for number, (_, image) in zip(numbers.tolist(), images, strict=True):
            window = squares[number][1][78:178, 78:178][:, ::flip]
            wanted = (window - np.array([1.0, 2.0, 3.0])) / np.array([2.0, 4.0, 8.0])
            assert np.abs(image - wanted.transpose(2, 0, 1)).max() < TOLERANCE


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.usefixtures("engine")
def test_views_are_independent_images_of_each_record(stores: dict[str, Path], views: int) -> None:
    store = Store.open(stores["ppm-whole"])
    wanted = list(expected_resized(store, RESIZED, 4, 5, views))
    with train_loader(store.root, 5, seed=4, augmentation=RESIZED, views=views) as loader:
        batches = list(loader)
    assert all(batch.images.shape == (5, views, 3, 96, 96) and batch.labels.shape == (5,) for batch in batches)
    images = torch.cat([batch.images for batch in batches]).flatten(0, 1).numpy()
    assert [label for label, _ in wanted[::views]] == torch.cat([batch.labels for batch in batches]).tolist()
    assert max(np.abs(image - one).max() for image, (_, one) in zip(images, wanted, strict=True)) < TOLERANCE


@pytest.mark.parametrize("views", [1, 2])
def test_ranks_threads_and_resumed_loaders_serve_the_same_images(stores: dict[str, Path], views: int) -> None:
    settings = replace(RESIZED, size_px=32)

    def load(batch_size: int, shard: int = 0, world_size: int = 1, threads: int = 1) -> TrainLoader:
        ranks = {"shard": shard, "world_size": world_size, "threads": threads}
        return train_loader(stores["jpeg-whole"], batch_size, seed=6, augmentation=settings, views=views, **ranks)

    with load(10) as whole, load(5, 0, 2, 3) as first, load(5, 1, 2) as second, load(10) as resumed:
        expected = take_batches(whole, 5)
        assert batches_equal(concatenate_ranks([take_batches(first, 5), take_batches(second, 5)]), expected)
        whole.seek(0, 2)
        resumed.load_state_dict(whole.state_dict())
        assert batches_equal(take_batches(resumed, 3), expected[2:])


@pytest.mark.parametrize("kind", ["jpeg-whole", "ppm"])
@pytest.mark.usefixtures("engine")
def test_a_worker_of_a_service_chooses_and_resizes_the_regions(stores: dict[str, Path], kind: str) -> None:
    store = Store.open(stores[kind])
    maker, images = WindowMaker(store, 2), stored_images(store, "train")
    numbers = draw_regions(1, 0, 0, 8, (0.08, 1.0), (0.5, 2.0))
    records, nothing = np.arange(8) * 3, np.zeros((8, 2), np.int32)
    requests = [
        WindowRequest("train", records[k : k + 4], nothing[:4], 50, False, numbers[k : k + 4], (0.5, 2.0))
        for k in (0, 4)
    ]
    pixels = maker.make(WindowRequest.joined(requests)).pixels
    for k, window in enumerate(pixels):
        image = images[records[k]][1]
        box = choose_regions(numbers[k : k + 1], np.array([[image.height, image.width]], np.int32), (0.5, 2.0))[0]
        assert np.array_equal(window, pillow(image, box.tolist(), 50))
    maker.close()

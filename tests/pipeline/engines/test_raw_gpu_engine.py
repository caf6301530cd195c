"""RawGpuEngine on a CPU: comparison of images with the C kernel, order of the work, reuse of memory blocks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.augment import MEANS, SQUARE, Augmentation, Augmenter, Crops
from pipeline.engines import finish_crops, kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.device_stream import InOrderStream
from pipeline.engines.finish_crops import CropFinisher
from pipeline.engines.raw_gpu_engine import BlockPool, RawGpuEngine
from pipeline.records import RecordBatch, Records
from pipeline.sampling import draw_params
from prep.store.manifest import Store
from tests.pipeline.engines.deferred_stream import DeferredStream
from tests.pipeline.streaming import needs_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Input = tuple[RecordBatch, Crops]


class Source:
    """Batches of the training split of a store."""

    def __init__(self, path: Path, augmentation: Augmentation) -> None:
        store = Store.open(path)
        self.augmenter, self.records = Augmenter(store, augmentation), Records(store, "train")

    def training(self, first: int = 3, count: int = 7) -> Input:
        records = self.records.batch(np.arange(first, first + count))
        return records, self.augmenter.random_crops(records, draw_params(4, 0, first, count, 32))

    def views(self, views: int | str, count: int = 3) -> Input:
        records = self.records.batch(np.arange(5, 5 + count))
        return records, self.augmenter.eval_crops(records, views)

    def expected(self, output: OutputFormat, batch: Input) -> torch.Tensor:
        """Return the images that the C kernel makes on the CPU."""
        assert kernels.native is not None
        engine = CpuEngine(self.augmenter, kernels.native, output, 1)
        images = engine.finish(engine.start(*batch), *batch)
        engine.close()
        return images


@pytest.fixture
def sources(stores: dict[str, Path]) -> Iterator[Any]:
    opened: list[Source] = []

    def of(kind: str, augmentation: Augmentation) -> Source:
        opened.append(Source(stores[kind], augmentation))
        return opened[-1]

    yield of
    for source in opened:
        source.records.close()


@needs_kernel
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("kind", ["ppm", "ppm-whole"])
def test_images_have_the_bits_of_the_c_kernel(sources: Any, kind: str, mean: str) -> None:
    source = sources(kind, Augmentation(mean=mean, divisor=1.1))
    side = source.augmenter.side_px
    for layout, dtype in itertools.product(("NCHW", "NHWC"), DTYPES):
        for output, batch in (
            (OutputFormat(1, layout, 1.1, dtype), source.training()),
            (OutputFormat(1, layout, 1.0, dtype), source.views(1)),
            (OutputFormat(10, layout, 1.0, dtype), source.views(10)),
            (OutputFormat(1, layout, 1.0, dtype, side), source.views(SQUARE)),
        ):
            stream = DeferredStream()
            engine = RawGpuEngine(source.augmenter, stream, output, threads=3)
            images = engine.finish(engine.start(*batch), *batch)
            assert images.isnan().all() and images.is_contiguous()
            stream.record().order(images)
            expected = source.expected(output, batch)
            assert images.dtype == dtype and images.shape == expected.shape and torch.equal(images, expected)
            engine.close()


@needs_kernel
@pytest.mark.parametrize(("mean", "layout"), [("channel", "NCHW"), ("image", "NHWC"), ("aligned", "NCHW")])
def test_the_triton_kernel_has_the_bits_of_the_operators(
    sources: Any, mean: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's interpreter runs each program in Python. To save time, this test uses fewer and larger programs."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("the interpreter is used only without a GPU; tools/gpu_check.py compares the streams on a GPU")
    monkeypatch.setattr(finish_crops, "_ELEMENTS", 1 << 16)
    source = sources("ppm-whole", Augmentation(mean=mean, divisor=1.1))
    side = source.augmenter.side_px
    for dtype, (views, crop_px, square_px, batch) in itertools.product(
        DTYPES,
        (
            (1, 224, 224, source.training(count=3)),
            (10, 224, side, source.views(10, 1)),
            (1, side, side, source.views(SQUARE, 2)),
        ),
    ):
        output = OutputFormat(views, layout, 1.1, dtype, crop_px)
        finisher = CropFinisher(source.augmenter, output, square_px, InOrderStream())
        random = np.random.default_rng(1)
        size = (len(batch[0].numbers), square_px, square_px, 3)
        squares = torch.from_numpy(random.integers(0, 256, size, dtype=np.uint8))
        windows, shift = finisher.parameters(batch[1])
        actual, expected = (torch.full(finisher.shape(size[0]), torch.nan, dtype=dtype) for _ in range(2))
        finisher._with_triton(squares, windows, shift, actual)
        finisher._with_operators(squares, windows, shift, expected)
        # The interpreter rounds bfloat16 values towards zero, but a GPU rounds them to nearest. CropFinisher checks the
        # bits on each GPU.
        assert torch.allclose(actual, expected, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


@pytest.mark.parametrize(("views", "layout"), [(1, "NCHW"), (10, "NHWC")])
def test_the_triton_kernel_is_used_if_it_has_the_bits_of_the_operators(
    sources: Any, views: int, layout: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Triton's interpreter rounds bfloat16 differently from a GPU, so PyTorch operators are used for bfloat16."""
    triton = pytest.importorskip("pipeline.engines.finish_crops_triton")
    monkeypatch.setattr(finish_crops, "_ELEMENTS", 1 << 16)
    monkeypatch.setattr(finish_crops, "_can_try_triton", lambda device: not torch.cuda.is_available())
    source = sources("ppm", Augmentation(mean="aligned"))
    square_px = 224 if views == 1 else 256

    def uses_triton(dtype: torch.dtype) -> bool:
        output = OutputFormat(views, layout, 1.1, dtype)
        return CropFinisher(source.augmenter, output, square_px, DeferredStream())._use_triton

    if torch.cuda.is_available():
        pytest.skip("the interpreter is used only without a GPU")
    assert uses_triton(torch.float32) and uses_triton(torch.float16)
    assert capsys.readouterr().err == ""
    assert not uses_triton(torch.bfloat16)
    assert "a Triton kernel gives wrong results. The stream uses PyTorch operators" in capsys.readouterr().err
    monkeypatch.setattr(triton, "finish_elements", {})
    assert not uses_triton(torch.float32)
    assert "a Triton kernel fails: KeyError" in capsys.readouterr().err


def test_without_the_c_kernel_numpy_copies_the_pixels(sources: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = sources("ppm-whole", Augmentation())
    output, batch = OutputFormat(10), source.views(10)
    images = []
    for threads in (1, 2, 16):
        engine = RawGpuEngine(source.augmenter, InOrderStream(), output, threads)
        images.append(engine.finish(engine.start(*batch), *batch))
        monkeypatch.setattr(kernels, "native", None)
        engine.close()
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])


@needs_kernel
def test_blocks_are_used_again_only_after_their_copies(sources: Any) -> None:
    """The test starts and finishes six batches without any wait.

    If a block of pinned memory were reused too early, an earlier batch would change.
    """
    source, stream = sources("ppm", Augmentation(mean="none")), DeferredStream()
    engine = RawGpuEngine(source.augmenter, stream, OutputFormat(), threads=2)
    batches = [source.training(first, 3 if first == 5 else 4) for first in range(6)]
    started, images = [engine.start(*batch) for batch in batches[:2]], []
    for k, batch in enumerate(batches):
        images.append(engine.finish(started[k], *batch))
        if k + 2 < len(batches):
            started.append(engine.start(*batches[k + 2]))
    assert images[-1].isnan().all()
    stream.record().order()
    for batch, found in zip(batches, images, strict=True):
        assert torch.equal(found, source.expected(OutputFormat(), batch))
    assert len({one.block.data_ptr() for one in started}) == 3  # two blocks are in use, and one waits for its copy
    engine.close()


def test_a_block_that_is_too_small_is_replaced() -> None:
    stream = DeferredStream()
    pool = BlockPool(stream)
    small, large = pool.take(10), pool.take(30)
    for block in (small, large):
        pool.give_back(block, stream.record())
    assert len(pool.take(20)) == 20 and stream.waits == 1
    pool.give_back(small, stream.record())
    assert pool.take(20) is large and stream.waits == 2
    pool.close()
    assert len(pool.take(5)) == 5 and stream.waits == 2

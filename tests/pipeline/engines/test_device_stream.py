"""Loaders on a device that does its work later than the host queues it, as a GPU does.

The tests check values, order, kept batches, wait times and closing.

Tests on a CPU use DeferredStream. The last test calls CudaStream with a mocked torch.cuda.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline import loader_base, prefetch
from pipeline.augment import Augmentation, Augmenter
from pipeline.device import Placement
from pipeline.engines import engine as engine_module
from pipeline.engines import kernels
from pipeline.engines.dali_engine import DaliEngine, OutputFormat
from pipeline.engines.device_stream import CudaStream
from pipeline.engines.raw_gpu_engine import RawGpuEngine
from pipeline.loader import Batch, eval_loader, train_loader
from pipeline.prefetch import CONSUMER_AHEAD
from prep.store.manifest import Store
from tests.pipeline.engines.deferred_stream import DeferredEvent, DeferredStream
from tests.pipeline.streaming import batches_equal, take_batches

FORMATS = [{}, {"layout": "NHWC", "dtype": "bfloat16", "augmentation": Augmentation(mean="aligned", divisor=1.1)}]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[DeferredStream]:
    """Loaders made after `streams.append(stream)` use the engines of a GPU with the last stream of the list."""
    opened: list[DeferredStream] = []
    choose_engine = loader_base.choose_engine

    def choose(augmenter: Augmenter, placement: Placement, output: OutputFormat, threads: int) -> Any:
        if not opened:
            return choose_engine(augmenter, placement, output, threads)
        if augmenter.is_raw:
            return RawGpuEngine(augmenter, opened[-1], output, threads)
        return DaliEngine(augmenter, placement, output, opened[-1])

    monkeypatch.setattr(loader_base, "choose_engine", choose)
    return opened


@pytest.mark.parametrize("options", FORMATS, ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("kind", ["jpeg", "ppm-whole"])
def test_batches_are_those_of_the_cpu(
    stores: dict[str, Path],
    kind: str,
    options: dict[str, Any],
    streams: list[DeferredStream],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The test compares two epochs of training, a resumed stream, and evaluation with all views.

    The last evaluation batch has two images.
    """

    def batches() -> list[list[Batch]]:
        with train_loader(stores[kind], 8, seed=3, threads=2, **options) as loader:
            served = [take_batches(loader, 5)]
            state = loader.state_dict()
            served.append(take_batches(loader, 2))
            loader.seek(0, 1)
            served.append(take_batches(loader, 1))
        with train_loader(stores[kind], 8, seed=3, threads=2, **options) as loader:
            loader.load_state_dict(state)
            served.append(take_batches(loader, 2))
        for views in (1, 10, "square"):
            with eval_loader(stores[kind], 5, views=views, threads=2, **options) as loader:
                served.append(list(loader))
        return served

    if kind == "jpeg":
        monkeypatch.setattr(kernels, "native", None)  # compare DALI with DALI: the C kernel gives other bits
    expected = batches()
    streams.append(DeferredStream())
    found = batches()
    assert all(batches_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert batches_equal(found[1], found[3])
    addresses = {tensor.data_ptr() for part in found for batch in part for tensor in batch}
    assert addresses <= streams[0].ordered


@pytest.mark.parametrize(("kind", "engine"), [("jpeg", DaliEngine), ("ppm", RawGpuEngine)])
def test_the_engine_of_a_gpu(stores: dict[str, Path], kind: str, engine: type, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = DeferredStream()
    monkeypatch.setattr(engine_module, "open_stream", lambda placement: stream)
    chosen = engine_module.choose_engine(
        Augmenter(Store.open(stores[kind]), Augmentation()), Placement(0), OutputFormat(), threads=1
    )
    assert isinstance(chosen, engine) and chosen.stream is stream
    chosen.close()


def test_the_finisher_is_at_most_one_batch_ahead_of_the_gpu(
    stores: dict[str, Path], streams: list[DeferredStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches are finished, and the consumer takes only the first batch.

    The finisher thread has waited until the GPU had made the second and the third batch, but not the fourth.
    """
    monkeypatch.setattr(prefetch, "FINISHED_AHEAD", 4)
    streams.append(DeferredStream())
    with train_loader(stores["ppm"], 5, seed=1) as loader:
        next(iter(loader))
        loader._prefetcher._finisher.submit(lambda: None).result()  # waits until the requested batches are finished
        one_batch = 5  # pieces of work: copies of pixels, windows, shifts and labels, and the finishing kernel
        assert streams[0].queued_work == one_batch and streams[0].waits >= 3


def test_kept_batches_stay_valid_and_may_be_changed(stores: dict[str, Path], streams: list[DeferredStream]) -> None:
    streams.append(DeferredStream())
    with train_loader(stores["ppm"], 5, seed=1) as loader:
        kept = take_batches(loader, 12)
        copies = [Batch(batch.images.clone(), batch.labels.clone()) for batch in kept]
        for batch in kept[::2]:
            batch.images.zero_()
        loader.seek(0)
        again = take_batches(loader, 12)
    assert batches_equal(again, copies) and batches_equal(kept[1::2], copies[1::2])


@pytest.mark.parametrize("kind", ["jpeg", "ppm"])
def test_close_ends_the_work_before_the_files_are_unmapped(
    stores: dict[str, Path], kind: str, streams: list[DeferredStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    streams.append(DeferredStream())
    loader = train_loader(stores[kind], 5, seed=1)
    take_batches(loader, 2)
    close, left = loader._records.close, []

    def close_records() -> None:
        left.append(streams[0].queued_work)
        close()

    monkeypatch.setattr(loader._records, "close", close_records)
    until = time.monotonic() + 20
    while not streams[0].queued_work and time.monotonic() < until:
        time.sleep(0.01)
    loader.close()
    assert left == [0]


def test_the_loader_waits_until_the_gpu_has_caught_up_with_the_consumer(
    stores: dict[str, Path], streams: list[DeferredStream]
) -> None:
    """The GPU takes 50 ms for each batch. The thread of the consumer does not wait for the GPU, but the loader does."""

    class Consumer(DeferredEvent):
        """An event that happens 50 ms after the previous event, as if the GPU worked on a batch between the events."""

        def __init__(self) -> None:
            passes.append(max(time.perf_counter(), passes[-1]) + 0.05)
            self._passes = passes[-1]

        def wait(self) -> None:
            time.sleep(max(0.0, self._passes - time.perf_counter()))

    passes = [0.0]
    stream = DeferredStream()
    stream.record_consumer = Consumer
    streams.append(stream)
    with train_loader(stores["ppm"], 5, seed=1) as loader:
        take_batches(loader, 4)
        loader.wait_times()
        for _ in range(2):
            for _ in loader:
                ahead = sum(each > time.perf_counter() for each in passes)
                assert ahead <= CONSUMER_AHEAD + 1
        waits = loader.wait_times()
    # Together, the two waits take most of the 50 ms of a batch. On a slow machine, consumer_wait_s is a larger part.
    assert waits.loader_wait_s + waits.consumer_wait_s > 0.03 * waits.batches and waits.loader_wait_s > 0.05


def test_cuda_stream_calls_torch_in_the_right_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current device is GPU 0, and the device of the loader is GPU 1.

    The loader must allocate, copy and run kernels on its own CUDA stream.
    """
    calls: list[str] = []
    current = ["consumer"]

    class Stream:
        device = "gpu 1"

        def __init__(self, name: object) -> None:
            self.name = "side" if isinstance(name, torch.device) else name

        def wait_event(self, event: Event) -> None:
            calls.append(f"{self.name} waits for event of {event.stream}")

    class Event:
        def __init__(self, blocking: bool) -> None:
            assert blocking

        def record(self, stream: Stream) -> None:
            self.stream = stream.name

        def synchronize(self) -> None:
            calls.append(f"host waits for event of {self.stream}")

    @contextmanager
    def within(stream: Stream):
        current.append(stream.name)
        yield
        current.pop()

    class Memory:
        def pin_memory(self) -> Memory:
            calls.append(f"pin, current {current[-1]}")
            return self

        def to(self, device: torch.device, non_blocking: bool) -> Memory:
            calls.append(f"copy to {device}, {non_blocking}, current {current[-1]}")
            return self

        def record_stream(self, stream: Stream) -> None:
            calls.append(f"memory used by {stream.name}")

    def empty(*shape: object, **options: object) -> Memory:
        calls.append(f"empty {options}, current {current[-1]}")
        return Memory()

    for name, value in {
        "Stream": Stream,
        "Event": Event,
        "stream": within,
        "device": lambda device: within(SimpleNamespace(name=f"device {device}")),
        "current_stream": lambda device: Stream(current[-1]),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "empty", empty)
    stream = CudaStream(1)
    assert stream.dali_stream.name == "side" and stream.device == torch.device("cuda:1")
    stream.empty([2], torch.float32)
    stream.host_memory(9)
    stream.upload(Memory())
    stream.run(lambda: calls.append(f"work, current {current[-1]}"))
    event = stream.record()
    event.order(Memory())
    event.wait()
    stream.record_consumer().wait()
    assert calls == [
        "empty {'dtype': torch.float32, 'device': device(type='cuda', index=1)}, current side",
        "empty {'dtype': torch.uint8, 'pin_memory': True}, current device cuda:1",
        "pin, current side",
        "copy to cuda:1, True, current side",
        "work, current side",
        "consumer waits for event of side",
        "memory used by consumer",
        "host waits for event of side",
        "host waits for event of consumer",
    ]

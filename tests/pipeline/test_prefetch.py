"""Prefetcher: images come in the order of the jobs, queues are bounded, and `close` works at any time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.augment import Augmentation, Augmenter
from pipeline.device import Placement
from pipeline.engines import kernels
from pipeline.engines.dali_engine import DaliEngine, OutputFormat
from pipeline.engines.engine import choose_engine
from pipeline.engines.raw_gpu_engine import RawGpuEngine
from pipeline.prefetch import DALI_GPU_AHEAD, ENGINE_AHEAD, FINISHED_AHEAD, READ_AHEAD, BatchInput, Prefetcher
from pipeline.records import Records
from prep.store.manifest import Store, StoreError
from tests.pipeline.engines.deferred_stream import DeferredStream

CPU = Placement.parse("cpu")
NOTHING = Augmentation(mean="none", colour="off")


class Harness:
    """A Prefetcher that serves centre crops of the training images of a store, in batches of three."""

    def __init__(self, path: Path, form: str = "kernel") -> None:
        store = Store.open(path)
        self.augmenter = Augmenter(store, NOTHING)
        output = OutputFormat(layout="NHWC")
        engine = choose_engine(self.augmenter, CPU, output, threads=1)
        if form == "graph, deferred":
            engine = DaliEngine(self.augmenter, CPU, output, DeferredStream())
        elif form == "raw, deferred":
            engine = RawGpuEngine(self.augmenter, DeferredStream(), output, threads=2)
        self.prefetcher = Prefetcher(engine, CPU, Records(store, "train"), batch_size=3, threads=1)

    def job(self, first: int, wait_s: float = 0.0) -> BatchInput:
        time.sleep(wait_s)
        return self.prefetcher.read_batch(
            np.arange(first, first + 3), lambda records: self.augmenter.eval_crops(records, 1)
        )

    def take(self) -> tuple[int, float]:
        """Return the number of the first record in the next batch, and the sum of the batch's pixels."""
        images, labels, batch_input, _ = self.prefetcher.next()
        assert labels.tolist() == batch_input.records.labels.tolist()
        return int(batch_input.records.numbers[0]), float(images.numpy().sum(dtype=np.float64))


@pytest.fixture(params=["kernel", "graph", "graph, deferred", "raw, deferred"])
def harness(
    stores: dict[str, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Harness]:
    if request.param == "graph":
        monkeypatch.setattr(kernels, "native", None)
    one = Harness(stores["ppm"], request.param)
    yield one
    one.prefetcher.close()


@pytest.fixture(scope="module")
def sums(stores: dict[str, Path]) -> dict[int, float]:
    """For each k: the sum of the pixels of records k, k + 1 and k + 2, computed directly from the records."""
    records = Records(Store.open(stores["ppm"]), "train")
    each = [float(records[number].payload[16:240, 16:240].sum()) for number in range(len(records))]
    records.close()
    return {first: sum(each[first : first + 3]) for first in range(len(each) - 2)}


def test_images_come_in_the_order_of_the_jobs(harness: Harness, sums: dict[int, float]) -> None:
    """Two of the jobs take 0.2 s longer than the others. The order of the images must not change."""
    firsts = [9, 0, 3, 20, 4, 5, 1, 27, 2]
    harness.prefetcher.start(partial(harness.job, first, 0.2 if k in (0, 4) else 0) for k, first in enumerate(firsts))
    assert [harness.take() for _ in firsts] == [(first, sums[first]) for first in firsts]
    assert harness.prefetcher.next() is None and harness.prefetcher.next() is None


def test_labels_of_a_batch_are_those_of_its_records(harness: Harness, stores: dict[str, Path]) -> None:
    records = Records(Store.open(stores["ppm"]), "train")
    harness.prefetcher.start(iter([partial(harness.job, 6)]))
    _, labels, *_ = harness.prefetcher.next()
    assert labels.dtype == torch.int64
    assert labels.tolist() == [records[number].label for number in (6, 7, 8)]
    records.close()


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_start_drops_the_rest_of_earlier_jobs(harness: Harness, sums: dict[int, float], taken: int) -> None:
    harness.prefetcher.start(partial(harness.job, first) for first in range(10))
    for first in range(taken):
        assert harness.take() == (first, sums[first])
    harness.prefetcher.start(partial(harness.job, first, 0.01) for first in (25, 17))
    assert [harness.take(), harness.take()] == [(25, sums[25]), (17, sums[17])]
    assert harness.prefetcher.next() is None


def test_no_more_jobs_are_taken_than_the_queues_hold(harness: Harness) -> None:
    taken_jobs = 0

    def endless() -> Iterator[partial[BatchInput]]:
        nonlocal taken_jobs
        for first in itertools.cycle(range(10)):
            taken_jobs += 1
            yield partial(harness.job, first)

    harness.prefetcher.start(endless())
    for taken in range(1, 30):
        harness.take()
        assert taken_jobs <= taken + READ_AHEAD + max(ENGINE_AHEAD, DALI_GPU_AHEAD) + FINISHED_AHEAD


def test_records_are_read_while_others_are_decoded(harness: Harness) -> None:
    """After the test has taken the first batch, more jobs run, although the test requests no further batch."""
    begun, reads = [], threading.Semaphore(0)

    def job(first: int) -> BatchInput:
        begun.append(first)
        reads.release()
        return harness.job(first)

    harness.prefetcher.start(partial(job, first) for first in range(10))
    harness.take()
    assert all(reads.acquire(timeout=20) for _ in range(READ_AHEAD))
    assert len(begun) >= READ_AHEAD


def test_an_error_in_a_job_is_raised_after_the_batches_before_it(harness: Harness, sums: dict[int, float]) -> None:
    def failing() -> BatchInput:
        raise StoreError("the disk is gone")

    harness.prefetcher.start(iter([partial(harness.job, 0), partial(harness.job, 1), partial(harness.job, 2), failing]))
    assert harness.take() == (0, sums[0])
    assert [harness.take()[0] for _ in range(2)] == [1, 2]
    for _ in range(2):  # every call raises the error, because skipping a batch would shift all later batches
        with pytest.raises(StoreError, match="the disk is gone"):
            harness.take()


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_prefetcher_can_be_closed_at_any_time_and_leaves_no_thread(stores: dict[str, Path], taken: int) -> None:
    before = threading.active_count()
    harness = Harness(stores["ppm"])
    harness.prefetcher.start(partial(harness.job, first % 20, 0.02) for first in itertools.count())
    for _ in range(taken):
        harness.take()
    began = time.perf_counter()
    harness.prefetcher.close()
    assert time.perf_counter() - began < 5
    assert threading.active_count() == before
    harness.prefetcher.close()
    with pytest.raises(ValueError, match="closed"):
        harness.prefetcher.next()
    harness.prefetcher.start(iter(()))
    with pytest.raises(ValueError, match="closed"):
        harness.prefetcher.next()

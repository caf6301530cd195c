"""A Prefetcher: jobs in, their images in the same order, never more in hand than it says, and an end to it at any time."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.augment import Augmentation, Augmenter
from pipeline.engines import kernels
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.engine import choose_engine
from pipeline.placement import Placement
from pipeline.prefetch import DALI_AHEAD, FINISHED_AHEAD, READ_AHEAD, BatchInput, Prefetcher
from pipeline.records import Records
from prep.store.manifest import Store, StoreError

CPU = Placement.parse("cpu")
NOTHING = Augmentation(mean="none", colour="off")


class Wired:
    """A Prefetcher of centre windows over the training pictures of a store."""

    def __init__(self, path: Path) -> None:
        store = Store.open(path)
        self.augmenter = Augmenter(store, NOTHING)
        engine = choose_engine(self.augmenter, CPU, OutputFormat(layout="NHWC"), threads=1)
        self.prefetcher = Prefetcher(engine, CPU, Records(store, "train"), batch_size=3, threads=1)

    def job(self, first: int, wait_s: float = 0.0) -> BatchInput:
        time.sleep(wait_s)
        return self.prefetcher.read_batch(
            np.arange(first, first + 3), lambda records: self.augmenter.eval_crops(records, 1)
        )

    def take(self) -> tuple[int, float]:
        """The first record's number, and a sum of the pixels that came with it."""
        images, fed = self.prefetcher.next()
        return int(fed.numbers[0]), float(images.numpy().sum(dtype=np.float64))


@pytest.fixture(params=["kernel", "graph"])
def wired(stores: dict[str, Path], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wired]:
    if request.param == "graph":
        monkeypatch.setattr(kernels, "native", None)
    one = Wired(stores["ppm"])
    yield one
    one.prefetcher.close()


@pytest.fixture(scope="module")
def sums(stores: dict[str, Path]) -> dict[int, float]:
    """Of the pixels of records k, k + 1 and k + 2, by k: from the records themselves."""
    records = Records(Store.open(stores["ppm"]), "train")
    each = [float(records[number].payload[16:240, 16:240].sum()) for number in range(len(records))]
    records.close()
    return {first: sum(each[first : first + 3]) for first in range(len(each) - 2)}


def test_outputs_come_in_the_order_of_the_jobs(wired: Wired, sums: dict[int, float]) -> None:
    """Though the first is looked up last, and all but two at once."""
    firsts = [9, 0, 3, 20, 4, 5, 1, 27, 2]
    wired.prefetcher.start(partial(wired.job, first, 0.2 if k in (0, 4) else 0) for k, first in enumerate(firsts))
    assert [wired.take() for _ in firsts] == [(first, sums[first]) for first in firsts]
    assert wired.prefetcher.next() is None and wired.prefetcher.next() is None


def test_what_goes_with_a_batch_is_that_of_its_records(wired: Wired, stores: dict[str, Path]) -> None:
    records = Records(Store.open(stores["ppm"]), "train")
    wired.prefetcher.start(iter([partial(wired.job, 6)]))
    _, fed = wired.prefetcher.next()
    assert fed.labels.dtype == np.int64 and fed.labels.tolist() == [records[number].label for number in (6, 7, 8)]
    records.close()


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_a_new_beginning_drops_what_was_left(wired: Wired, sums: dict[int, float], taken: int) -> None:
    wired.prefetcher.start(partial(wired.job, first) for first in range(10))
    for first in range(taken):
        assert wired.take() == (first, sums[first])
    wired.prefetcher.start(partial(wired.job, first, 0.01) for first in (25, 17))
    assert [wired.take(), wired.take()] == [(25, sums[25]), (17, sums[17])]
    assert wired.prefetcher.next() is None


def test_jobs_are_asked_for_no_further_ahead_than_is_said(wired: Wired) -> None:
    asked = 0

    def endless() -> Iterator[partial[BatchInput]]:
        nonlocal asked
        for first in itertools.cycle(range(10)):
            asked += 1
            yield partial(wired.job, first)

    wired.prefetcher.start(endless())
    for taken in range(1, 30):
        wired.take()
        assert asked <= taken + READ_AHEAD + DALI_AHEAD + FINISHED_AHEAD


def test_batches_are_looked_up_while_others_are_decoded(wired: Wired) -> None:
    """When one has been taken, others are on their way without being asked for."""
    begun, many = [], threading.Semaphore(0)

    def job(first: int) -> BatchInput:
        begun.append(first)
        many.release()
        return wired.job(first)

    wired.prefetcher.start(partial(job, first) for first in range(10))
    wired.take()
    assert all(many.acquire(timeout=20) for _ in range(READ_AHEAD))
    assert len(begun) >= READ_AHEAD


def test_an_error_of_a_job_comes_in_its_turn(wired: Wired, sums: dict[int, float]) -> None:
    def failing() -> BatchInput:
        raise StoreError("the disk is gone")

    wired.prefetcher.start(iter([partial(wired.job, 0), partial(wired.job, 1), partial(wired.job, 2), failing]))
    assert wired.take() == (0, sums[0])
    assert [wired.take()[0] for _ in range(2)] == [1, 2]
    for _ in range(2):  # and stays: a batch that is passed over would shift all that follow
        with pytest.raises(StoreError, match="the disk is gone"):
            wired.take()


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_a_feed_is_closed_at_any_time_and_leaves_no_thread(stores: dict[str, Path], taken: int) -> None:
    before = threading.active_count()
    wired = Wired(stores["ppm"])
    wired.prefetcher.start(partial(wired.job, first % 20, 0.02) for first in itertools.count())
    for _ in range(taken):
        wired.take()
    began = time.perf_counter()
    wired.prefetcher.close()
    assert time.perf_counter() - began < 5
    assert threading.active_count() == before
    wired.prefetcher.close()
    with pytest.raises(ValueError, match="closed"):
        wired.prefetcher.next()
    wired.prefetcher.start(iter(()))
    with pytest.raises(ValueError, match="closed"):
        wired.prefetcher.next()

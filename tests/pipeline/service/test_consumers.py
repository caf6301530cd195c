"""Tests of several consumers of one stream: batches are equal, each image is decoded once, and waits are limited."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.augment import Augmentation
from pipeline.loader import TrainLoader, train_loader
from tests.pipeline.service.conftest import Serve, Service
from tests.pipeline.service.consumer import ConsumerProcess, digests
from tests.pipeline.streaming import batches_equal, take_batches

BATCH, SEED = 4, 21
# Number of batches that a loader with one worker requests before its consumer takes them: 4 batches that are being
# fetched from the service, ENGINE_AHEAD and FINISHED_AHEAD batches of the prefetcher, and one batch that is being
# finished.
PREFETCHED = 4 + 3 + 2 + 1
NEVER_S = 10_000.0


@pytest.fixture(scope="module")
def processes(store: Path) -> Iterator[list[ConsumerProcess]]:
    """Two consumers in their own processes. Only the last test of this module may kill one of the consumers."""
    started = [ConsumerProcess(store, BATCH, SEED) for _ in range(2)]
    yield started
    for process in started:
        process.end()


@pytest.fixture
def loaders(store: Path) -> Iterator[list[TrainLoader]]:
    """A list to which a test adds the loaders that it opens. These loaders are closed after the test."""
    opened: list[TrainLoader] = []
    yield opened
    for loader in opened:
        loader.close()


def consume(store: Path, service: Service) -> TrainLoader:
    return train_loader(store, BATCH, seed=SEED, service=service.at, threads=1)


def expected(store: Path, batches: int) -> list[str]:
    with train_loader(store, BATCH, seed=SEED, threads=1) as local:
        return digests(take_batches(local, batches))


def positions(service: Service) -> list[int]:
    return sorted(consumer["position"] for consumer in service.status()["consumers"])


@contextmanager
def closed_on_failure(loaders: list[TrainLoader]) -> Iterator[None]:
    """Close the loaders if the `with` block fails. The threads that wait for batches then end."""
    try:
        yield
    except BaseException:
        for loader in loaders:
            loader.close()
        raise


def test_five_consumers_wait_for_each_other_and_share_what_is_decoded(
    store: Path, serve: Serve, processes: list[ConsumerProcess], loaders: list[TrainLoader]
) -> None:
    """Three consumers are threads of this process, and two are other processes. The service expects five consumers."""
    batches = 30
    service = serve(store, 1, consumers=5, ahead=8, patience_s=NEVER_S)
    with ThreadPoolExecutor(3) as pool, closed_on_failure(loaders), ExitStack() as at_end:
        loaders += [consume(store, service) for _ in range(3)]
        streams = [pool.submit(take_batches, loader, batches) for loader in loaders]
        processes[0].do(f"open {service.at}")
        processes[0].send(f"take {batches}")
        service.wait_for("four consumers", lambda status: len(status["consumers"]) == 4)
        time.sleep(1.5)
        assert service.status()["images_made"] == 0 and not any(stream.done() for stream in streams)
        processes[1].do(f"open {service.at}")
        processes[1].send(f"take {batches}")
        wanted = expected(store, batches)
        assert all(digests(stream.result()) == wanted for stream in streams)
        assert all(process.answer() == wanted for process in processes)
        status = service.status()
        assert batches * BATCH <= status["images_made"] <= (batches + PREFETCHED) * BATCH
        assert len(status["consumers"]) == 5 and all(consumer["shares"] for consumer in status["consumers"])
        at_end.callback(lambda: [process.do("close") for process in processes])


def test_loaders_with_other_effects_share_the_windows(store: Path, serve: Serve, loaders: list[TrainLoader]) -> None:
    """The service decodes each window once. Each loader then applies its own effects, flips, colours and mean."""
    batches, service = 30, serve(store, 1, consumers=2, ahead=8, patience_s=NEVER_S)
    settings = [replace(Augmentation.preset(name), size_px=64) for name in ("resnet", "simclr")]
    with ThreadPoolExecutor(2) as pool, closed_on_failure(loaders):
        options: dict[str, Any] = {"seed": SEED, "threads": 1}
        loaders += [train_loader(store, BATCH, service=service.at, augmentation=one, **options) for one in settings]
        streams = [pool.submit(take_batches, loader, batches) for loader in loaders]
        for one, stream in zip(settings, streams, strict=True):
            with train_loader(store, BATCH, augmentation=one, **options) as local:
                assert batches_equal(stream.result(), take_batches(local, batches))
    assert batches * BATCH <= service.status()["images_made"] <= (batches + PREFETCHED) * BATCH < 2 * batches * BATCH


@pytest.mark.soak
def test_the_fastest_consumer_waits_for_the_slowest(store: Path, serve: Serve, loaders: list[TrainLoader]) -> None:
    """The slow consumer pauses, and then receives batches that the service has kept."""
    ahead = 5
    service = serve(store, 1, ahead=ahead, consumers=2, patience_s=NEVER_S)
    loaders += [consume(store, service) for _ in range(2)]
    with ThreadPoolExecutor(2) as pool, closed_on_failure(loaders):
        fast = pool.submit(take_batches, loaders[0], 60)
        slow = digests(take_batches(loaders[1], 1))
        time.sleep(2)
        first, last = positions(service)
        assert last - first <= ahead + 1 and not fast.done()
        made = service.status()["images_made"]
        time.sleep(1)
        assert service.status()["images_made"] == made and positions(service) == [first, last]
        slow += digests(take_batches(loaders[1], 59))
        assert digests(fast.result()) == slow == expected(store, 60)
    assert service.status()["images_made"] <= (60 + PREFETCHED) * BATCH


@pytest.mark.soak
def test_a_consumer_that_left_or_is_far_away_is_not_waited_for(
    store: Path, serve: Serve, loaders: list[TrainLoader]
) -> None:
    service = serve(store, 1, ahead=5, patience_s=NEVER_S)
    with consume(store, service) as ended:
        take_batches(ended, 1)
    service.wait_for("no consumer", lambda status: not status["consumers"])
    loaders += [consume(store, service) for _ in range(2)]
    take_batches(loaders[0], 1)
    loaders[1].seek(40)
    take_batches(loaders[1], 30)
    assert [consumer["shares"] for consumer in service.status()["consumers"]].count(True) == 1
    assert digests(take_batches(loaders[0], 39)) == expected(store, 40)[1:]


@pytest.mark.soak
def test_stopped_and_killed_consumers_hold_the_others_for_a_limited_time(
    store: Path, serve: Serve, processes: list[ConsumerProcess], loaders: list[TrainLoader]
) -> None:
    """One consumer process is suspended for longer than patience_s, and then continues. Another process is killed."""
    patient = serve(store, 1, ahead=5, consumers=2, patience_s=2.0, forget_s=NEVER_S)
    loaders.append(consume(store, patient))
    processes[0].do(f"open {patient.at}")
    processes[0].send("take 1")
    begun_s = time.monotonic()
    assert digests(take_batches(loaders[0], 1)) == [*processes[0].answer()]
    processes[0].process.send_signal(signal.SIGSTOP)
    try:
        assert digests(take_batches(loaders[0], 39)) == expected(store, 40)[1:]
        assert time.monotonic() - begun_s > 2.0
        shares = {consumer["shares"] for consumer in patient.status()["consumers"]}
        assert shares == {True, False}
    finally:
        processes[0].process.send_signal(signal.SIGCONT)
    assert processes[0].do("take 39") == expected(store, 40)[1:]

    forgetful = serve(store, 1, ahead=5, consumers=2, patience_s=NEVER_S, forget_s=3.0)
    loaders.append(consume(store, forgetful))
    processes[1].do(f"open {forgetful.at}")
    processes[1].send("take 1")
    assert digests(take_batches(loaders[1], 1)) == [*processes[1].answer()]
    processes[1].end()
    assert digests(take_batches(loaders[1], 39)) == expected(store, 40)[1:]
    assert len(forgetful.status()["consumers"]) == 1

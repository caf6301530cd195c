"""A KeyboardInterrupt at any point of `next(loader)` loses no batch, and the state agrees with the served batches.

Python calls signal handlers at the beginning of a function, after a call, at a jump backwards, and when a generator
continues. A trace function raises KeyboardInterrupt at the n-th such point in this project's code, for each n.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from pipeline.evaluation_loader import EvalLoader
from pipeline.loader import Batch, TrainLoader, eval_loader, train_loader
from pipeline.service.protocol import StreamKey
from pipeline.windows import WindowMaker, WindowRequest, Windows
from prep.store.manifest import Store
from tests.helpers.project import ROOT

BATCHES = 37  # number of batches in an epoch of `numbered_store`; a batch has one image, whose label identifies it
# Beginnings of the names of the bytecode instructions after which Python calls signal handlers.
SIGNAL_POINTS = ("CALL", "RESUME", "JUMP_BACKWARD")


class LocalClient:
    """A replacement for ServiceClient that makes the windows (decoded crops) in this process, without a cluster."""

    read_ahead, block_steps = 4, 2
    store: Path

    def __init__(self, service: str, stream: StreamKey, waited_s: Callable[[], float]) -> None:
        self._maker = WindowMaker(Store.open(self.store), threads=1)

    def fetch(self, position: int, requests: list[WindowRequest]) -> Windows:
        return self._maker.make(WindowRequest.joined(requests))

    def start(self, position: int) -> None:
        pass

    def finish(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def close(self) -> None:
        self._maker.close()


@pytest.fixture(params=["store", "service"])
def options(request: pytest.FixtureRequest, numbered_store: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Arguments of a loader that reads the store itself, or that reads windows from a simulated service."""
    options: dict[str, Any] = {"batch_size": 1, "split": "train", "threads": 1}
    if request.param == "service":
        monkeypatch.setattr("pipeline.service.source.ServiceClient", LocalClient)
        monkeypatch.setattr(LocalClient, "store", numbered_store, raising=False)
        options["service"] = "simulated"
    return options


def position(loader: TrainLoader | EvalLoader) -> int:
    """Return the number of the next batch of a training loader, counted from 0; 0 for an evaluation loader."""
    return loader.epoch * BATCHES + loader.step if isinstance(loader, TrainLoader) else 0


class Interrupt:
    """Calls `next(iterator)`, and raises KeyboardInterrupt at the `number`-th signal point in this project's code."""

    def __init__(self, number: int) -> None:
        self._left = number
        self._instructions: dict[FrameType, str] = {}  # frame -> the name of its latest instruction

    def next(self, iterator: Iterator[Batch]) -> Batch | None:
        """Return the batch, or None if the call was interrupted."""
        sys.settrace(self._trace)
        try:
            return next(iterator)
        except KeyboardInterrupt:
            return None
        finally:
            sys.settrace(None)
            self._instructions.clear()

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith((f"{ROOT}/pipeline/", f"{ROOT}/prep/")):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            before = self._instructions.get(frame, "")
            self._instructions[frame] = dis.opname[code.co_code[frame.f_lasti]]
            self._left -= before.startswith(SIGNAL_POINTS)
            if self._left == 0:
                self._left = -1
                raise KeyboardInterrupt
        return self._trace


def labels_of_epochs(options: dict[str, Any], store: Path, epochs: int) -> list[int]:
    with train_loader(store, **options) as loader:
        return [int(batch.labels[0]) for _ in range(epochs) for batch in loader]


@pytest.mark.parametrize("first", [True, False], ids=["first batch", "later batch"])
def test_an_interrupted_training_loader_loses_no_batch(
    numbered_store: Path, options: dict[str, Any], first: bool
) -> None:
    """After each interruption, a new iterator serves the batch to which the state points."""
    expected = labels_of_epochs(options, numbered_store, 1)
    with train_loader(numbered_store, **options) as loader:
        number, is_done = 0, False
        while not is_done:
            number += 1
            if first or loader.step > BATCHES - 4:
                loader.seek(0, number % (BATCHES - 4))  # seek stops the prefetcher, which `next` must start again
            iterator = iter(loader)
            if not first:
                next(iterator)
            before = position(loader)
            batch = Interrupt(number).next(iterator)
            after = position(loader)
            assert after == before + (batch is not None), f"interrupted at point {number}"
            is_done = batch is not None
            assert batch is None or int(batch.labels[0]) == expected[before]
            iterator.close()  # type: ignore[attr-defined]  # the iterator is a generator
            following = next(iter(loader))
            assert int(following.labels[0]) == expected[after], f"interrupted at point {number}"
            assert position(loader) == after + 1
    assert number > 20


def test_an_interrupted_evaluation_begins_again_with_the_first_image(
    numbered_store: Path, options: dict[str, Any]
) -> None:
    options = options | {"batch_size": 9}
    with eval_loader(numbered_store, **options) as loader:
        expected = [batch.labels.tolist() for batch in loader]
        number, is_done = 0, False
        while not is_done:
            number += 1
            iterator, interrupt = iter(loader), Interrupt(number)
            is_done = interrupt.next(iterator) is not None and interrupt.next(iterator) is not None
            assert next(iter(loader)).labels.tolist() == expected[0]
        assert [batch.labels.tolist() for batch in loader] == expected
    assert number > 20

"""What keeps an engine at work: batches are looked up ahead of it, fed to its graph, and taken from it in order.

On a CPU a thread of its own takes what DALI has made and
has it finished, while DALI makes the next. On a GPU the consumer's thread does, for what it takes belongs to the stream
that is current there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import Crops
from pipeline.engines.engine import Engine
from pipeline.placement import Placement, dali
from pipeline.records import Record, Records
from prep.store.manifest import StoreError

READ_AHEAD = 4  # batches whose pages are being read while others are decoded
DALI_AHEAD = 2  # batches that DALI has at once: one being made, one made
FINISHED_AHEAD = 2  # batches finished before they are asked for, where a thread does it
_READERS = 2  # threads that look up: they wait for the disk


class BatchInput(NamedTuple):
    """One batch as it goes in."""

    numbers: npt.NDArray[np.int64]  # (N,): the records' numbers in the store's order
    labels: npt.NDArray[np.int64]  # (N,)
    records: Sequence[Record]  # held for as long as their pictures are looked at
    crops: Crops


class BatchOutput(NamedTuple):
    """One batch as it comes out."""

    images: torch.Tensor
    batch_input: BatchInput


Job = Callable[[], BatchInput]


class Prefetcher:
    """Takes jobs in order, and gives their images in the same order."""

    def __init__(self, engine: Engine, placement: Placement, records: Records, batch_size: int, threads: int) -> None:
        self._engine, self._placement, self._records = engine, placement, records
        self._pipe = _built(engine.define_graph, batch_size, placement, threads)
        self._readers = ThreadPoolExecutor(_READERS, "alexstream")
        self._finisher = ThreadPoolExecutor(1, "alexstream") if placement.device_id is None else None
        self._jobs: Iterator[Job] = iter(())
        self._looked_up: deque[Future[tuple[BatchInput, dict[str, Any]]]] = deque()
        self._in_graph: deque[BatchInput] = deque()
        self._finished: deque[Future[BatchOutput | None]] = deque()
        self._failed: StoreError | None = None  # for good: DALI does not go on, and no batch may be passed over
        self._closed = False

    def read_batch(self, numbers: npt.NDArray[np.int64], crops: Callable[[Sequence[Record]], Crops]) -> BatchInput:
        """Records by number; `crops(records)` says what is made of them. Raises StoreError as Records."""
        records = [self._records[number] for number in numbers.tolist()]
        return BatchInput(numbers, np.array([record.label for record in records], np.int64), records, crops(records))

    def start(self, jobs: Iterator[Job]) -> None:
        """Go on with other jobs; what is left of those before is dropped."""
        for future in self._finished:
            future.cancel()
        wait(self._finished)
        self._finished.clear()
        self._looked_up.clear()
        with suppress(StoreError):  # which `next` will raise
            while self._in_graph and self._failed is None:
                self._take()
        self._jobs = jobs

    def next(self) -> BatchOutput | None:
        """The images of the next job, and what they were made of; None after the last job.

        Raises StoreError naming shard, key and source of a record that is damaged, from then on always; ValueError when
        closed.
        """
        if self._closed:
            raise ValueError("the loader is closed")
        if self._finisher is None:
            return self._advance()
        while len(self._finished) < FINISHED_AHEAD:
            self._finished.append(self._finisher.submit(self._advance))
        wait((self._finished[0],))  # an interrupt here loses nothing
        return self._finished.popleft().result()

    def close(self) -> None:
        """End DALI's threads and ours, and give back memory and files."""
        self._closed = True
        self._readers.shutdown(cancel_futures=True)
        if self._finisher is not None:
            self._finisher.shutdown(cancel_futures=True)
        self._finished.clear()
        self._looked_up.clear()
        self._jobs = iter(())
        if self._pipe is not None:
            self._pipe._shutdown()  # before the files that it reads; a traceback may hold the pipeline itself
        self._pipe = None
        self._in_graph.clear()
        self._engine.close()
        self._records.close()

    def _advance(self) -> BatchOutput | None:
        if self._failed is None:
            self._fill()
        if self._in_graph and self._failed is None:
            outputs, fed = self._take()
            return BatchOutput(self._engine.finish(outputs, fed.records, fed.crops), fed)
        if self._failed is not None:
            raise self._failed
        return None

    def _fill(self) -> None:
        """Keep DALI_AHEAD batches in the graph, and READ_AHEAD before it, while there are jobs."""
        while len(self._in_graph) < DALI_AHEAD:
            for job in islice(self._jobs, READ_AHEAD - len(self._looked_up)):
                self._looked_up.append(self._readers.submit(self._prepared, job))
            if not self._looked_up:
                return
            try:
                fed, inputs = self._looked_up[0].result()
            except StoreError as error:
                if not self._in_graph:  # what precedes it is served first
                    self._failed = error
                return
            self._looked_up.popleft()
            if self._pipe is not None:
                for name, values in inputs.items():
                    self._pipe.feed_input(name, values)
                self._placement.schedule(self._pipe)
            self._in_graph.append(fed)

    def _prepared(self, job: Job) -> tuple[BatchInput, dict[str, Any]]:
        fed = job()
        return fed, self._engine.graph_inputs(fed.records, fed.crops)

    def _take(self) -> tuple[tuple[Any, ...], BatchInput]:
        outputs: tuple[Any, ...] = ()
        try:
            if self._pipe is not None:
                outputs = self._placement.outputs(self._pipe)
        except RuntimeError as error:
            self._failed = self._explained(error)
        if self._failed is not None:
            raise self._failed  # outside of `except`: DALI's own error would come along, and hold its pipeline
        return outputs, self._in_graph.popleft()

    def _explained(self, error: RuntimeError) -> StoreError:
        """DALI's error, with the record that it is about: the first of those fed that cannot be what was written."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        after = [k + 1 for k, line in enumerate(lines) if line.endswith("encountered:")]
        cause = next((line for line in lines[after[0] if after else 0 :]), repr(error))
        store, split = self._records.store, self._records.split
        for number in (int(number) for fed in self._in_graph for number in fed.numbers):
            damage = self._records.find_damage(number)
            if damage:
                return StoreError(f"{self._records.location(number)}: {damage}. {self._records.advice}")
        return StoreError(f"{store.root}, split {split}: DALI stopped ({cause}). {self._records.advice}")


def _built(nodes: Callable[[], Any], batch_size: int, placement: Placement, threads: int) -> Any:
    """A DALI pipeline whose outputs are what `nodes()` gives, with the settings that all of ours share; or None."""
    pipe = dali().Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=placement.device_id,
        exec_dynamic=True,  # gives every batch memory of its own
        prefetch_queue_depth=1,  # a Prefetcher schedules ahead
    )
    with pipe:
        outputs = nodes()
        if outputs is None:
            return None
        pipe.set_outputs(outputs)
    pipe.build()
    return pipe

"""What keeps a DALI graph at work: batches are looked up ahead of it, fed to it, and taken from it in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.placement import Placement, dali
from pipeline.records import Record, Records
from prep.manifest import StoreError

LOOKED_UP = 4  # batches whose pages are being read while others are decoded
IN_GRAPH = 2  # batches that DALI has at once: one being made, one made
_READERS = 2  # threads that look up: they wait for the disk


class Fed(NamedTuple):
    """One batch as it goes in."""

    numbers: npt.NDArray[np.int64]  # (N,): the records' numbers in the store's order
    labels: npt.NDArray[np.int64]  # (N,)
    records: Sequence[Record]  # held for as long as DALI looks at their pictures
    inputs: Mapping[str, Sequence[Any] | npt.NDArray[Any]]  # by the name of an external source: one for each image


Job = Callable[[], Fed]


def built(graph: Callable[[], Any], batch_size: int, placement: Placement, threads: int) -> Any:
    """A DALI pipeline whose outputs are what `graph()` gives, with the settings that all of ours share."""
    pipe = dali().Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=placement.device_id,
        exec_dynamic=True,  # gives every batch memory of its own
        prefetch_queue_depth=1,  # a Feed schedules ahead
    )
    with pipe:
        pipe.set_outputs(graph())
    pipe.build()
    return pipe


class Feed:
    """Takes jobs in order, and gives their outputs in the same order."""

    def __init__(self, pipe: Any, placement: Placement, records: Records) -> None:
        self._pipe, self._placement, self._records = pipe, placement, records
        self._readers = ThreadPoolExecutor(_READERS, "alexstream")
        self._jobs: Iterator[Job] = iter(())
        self._looked_up: deque[Future[Fed]] = deque()
        self._in_graph: deque[Fed] = deque()
        self._failed: StoreError | None = None  # for good: DALI does not go on, and no batch may be passed over

    def look_up(self, numbers: npt.NDArray[np.int64], inputs: Callable[[Sequence[Record]], Mapping[str, Any]]) -> Fed:
        """Records by number; `inputs(records)` gives what the graph takes for them. Raises StoreError as Records."""
        records = [self._records[number] for number in numbers.tolist()]
        return Fed(numbers, np.array([record.label for record in records], np.int64), records, inputs(records))

    def begin(self, jobs: Iterator[Job]) -> None:
        """Go on with other jobs; what is left of those before is dropped."""
        self._looked_up.clear()
        with suppress(StoreError):  # which `next` will raise
            while self._in_graph and self._failed is None:
                self._take()
        self._jobs = jobs

    def next(self) -> tuple[tuple[Any, ...], Fed] | None:
        """DALI's outputs for the next job, and what they were made of; None after the last job.

        Raises StoreError naming shard, key and source of a record that is damaged, from then on always; ValueError when
        closed.
        """
        if self._pipe is None:
            raise ValueError("the loader is closed")
        if self._failed is None:
            self._fill()
        if self._in_graph and self._failed is None:
            return self._take()
        if self._failed is not None:
            raise self._failed
        return None

    def close(self) -> None:
        """End DALI's threads and ours, and give back memory and files."""
        self._readers.shutdown(cancel_futures=True)
        self._looked_up.clear()
        self._jobs = iter(())
        if self._pipe is not None:
            self._pipe._shutdown()  # before the files that it reads; a traceback may hold the pipeline itself
        self._pipe = None
        self._in_graph.clear()
        self._records.close()

    def _fill(self) -> None:
        """Keep IN_GRAPH batches in the graph, and LOOKED_UP before it, while there are jobs."""
        while len(self._in_graph) < IN_GRAPH:
            for job in islice(self._jobs, LOOKED_UP - len(self._looked_up)):
                self._looked_up.append(self._readers.submit(job))
            if not self._looked_up:
                return
            try:
                fed = self._looked_up[0].result()
            except StoreError as error:
                if not self._in_graph:  # what precedes it is served first
                    self._failed = error
                return
            self._looked_up.popleft()
            for name, values in fed.inputs.items():
                self._pipe.feed_input(name, values)
            self._placement.schedule(self._pipe)
            self._in_graph.append(fed)

    def _take(self) -> tuple[tuple[Any, ...], Fed]:
        try:
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
            damage = self._records.damaged(number)
            if damage:
                return StoreError(f"{self._records.name(number)}: {damage}. {self._records.advice}")
        return StoreError(f"{store.root}, split {split}: DALI stopped ({cause}). {self._records.advice}")

"""Prefetch queue: reads records before the engine needs them, returns batches in order, and reports damaged records.

A batch passes three queues: records being read from disk (READ_AHEAD), batches in DALI (DALI_AHEAD), finished batches
(FINISHED_AHEAD). On a CPU, a separate thread takes DALI's outputs and calls Engine.finish while DALI decodes the next
batch. On a GPU, the consumer's thread takes the outputs, because DALI binds outputs to the current CUDA stream of the
thread that takes them.
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
from pipeline.engines.dali_shutdown import shut_down
from pipeline.engines.engine import Engine
from pipeline.placement import Placement, dali
from pipeline.records import Record, Records
from prep.store.manifest import StoreError

READ_AHEAD = 4  # number of batches whose records are read from disk while earlier batches are decoded
DALI_AHEAD = 2  # number of batches in DALI: one being decoded, one decoded
FINISHED_AHEAD = 2  # number of batches finished before they are requested (CPU only)
_READER_THREADS = 2  # number of threads that read records; these threads mostly wait for the disk


class BatchInput(NamedTuple):
    """Records of one batch, and the crops of these records."""

    record_numbers: npt.NDArray[np.int64]  # (N,): indices of the records in the store's order
    labels: npt.NDArray[np.int64]  # (N,)
    records: Sequence[Record]  # kept alive until the engine has read their payloads
    crops: Crops


class BatchOutput(NamedTuple):
    """Images of one batch, and the input from which the engine made the images."""

    images: torch.Tensor
    batch_input: BatchInput


Job = Callable[[], BatchInput]  # reads the records of one batch; runs on a reader thread


class Prefetcher:
    """Runs jobs before the consumer needs the images, and returns the images in the order of the jobs."""

    def __init__(self, engine: Engine, placement: Placement, records: Records, batch_size: int, threads: int) -> None:
        self._engine, self._placement, self._records = engine, placement, records
        self._pipe = _build_pipeline(engine.define_graph, batch_size, placement, threads)
        self._readers = ThreadPoolExecutor(_READER_THREADS, "alexstream")
        self._finisher = ThreadPoolExecutor(1, "alexstream") if placement.device_id is None else None
        self._jobs: Iterator[Job] = iter(())
        self._reading: deque[Future[tuple[BatchInput, dict[str, Any]]]] = deque()
        self._in_dali: deque[BatchInput] = deque()
        self._finished: deque[Future[BatchOutput | None]] = deque()
        # Every later call of `next` raises this error again, because DALI cannot continue.
        self._error: StoreError | None = None
        self._closed = False

    def read_batch(
        self, record_numbers: npt.NDArray[np.int64], make_crops: Callable[[Sequence[Record]], Crops]
    ) -> BatchInput:
        """Read records by number and make their crops. Jobs call this. Raises StoreError for a damaged record."""
        records = [self._records[number] for number in record_numbers.tolist()]
        labels = np.array([record.label for record in records], np.int64)
        return BatchInput(record_numbers, labels, records, make_crops(records))

    def start(self, jobs: Iterator[Job]) -> None:
        """Start new jobs. Batches of earlier jobs are dropped if they have not been served."""
        for future in self._finished:
            future.cancel()
        wait(self._finished)
        self._finished.clear()
        self._reading.clear()
        with suppress(StoreError):  # `next` raises the error later
            while self._in_dali and self._error is None:
                self._take_outputs()
        self._jobs = jobs

    def next(self) -> BatchOutput | None:
        """The images of the next job; None after the last job.

        Raises StoreError with shard, key and source of a damaged record, in this call and every later call. Raises
        ValueError after close.
        """
        if self._closed:
            raise ValueError("the loader is closed")
        if self._finisher is None:
            return self._finish_next()
        while len(self._finished) < FINISHED_AHEAD:
            self._finished.append(self._finisher.submit(self._finish_next))
        wait((self._finished[0],))  # if a KeyboardInterrupt occurs here, no batch is lost
        return self._finished.popleft().result()

    def close(self) -> None:
        """Stop DALI's threads and the prefetcher's own threads, release memory, and unmap the files."""
        self._closed = True
        self._readers.shutdown(cancel_futures=True)
        if self._finisher is not None:
            self._finisher.shutdown(cancel_futures=True)
        self._finished.clear()
        self._reading.clear()
        self._jobs = iter(())
        if self._pipe is not None:
            shut_down(self._pipe)  # the threads that read the mapped files must stop before the files are unmapped
        self._pipe = None
        self._in_dali.clear()
        self._engine.close()
        self._records.close()

    def _finish_next(self) -> BatchOutput | None:
        """Schedule more batches, then take and finish the oldest batch in DALI."""
        if self._error is None:
            self._schedule()
        if self._in_dali and self._error is None:
            outputs, batch_input = self._take_outputs()
            images = self._engine.finish(outputs, batch_input.records, batch_input.crops)
            return BatchOutput(images, batch_input)
        if self._error is not None:
            raise self._error
        return None

    def _schedule(self) -> None:
        """Keep DALI_AHEAD batches in DALI and READ_AHEAD further batches being read, until no jobs remain."""
        while len(self._in_dali) < DALI_AHEAD:
            for job in islice(self._jobs, READ_AHEAD - len(self._reading)):
                self._reading.append(self._readers.submit(self._run_job, job))
            if not self._reading:
                return
            try:
                batch_input, graph_inputs = self._reading[0].result()
            except StoreError as error:
                if not self._in_dali:  # batches already in DALI are served before the error is raised
                    self._error = error
                return
            self._reading.popleft()
            if self._pipe is not None:
                for name, values in graph_inputs.items():
                    self._pipe.feed_input(name, values)
                self._pipe.schedule_run()
            self._in_dali.append(batch_input)

    def _run_job(self, job: Job) -> tuple[BatchInput, dict[str, Any]]:
        batch_input = job()
        return batch_input, self._engine.graph_inputs(batch_input.records, batch_input.crops)

    def _take_outputs(self) -> tuple[tuple[Any, ...], BatchInput]:
        """The outputs and the input of the oldest batch in DALI. Raises StoreError if DALI has failed."""
        outputs: tuple[Any, ...] = ()
        try:
            if self._pipe is not None:
                outputs = self._placement.outputs(self._pipe)
        except RuntimeError as error:
            self._error = self._explain(error)
        if self._error is not None:
            raise self._error  # not raised within `except`: a chained DALI error would keep the pipeline alive
        return outputs, self._in_dali.popleft()

    def _explain(self, error: RuntimeError) -> StoreError:
        """Convert DALI's error to a StoreError that names the first damaged record of the batches in DALI."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        after = [k + 1 for k, line in enumerate(lines) if line.endswith("encountered:")]
        cause = next((line for line in lines[after[0] if after else 0 :]), repr(error))
        store, split = self._records.store, self._records.split
        for number in (int(number) for batch_input in self._in_dali for number in batch_input.record_numbers):
            damage = self._records.find_damage(number)
            if damage:
                return StoreError(f"{self._records.location(number)}: {damage}. {self._records.advice}")
        return StoreError(f"{store.root}, split {split}: DALI stopped ({cause}). {self._records.advice}")


def _build_pipeline(define_graph: Callable[[], Any], batch_size: int, placement: Placement, threads: int) -> Any:
    """Build a DALI pipeline with the outputs of `define_graph`; None if the engine needs no DALI."""
    pipe = dali().Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=placement.device_id,
        exec_dynamic=True,  # every batch gets separate memory
        prefetch_queue_depth=1,  # the Prefetcher schedules ahead itself
    )
    with pipe:
        outputs = define_graph()
        if outputs is None:
            return None
        pipe.set_outputs(outputs)
    pipe.build()
    return pipe

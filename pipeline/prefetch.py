"""Prefetch queue: reads records before the engine needs them, returns batches in order, and reports damaged records.

A batch passes through three queues. The first queue holds up to `read_ahead` batches whose records are being read from
disk. The second queue holds up to ENGINE_AHEAD batches in the engine (with DALI: DALI_AHEAD or DALI_GPU_AHEAD). The
third queue holds up to FINISHED_AHEAD finished batches. For an engine that uses DALI, the prefetcher runs a DALI
pipeline. For an engine without DALI, the prefetcher calls Engine.start. A separate thread, the finisher, calls
Engine.finish and takes the images while the engine works on the next batch.

Only the finisher changes the queues. A KeyboardInterrupt, which Python raises in the main thread, can therefore end a
call of `get` or `start` at any point: no batch is lost, and a repeated call gives the same batch.

The consumer is the code that takes the batches, usually a training loop. On a GPU, the finisher queues the last
operations of a batch on the engine's stream, not on the consumer's stream. The consumer's thread takes the batch and
the batch's event. All work that this thread queues afterwards waits for the event on the GPU.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import Crops
from pipeline.device import Placement
from pipeline.engines.cpu_engine import DecodeError
from pipeline.engines.dali_engine import build_pipeline
from pipeline.engines.dali_shutdown import shut_down
from pipeline.engines.device_stream import Event
from pipeline.engines.engine import Engine
from pipeline.records import RecordBatch, Records
from pipeline.selection.mixture import MixedRecords
from prep.store.manifest import StoreError

READ_AHEAD = 4  # number of batches whose records are read from disk while earlier batches are decoded
DALI_AHEAD = 2  # number of batches in DALI: one that is being decoded, and one that has been decoded
DALI_GPU_AHEAD = 4  # number of batches in DALI on a GPU, which decodes several batches at the same time
# Number of batches in an engine without DALI. While the first batch is being finished, the engine computes the second
# batch without a pause. A third batch keeps the engine busy during delays: another thread can hold the GIL for 5 ms,
# and 16 cores compute a batch in this time.
ENGINE_AHEAD = 3
FINISHED_AHEAD = 2  # number of batches that are finished before they are requested
# Number of served batches that a GPU may still have to process when the consumer requests the next batch. Two batches
# keep the GPU busy, and a third batch allows for delays of the consumer's thread.
CONSUMER_AHEAD = 3
_READER_THREADS = 4  # number of threads that read records; these threads mostly wait for the disk


class BatchInput(NamedTuple):
    """Records of one batch, the crops of these records, and values that are served with the images."""

    records: RecordBatch
    crops: Crops
    texts: Mapping[str, Sequence[str]] = {}  # texts that are served with the images, by name
    arrays: Mapping[str, npt.NDArray[Any]] = {}  # arrays that are copied to the device, by name


class BatchOutput(NamedTuple):
    """Images, labels and `arrays` of one batch on the device, and the input from which the engine made the images."""

    images: torch.Tensor
    labels: torch.Tensor
    batch_input: BatchInput
    arrays: Mapping[str, torch.Tensor]


class _Finished(NamedTuple):
    """A batch, and an event that passes when the tensors of the batch have been computed."""

    output: BatchOutput
    event: Event


class _Result(NamedTuple):
    """Result of one job."""

    number: int  # number of the job, counted from 0 since `start`
    batch: _Finished | None  # None after the last job, and after an error
    error: BaseException | None = None


Job = Callable[[], BatchInput]  # reads the records of one batch; the prefetcher calls each job on a reader thread


class Prefetcher:
    """Runs jobs before the consumer needs the images, and returns the images in the order of the jobs."""

    def __init__(
        self,
        engine: Engine,
        placement: Placement,
        records: Records | MixedRecords,
        batch_size: int,
        threads: int,
        read_ahead: int = READ_AHEAD,
        divisor: torch.Tensor | None = None,
    ) -> None:
        """`threads` is the number of DALI's threads. `read_ahead` is the number of jobs that run at the same time.

        If `divisor` is a tensor, each batch of images is divided by it, in place.
        """
        self._engine, self._placement, self._records = engine, placement, records
        self._pipe = build_pipeline(engine.define_graph, batch_size, placement, threads) if engine.uses_dali else None
        self._read_ahead = read_ahead
        self._readers = ThreadPoolExecutor(max(_READER_THREADS, read_ahead), "alexstream")
        self._finisher = ThreadPoolExecutor(1, "alexstream")
        self._ahead = ENGINE_AHEAD
        if engine.uses_dali:
            self._ahead = DALI_AHEAD if engine.stream.at_once else DALI_GPU_AHEAD
        self._jobs: Iterator[Job] = iter(())
        self._reading: deque[Future[tuple[BatchInput, dict[str, Any]]]] = deque()
        # For each batch in the engine: (input of the batch, result of Engine.start).
        self._in_engine: deque[tuple[BatchInput, Any]] = deque()
        self._finished: deque[_Result] = deque()  # only the finisher changes this queue
        self._next_number = 0  # `number` of the next _Result
        self._taken = 0  # number of results that `next` has returned since `start`
        self._is_restarting = False  # True while `start` waits for the finisher
        self._wake: SimpleQueue[None] = SimpleQueue()  # an item wakes the thread that waits in `get`
        self._divisor = divisor
        self._last_event = engine.stream.record()  # the event of the batch that was finished last
        # One event for each of the consumer's latest requests. The event passes when all work that the consumer queued
        # before the request is done.
        self._requests: deque[Event] = deque()
        # Error of a damaged record. Every later `get` raises it again: skipping a batch would shift all later batches.
        self._error: StoreError | None = None
        self._closed = False

    def read_batch(
        self, record_numbers: npt.NDArray[np.int64], make_crops: Callable[[RecordBatch], Crops]
    ) -> BatchInput:
        """Read records by number and make their crops, for a job. Raises StoreError for a damaged record."""
        records = self._records.batch(record_numbers)
        return BatchInput(records, make_crops(records))

    def start(self, jobs: Iterator[Job]) -> None:
        """Start new jobs. Batches of earlier jobs are dropped if they have not been served."""
        if self._closed:
            return
        self._is_restarting = True
        self._taken = 0
        self._finisher.submit(self._restart, jobs).result()

    def next(self) -> BatchOutput | None:
        """Return the images of the next job, as `get` does."""
        output = self.get(self._taken)
        self._taken += 1
        return output

    def get(self, number: int) -> BatchOutput | None:
        """Return the images of job `number`, counted from 0 since `start`; None after the last job.

        Another call with the same number returns the same images. A call with a higher number drops the images of the
        earlier jobs. Raises StoreError for a damaged record, in this call and in every later call. The error names
        shard, key and source of the record. Raises ValueError if the prefetcher was closed.
        """
        try:
            self._finisher.submit(self._finish_batches, number)
        except RuntimeError:
            if not self._closed:
                raise
        while (result := self._result(number)) is None:
            if self._closed:  # another thread can close the loader during this call
                raise ValueError("the loader is closed")
            self._wake.get()  # if a KeyboardInterrupt occurs during this wait, no batch is lost
        if self._closed:
            raise ValueError("the loader is closed")
        if result.error is not None:
            raise result.error
        if result.batch is None:
            return None
        output = result.batch.output
        result.batch.event.order(output.images, output.labels, *output.arrays.values())
        return output

    def _result(self, number: int) -> _Result | None:
        return next((result for result in tuple(self._finished) if result.number == number), None)

    def wait_for_consumer(self) -> None:
        """Wait until the GPU has at most CONSUMER_AHEAD batches left to process. Call this before each `next` or `get`.

        The consumer's thread only queues work for the GPU. Without this wait, the thread could request batches far
        ahead of the GPU, and all these batches would need memory. The loader would also count the thread's waits for
        the GPU as waits for batches.
        """
        self._requests.append(self._engine.stream.record_consumer())
        if len(self._requests) > CONSUMER_AHEAD:
            self._requests.popleft().wait()

    def close(self) -> None:
        """Stop the threads of DALI, the engine and the prefetcher, release memory, and unmap the files."""
        self._closed = True
        self._wake.put(None)
        self._readers.shutdown(cancel_futures=True)
        self._finisher.shutdown(cancel_futures=True)
        self._finished.clear()
        self._reading.clear()
        self._jobs = iter(())
        self._engine.stream.record().wait()
        if self._pipe is not None:
            shut_down(self._pipe)  # the threads that read the mapped files must stop before the files are unmapped
        self._pipe = None
        self._engine.close()
        self._in_engine.clear()
        self._error = None  # the traceback of the error would keep batches in memory
        self._records.close()

    def _restart(self, jobs: Iterator[Job]) -> None:
        """Drop all batches, and begin with `jobs`. Runs on the finisher's thread."""
        self._finished.clear()
        for future in self._reading:
            future.cancel()
        self._reading.clear()
        with suppress(StoreError):  # `get` raises this error later
            while self._in_engine and self._error is None:
                self._take_outputs()
        self._jobs, self._next_number = jobs, 0
        self._is_restarting = False

    def _finish_batches(self, needed: int) -> None:
        """Drop the results before number `needed`, and finish batches until FINISHED_AHEAD results are ready.

        Runs on the finisher's thread.
        """
        while not (self._is_restarting or self._closed):
            while self._finished and self._finished[0].number < needed:
                self._finished.popleft()
            if len(self._finished) >= FINISHED_AHEAD:
                return
            try:
                result = _Result(self._next_number, self._finish_next())
            except BaseException as error:
                result = _Result(self._next_number, None, error)
            self._next_number += 1
            self._finished.append(result)
            if self._wake.empty():
                self._wake.put(None)

    def _finish_next(self) -> _Finished | None:
        """Schedule more batches, then take and finish the oldest batch in the engine. Runs on the finisher's thread."""
        if self._error is None:
            self._schedule()
        if self._in_engine and self._error is None:
            outputs, batch_input = self._take_outputs()
            try:
                images = self._engine.finish(outputs, batch_input.records, batch_input.crops)
                self._records.check_maps()
                return self._record(images, batch_input)
            except DecodeError as error:
                self._error = self._damage_of([int(batch_input.records.numbers[error.index])], "cannot be decoded")
            except StoreError as error:
                self._error = error
        if self._error is not None:
            raise self._error
        return None

    def _record(self, images: torch.Tensor, batch_input: BatchInput) -> _Finished:
        """Queue the division by `divisor` and the copies of labels and `arrays`, then record the event of the batch.

        The finisher then waits until the previous batch is complete, so it is at most one batch ahead of the GPU. If
        the GPU needs long for a batch, the consumer's thread waits in `get`, where the loader measures the time.
        """
        stream = self._engine.stream
        if self._divisor is not None:
            if (self._divisor.device, self._divisor.dtype) != (images.device, images.dtype):
                self._divisor = stream.upload(self._divisor.to(images.dtype))
            divisor = self._divisor
            stream.run(lambda: images.div_(divisor))
        labels = stream.upload(torch.from_numpy(batch_input.records.labels))
        arrays = {name: stream.upload(torch.from_numpy(values)) for name, values in batch_input.arrays.items()}
        event = stream.record()
        self._last_event.wait()
        self._last_event = event
        return _Finished(BatchOutput(images, labels, batch_input, arrays), event)

    def _schedule(self) -> None:
        """Start batches until the engine has enough batches and `read_ahead` further batches are being read.

        If there are not enough jobs, fewer batches are started.
        """
        while len(self._in_engine) < self._ahead:
            for job in islice(self._jobs, self._read_ahead - len(self._reading)):
                self._reading.append(self._readers.submit(self._run_job, job))
            if not self._reading:
                return
            try:
                batch_input, graph_inputs = self._reading[0].result()
            except StoreError as error:
                if not self._in_engine:  # batches that are already in the engine are served before the error is raised
                    self._error = error
                return
            self._reading.popleft()
            started = None
            if self._pipe is None:
                started = self._engine.start(batch_input.records, batch_input.crops)
            else:
                for name, values in graph_inputs.items():
                    self._pipe.feed_input(name, values)
                self._pipe.schedule_run()
            self._in_engine.append((batch_input, started))

    def _run_job(self, job: Job) -> tuple[BatchInput, dict[str, Any]]:
        batch_input = job()
        return batch_input, self._engine.graph_inputs(batch_input.records, batch_input.crops)

    def _take_outputs(self) -> tuple[Any, BatchInput]:
        """Return the outputs and the input of the oldest batch in the engine. Raises StoreError if DALI has failed."""
        outputs: Any = self._in_engine[0][1]
        try:
            if self._pipe is not None:
                outputs = self._placement.outputs(self._pipe, self._engine.stream.dali_stream)
        except RuntimeError as error:
            self._error = self._explain(error)
        if self._error is not None:
            # The error is not raised within `except`, because a chained DALI error would keep the pipeline alive.
            raise self._error
        return outputs, self._in_engine.popleft()[0]

    def _explain(self, error: RuntimeError) -> StoreError:
        """Convert DALI's error to a StoreError that names the first damaged record of the batches in DALI."""
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        after = [k + 1 for k, line in enumerate(lines) if line.endswith("encountered:")]
        cause = next((line for line in lines[after[0] if after else 0 :]), repr(error))
        numbers = [number for batch, _ in self._in_engine for number in batch.records.numbers.tolist()]
        return self._damage_of(numbers, f"DALI stopped ({cause})")

    def _damage_of(self, numbers: Sequence[int], otherwise: str) -> StoreError:
        """Return the error for the first damaged record of `numbers`.

        If all records are intact, the message has the text `otherwise` and, if there is only one record, its location.
        """
        records = self._records
        try:
            records.check_maps()
            for number in numbers:
                damage = records.find_damage(number)
                if damage:
                    return StoreError(f"{records.location(number)}: {damage}. {records.advice}")
            place = f"{records.store.root}, split {records.split}"
            if len(numbers) == 1:
                place = records.location(numbers[0])
        except StoreError as error:
            return error
        return StoreError(f"{place}: {otherwise}. {records.advice}")

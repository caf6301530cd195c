"""Source of the windows of a loader that uses a service: the service or, after its loss, the local store.

A window is the decoded part of a record from which the loader makes an image (pipeline.windows). A loader requests
windows in blocks: one batch, or several consecutive batches (pipeline.service.protocol.block_steps).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from pipeline.records import RecordBatch
from pipeline.service.client import ServiceClient
from pipeline.service.errors import ServiceLost
from pipeline.service.protocol import StreamKey
from pipeline.service.status import ServiceStatus
from pipeline.windows import WindowMaker, WindowRequest, Windows
from prep.console import UserError, say
from prep.store.manifest import Store, StoreError

FALLBACKS = ("local",)


class _Block:
    """Consecutive batches whose windows are fetched together."""

    def __init__(self, requests: Sequence[WindowRequest]) -> None:
        self.requests = requests
        self.windows: Future[Windows] = Future()
        self.taken = 0  # number of the block's batches that threads have requested so far


class WindowSource:
    """Fetches the windows of one loader's batches."""

    def __init__(
        self,
        service: str,
        stream: StreamKey,
        store: Store,
        threads: int,
        waited_s: Callable[[], float],
        fallback: str | None,
        request_at: Callable[[int], WindowRequest | None],
    ) -> None:
        """Connect to the service.

        `request_at(position)` returns the request for the batch at a position, or None after the last position. With
        fallback="local", the loader continues with the local `store` if the service is lost. Raises UserError for any
        other value of `fallback`, and StoreError if shards of the local store are missing. Also raises the
        ServiceErrors of ServiceClient.
        """
        if fallback is not None:
            if fallback not in FALLBACKS:
                raise UserError(f"service fallback {fallback!r}: expected local.")
            store.shard_paths(stream.split)
        self._store, self._threads, self._fallback = store, threads, fallback
        self._batch_size, self._request_at = stream.batch_size, request_at
        self._first = 0  # position of the first batch since `start`
        self._blocks: dict[int, _Block] = {}  # position of the first batch -> block
        self._client = ServiceClient(service, stream, waited_s)
        self._maker: WindowMaker | None = None  # reads the local store; created when the service is lost
        self._lock = threading.Lock()

    @property
    def read_ahead(self) -> int:
        """Number of batches to read at the same time."""
        return self._client.read_ahead

    @property
    def status(self) -> ServiceStatus:
        """The state of the service. The field `state` is "local" after the service has been lost."""
        status = self._client.status
        return status if self._maker is None else status._replace(workers=0, queue=0, state="local")

    def start(self, position: int) -> None:
        """Start reading at a position of the stream."""
        self._client.start(position)
        with self._lock:
            self._first, self._blocks = position, {}

    def records(self, position: int) -> RecordBatch:
        """Return the windows of the batch at a position, as raw records.

        Several threads may call this method at the same time. Each block is fetched once, by the first thread that
        needs one of its batches. Raises the same errors as ServiceClient.fetch.
        """
        request = self._request_at(position)
        assert request is not None
        if self._maker is None:
            try:
                return self._windows(position, request).records(request.numbers)
            except ServiceLost as error:
                if self._fallback is None:
                    raise
                self._begin_fallback(error)
        assert self._maker is not None
        return self._maker.make(request).records(request.numbers)

    def finish(self) -> None:
        """Tell the service that the loader needs no further batch for now."""
        if self._maker is None:
            self._client.finish()

    def stop(self) -> None:
        """Let every call of `records` that is waiting for the service raise ServiceError."""
        self._client.stop()

    def close(self) -> None:
        """Disconnect from the service, drop the windows that it sent, and unmap the files of the local store."""
        self._client.close()
        with self._lock:
            self._blocks = {}  # Ray keeps the pixels of a block in shared memory as long as this process refers to them
        if self._maker is not None:
            self._maker.close()

    def _windows(self, position: int, request: WindowRequest) -> Windows:
        """Return the windows of the batch at `position`: the batch's part of the block that holds this batch."""
        first, block, is_new = self._block(position)
        if is_new:
            try:
                block.windows.set_result(self._client.fetch(first, block.requests))
            except BaseException as error:
                block.windows.set_exception(error)
        try:
            windows = block.windows.result()
        except StoreError:
            if len(block.requests) == 1:
                raise
            # The damaged record may belong to another batch of the block, so this batch is fetched alone.
            return self._client.fetch(position, [request]).part(slice(None))
        finally:
            # The traceback of an error refers to this frame. If this frame referred to the error through `block`, both
            # would keep each other in memory.
            del block
        begin = (position - first) * self._batch_size
        return windows.part(slice(begin, begin + len(request.numbers)))

    def _block(self, position: int) -> tuple[int, _Block, bool]:
        """Return the block that contains the batch at a position; create the block if it does not exist.

        Returns (position of the block's first batch, block, whether the block is new).
        """
        steps = self._client.block_steps
        with self._lock:
            first = position - position % steps
            end = first + steps
            if first < self._first <= position:
                first = self._first
            block = self._blocks.get(first)
            is_new = block is None
            if block is None:
                requests = (self._request_at(number) for number in range(first, end))
                block = self._blocks[first] = _Block([request for request in requests if request is not None])
            block.taken += 1
            if block.taken == len(block.requests):
                del self._blocks[first]
            return first, block, is_new

    def _begin_fallback(self, error: ServiceLost) -> None:
        with self._lock:
            if self._maker is None:
                reason = str(error).partition(". Start the service")[0]
                say(f"{reason}. This process now makes the batches itself, from {self._store.root}.")
                self._maker = WindowMaker(self._store, self._threads)

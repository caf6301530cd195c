"""Where a loader with a service gets its windows: the service or, after its loss, the local store."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pipeline.records import RecordBatch
from pipeline.service.client import ServiceClient
from pipeline.service.errors import ServiceLost
from pipeline.service.protocol import StreamKey
from pipeline.service.status import ServiceStatus
from pipeline.windows import WindowMaker, WindowRequest
from prep.console import UserError, say
from prep.store.manifest import Store

FALLBACKS = ("local",)


class WindowSource:
    """The windows of one loader."""

    def __init__(
        self,
        service: str,
        stream: StreamKey,
        store: Store,
        threads: int,
        waited_s: Callable[[], float],
        fallback: str | None,
    ) -> None:
        """Connect to the service.

        With fallback="local", the loader goes on with the local `store` if the service is lost. Raises UserError for
        another value of `fallback`, StoreError if the fallback's shards are missing, and ServiceError as ServiceClient.
        """
        if fallback is not None:
            if fallback not in FALLBACKS:
                raise UserError(f"service fallback {fallback!r}: expected local.")
            store.shard_paths(stream.split)
        self._store, self._threads, self._fallback = store, threads, fallback
        self._split = stream.split
        self._client = ServiceClient(service, stream, waited_s)
        self._maker: WindowMaker | None = None  # made when the service is lost
        self._lock = threading.Lock()

    @property
    def read_ahead(self) -> int:
        """Number of batches to read at the same time."""
        return self._client.read_ahead

    @property
    def status(self) -> ServiceStatus:
        """The state of the service. After its loss, the state is "local"."""
        status = self._client.status
        return status if self._maker is None else status._replace(workers=0, queue=0, state="local")

    def start(self, position: int) -> None:
        """Begin to read at a position of the stream."""
        self._client.start(position)

    def records(
        self, position: int, numbers: npt.NDArray[np.int64], offset: npt.NDArray[np.int32], window_px: int
    ) -> RecordBatch:
        """The windows of a batch as raw records.

        numbers    (N,): record numbers
        offset     (N, 2): row and column of each window in the central square
        window_px  side of the windows

        Raises StoreError, ServiceLost and ServiceError as ServiceClient.fetch.
        """
        request = WindowRequest(self._split, np.ascontiguousarray(numbers), np.ascontiguousarray(offset), window_px)
        if self._maker is None:
            try:
                return self._client.fetch(position, request).records(numbers)
            except ServiceLost as error:
                if self._fallback is None:
                    raise
                self._begin_fallback(error)
        assert self._maker is not None
        return self._maker.make(request).records(numbers)

    def finish(self) -> None:
        """No further batch is needed for now."""
        if self._maker is None:
            self._client.finish()

    def stop(self) -> None:
        """End the calls of `records` that wait for the service."""
        self._client.stop()

    def close(self) -> None:
        """Leave the service, and unmap the files of the fallback."""
        self._client.close()
        if self._maker is not None:
            self._maker.close()

    def _begin_fallback(self, error: ServiceLost) -> None:
        with self._lock:
            if self._maker is None:
                reason = str(error).partition(". Start the service")[0]
                say(f"{reason}. The batches are now made from {self._store.root} on this machine.")
                self._maker = WindowMaker(self._store, self._threads)

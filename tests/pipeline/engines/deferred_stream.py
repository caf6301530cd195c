"""A DeviceStream for tests on a CPU. It does its work as late as a GPU could do the work.

Queued work is done as late as possible: when the code under test uses an event that was recorded after the work. The
code either waits for the event, or orders the consumer's work after the event. Before the work is done, the memory of
the results holds NaN (floating-point numbers) or 113 (integers). If the code does not wait, a test sees NaN or 113
instead of the results.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class DeferredStream:
    device = torch.device("cpu")
    at_once = False
    dali_stream: Any = None

    def __init__(self) -> None:
        self.ordered: set[int] = set()  # addresses of the tensors that were passed to DeferredEvent.order
        self.waits = 0  # number of calls of DeferredEvent.wait for events of this stream
        self._lock = threading.RLock()
        self._queue: deque[Callable[[], object]] = deque()
        self._queued = self._done = 0

    @property
    def queued_work(self) -> int:
        """Number of pieces of work that are not done yet."""
        return len(self._queue)

    def run(self, work: Callable[[], object]) -> None:
        with self._lock:
            self._queue.append(work)
            self._queued += 1

    def record(self) -> DeferredEvent:
        return DeferredEvent(self, self._queued)

    def record_consumer(self) -> DeferredEvent:
        return DeferredEvent(self, 0)  # in these tests, the consumer's work is done at once

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else 113, dtype=dtype)

    def host_memory(self, size_bytes: int) -> Tensor:
        return torch.full((size_bytes,), 113, dtype=torch.uint8)

    def upload(self, values: Tensor) -> Tensor:
        copy, now = self.empty(values.shape, values.dtype), values.clone()
        self.run(lambda: copy.copy_(now))
        return copy

    def work_until(self, count: int) -> None:
        """Do queued work in order, until `count` pieces of work have been done since the stream was made."""
        with self._lock:
            while self._done < count:
                self._queue.popleft()()
                self._done += 1


class DeferredEvent:
    def __init__(self, stream: DeferredStream, count: int) -> None:
        self._stream, self._count = stream, count

    def wait(self) -> None:
        self._stream.waits += 1
        self._stream.work_until(self._count)

    def order(self, *tensors: Tensor) -> None:
        self._stream.work_until(self._count)
        self._stream.ordered |= {tensor.data_ptr() for tensor in tensors}

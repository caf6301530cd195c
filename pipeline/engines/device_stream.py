"""One interface for the work of the loader on a GPU and on a CPU. The work is done in the order in which it was queued.

The consumer is the code that uses the batches, usually a training loop. On a GPU, the loader queues copies and kernels
on its own CUDA stream. This work can run at the same time as kernels of the consumer. Two rules keep the results
correct:

- Code that uses a result first waits for an event that was recorded after the work that computes the result. With
  `Event.wait`, a thread of the host waits. With `Event.order`, all kernels that the consumer queues later wait on the
  GPU.
- The consumer passes its tensors to `Event.order`, which tells torch that the consumer's stream uses their memory.
  Otherwise, torch could give the memory to the loader's next batch while the consumer's kernels still read it.

On a CPU, InOrderStream does all work immediately. The stream in tests/pipeline/engines/deferred_stream.py, which tests
use on a CPU, does work only when the code waits for an event that was recorded after the work. If the code lacks a
wait, a test finds wrong values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pipeline.device import Placement

Work = Callable[[], object]


class Event(Protocol):
    """A point in the sequence of a stream's work."""

    def wait(self) -> None:
        """Let the calling thread wait until all work before this event is done."""

    def order(self, *tensors: Tensor) -> None:
        """Make all work that the caller later queues on its current stream wait for this event.

        The memory of `tensors` is not reused before the waiting work is done, even if no tensor refers to this memory
        any more.
        """


class DeviceStream(Protocol):
    """Does work on one device, in the order in which the work was queued."""

    device: torch.device
    at_once: bool  # True: `run` returns only when the work is done
    dali_stream: Any  # the CUDA stream for nvidia.dali.Pipeline.outputs; None on a CPU

    def run(self, work: Work) -> None:
        """Queue `work` after all earlier work.

        The results of `work` are undefined until an event that follows `work` has passed. `work` may use only tensors
        that this stream made, or that existed before the call.
        """

    def record(self) -> Event:
        """Return an event that passes when all queued work is done."""

    def record_consumer(self) -> Event:
        """Return an event that passes when the caller's earlier work is done.

        The earlier work is all work that the caller has queued on its own current stream of the device.
        """

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory on the device for the results of `run`."""

    def host_memory(self, size_bytes: int) -> Tensor:
        """Return uninitialized uint8 memory (size_bytes,) of the host.

        A copy from this memory to the device never blocks the host.
        """

    def upload(self, values: Tensor) -> Tensor:
        """Queue a copy of a tensor of the host to the device. On a CPU the result can be `values` itself."""


class CudaStream:
    """A CUDA stream of the loader."""

    at_once = False

    def __init__(self, device_id: int) -> None:
        self.device = torch.device("cuda", device_id)
        self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]  # torch's class has no types
        self.dali_stream = self._stream

    def run(self, work: Work) -> None:
        """Launch the kernels of `work` on this stream."""
        with torch.cuda.stream(self._stream):  # also makes this GPU the current device
            work()

    def record(self) -> Event:
        """Return an event that passes when all work that was launched on this stream is done."""
        return _CudaEvent(self._stream)

    def record_consumer(self) -> Event:
        """Return an event that passes when the work on the caller's current stream of this GPU is done."""
        return _CudaEvent(torch.cuda.current_stream(self.device))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory on the GPU. Once released, it is reused only for later work on this stream."""
        with torch.cuda.stream(self._stream):
            return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def host_memory(self, size_bytes: int) -> Tensor:
        """Return pinned memory. A copy from memory that is not pinned would block the host."""
        with torch.cuda.device(self.device):  # without this context, the pinned memory would belong to GPU 0
            return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)

    def upload(self, values: Tensor) -> Tensor:
        """Copy through pinned memory, which torch does not reuse before the copy is done."""
        with torch.cuda.stream(self._stream):
            return values.pin_memory().to(self.device, non_blocking=True)


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        # blocking=True lets a waiting thread sleep. By default, a waiting thread would keep a core busy.
        self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        self._event.synchronize()

    def order(self, *tensors: Tensor) -> None:
        consumer = torch.cuda.current_stream(self._device)
        consumer.wait_event(self._event)
        for tensor in tensors:
            tensor.record_stream(consumer)


class InOrderStream:
    """Does all work on the CPU, immediately."""

    device = torch.device("cpu")
    at_once = True
    dali_stream: Any = None

    def run(self, work: Work) -> None:
        """Do the work."""
        work()

    def record(self) -> Event:
        """Return an event that has passed already, because all work is done immediately."""
        return _PASSED

    def record_consumer(self) -> Event:
        """Return an event that has passed already, because all work is done immediately."""
        return _PASSED

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory of the host."""
        return torch.empty(tuple(shape), dtype=dtype)

    def host_memory(self, size_bytes: int) -> Tensor:
        """Return uninitialized memory of the host."""
        return torch.empty(size_bytes, dtype=torch.uint8)

    def upload(self, values: Tensor) -> Tensor:
        """Return `values` itself."""
        return values


class _PassedEvent:
    def wait(self) -> None:
        pass

    def order(self, *tensors: Tensor) -> None:
        pass


_PASSED = _PassedEvent()


def open_stream(placement: Placement) -> DeviceStream:
    """Return the stream for the loader's device."""
    return InOrderStream() if placement.device_id is None else CudaStream(placement.device_id)

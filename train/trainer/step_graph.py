"""Training steps as a CUDA graph: the kernels of a step are recorded once and launched with one call.

A graph repeats the recorded kernels with the recorded addresses and the recorded Python numbers. Values that change
from step to step therefore lie in tensors that the graph reads: the images, the labels, and the learning rates
(PaperSGD.use_rate_tensor). The graph itself changes the counters (train/monitor/step_counters.py) and the position of
the random generator. A graph is recorded again if the shape of a batch changes or a layer is frozen.

A recording can contain neither an allocation by a library nor a compilation by Triton. Libraries allocate, and Triton
compiles, when a kernel runs for the first time. The steps before a recording therefore run without a graph, as ordinary
training steps on the batches of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from prep.console import say
from train.model.gpu.fault import triton_fault
from train.monitor.step_counters import StepCounters
from train.trainer.step import TrainingStep

_STEPS_BEFORE_RECORDING = 3


class Graph(Protocol):
    """Work that is recorded once and repeated any number of times."""

    def run_unrecorded(self, work: Callable[[], None]) -> None:
        """Run `work` in the way in which it will be recorded, for example on the same stream."""

    def record(self, work: Callable[[], None]) -> None:
        """Record the operations of `work`. Tensors that existed before the recording keep their values."""

    def replay(self) -> None:
        """Run the recorded operations on the present values of their tensors."""


class CudaGraph:
    """A graph on a GPU (torch.cuda.CUDAGraph)."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it
        self._graph: torch.cuda.CUDAGraph | None = None

    def run_unrecorded(self, work: Callable[[], None]) -> None:
        """Run `work` on the recording's stream, after the earlier and before the later work of the current stream."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def record(self, work: Callable[[], None]) -> None:
        """Record `work`. The memory of an earlier recording is released first.

        If memory runs out, raises torch.OutOfMemoryError instead of the RuntimeError of the broken recording.
        """
        self._graph = None
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # "thread_local" lets other threads, such as those of the loader, allocate memory during the recording.
        no_memory: torch.OutOfMemoryError | None = None
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                try:
                    work()
                except torch.OutOfMemoryError as error:
                    no_memory = error
        except RuntimeError:
            if no_memory is None:
                raise
        if no_memory is not None:
            raise no_memory
        self._graph = graph

    def replay(self) -> None:
        """Launch the recorded kernels on the current stream."""
        assert self._graph is not None
        self._graph.replay()


def graph_for(devices: Sequence[torch.device]) -> Graph | None:
    """Return a CudaGraph if all columns are on one GPU and the Triton kernels work on it; otherwise None.

    With two GPUs there is no graph: it would have to record the kernels of both GPUs, and the copies between the GPUs.
    """
    if len(set(devices)) > 1 or devices[0].type != "cuda" or triton_fault(devices[0]) is not None:
        return None
    return CudaGraph(devices[0])


class CountedStep:
    """A callable that trains the network on one batch and adds the result to the counters."""

    def __init__(self, step: TrainingStep, counters: StepCounters, graph: Graph | None = None) -> None:
        """With a `graph`, steps are recorded and replayed. Without a graph, steps run operator by operator."""
        self._step, self._counters, self._graph = step, counters, graph
        self._recorded_key: object = None
        self._unrecorded_key: object = None
        self._unrecorded_steps = 0
        self._images = self._labels = torch.empty(0)
        self._reads_rate_tensor = graph is not None
        if graph is not None:
            step.optimizer.use_rate_tensor()

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Update the parameters once. Takes the arguments of TrainingStep, and raises the same errors."""
        if self._reads_rate_tensor:
            self._step.optimizer.write_rates()
        if self._graph is None:
            self._counters.add(*self._step(images, labels))
            return
        key = (images.shape, images.dtype, *(p.requires_grad for p in self._step.network.parameters()))
        if key == self._recorded_key:
            self._images.copy_(images, non_blocking=True)
            self._labels.copy_(labels, non_blocking=True)
            self._graph.replay()
            return
        if key != self._unrecorded_key:
            self._unrecorded_key, self._unrecorded_steps = key, 0
        if self._unrecorded_steps < _STEPS_BEFORE_RECORDING:
            self._unrecorded_steps += 1
            # A recorded update reads a table of gradient addresses. A step without recording overwrites the table, so
            # the recording becomes invalid.
            self._recorded_key = None
            self._graph.run_unrecorded(lambda: self._counters.add(*self._step(images, labels)))
            return
        device = self._step.network.devices[0]
        self._images, self._labels = images.to(device, copy=True), labels.to(device, copy=True)
        self._step.optimizer.zero_grad(set_to_none=True)  # so that the recording allocates new gradients
        try:
            self._graph.record(lambda: self._counters.add(*self._step(self._images, self._labels)))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # an operator cannot be recorded; at this point, no kernel of the step has run
            say(
                f"{device}: a training step could not be recorded as a CUDA graph ({str(error).splitlines()[0]}). "
                "Training continues without a graph, which takes longer."
            )
            self._graph = None
            self._counters.add(*self._step(images, labels))
            return
        self._step.optimizer.write_addresses()
        self._recorded_key = key
        self._graph.replay()

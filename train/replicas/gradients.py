"""Sums of the gradients of all replicas, in one exchange per step and device.

The gradients of a device's parameters are copied into one flat tensor, which is summed over the ranks. Afterwards, the
gradients of the parameters are views of this sum, so nothing is copied back. TrainingStep divides the loss by the
number of images of the whole step. The sum is therefore the gradient of the mean loss, as in one process.

Each kind of exchange gives the same bits on every rank:

SharedMemory    CPU replicas on one machine. Each rank copies its gradients into its own part of shared memory. Each
                part is divided into one range per rank, and rank r sums range r over all parts. On two cores, this
                exchange takes a tenth of the time of gloo's exchange over TCP.
Gloo            CPU replicas on several machines.
Nccl            GPUs. The exchange is queued on the GPU's current stream, so a CUDA graph can contain it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prep.console import say
from train.replicas.link import Link
from train.replicas.shared_memory import NoSharedMemory, SharedMemory


class Exchange(Protocol):
    """The exchange of one device's gradients."""

    own: Tensor  # (n,) float32: this rank writes its summands into `own`
    # (n,) float32: the sum over the ranks, valid until the next call of `sum`. `total` must not be changed.
    total: Tensor

    def sum(self) -> None:
        """Compute `total` from `own` of all ranks."""


class GradientSum:
    """Replaces the gradients of parameters by their sums over the ranks."""

    def __init__(self, parameters: Iterable[nn.Parameter], link: Link, over_tcp: bool = False) -> None:
        """Open an exchange for each device that holds parameters.

        All ranks call this method at the same time, with parameters of the same shapes in the same order.

        over_tcp  True: CPU replicas exchange gradients over TCP, even if all replicas are on one machine
        """
        by_device: dict[torch.device, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_device.setdefault(parameter.device, []).append(parameter)
        self._exchanges = [
            _FlatGradients(own, _exchange(device, sum(p.numel() for p in own), link, over_tcp))
            for device, own in by_device.items()
        ]

    @torch.no_grad()
    def run(self) -> None:
        """Sum the gradients.

        Parameters without a gradient still have no gradient after the exchange. On CPUs, the host waits for the sum. On
        GPUs, the sum is queued, and the host does not wait. After this call, the gradients are views of memory that all
        replicas of a machine may share. Do not change the gradients.
        """
        for exchange in self._exchanges:
            exchange.run()


class _FlatGradients:
    def __init__(self, parameters: list[nn.Parameter], exchange: Exchange) -> None:
        self._parameters, self._exchange = parameters, exchange
        self._own, self._total = _views(parameters, exchange.own), _views(parameters, exchange.total)

    def run(self) -> None:
        for parameter, own in zip(self._parameters, self._own, strict=True):
            if parameter.grad is not None:
                own.copy_(parameter.grad)
                parameter.grad = own  # releases the memory of the old gradient before the exchange
        self._exchange.sum()
        for parameter, total in zip(self._parameters, self._total, strict=True):
            if parameter.grad is not None:
                parameter.grad = total


def _views(parameters: list[nn.Parameter], flat: Tensor) -> list[Tensor]:
    """Return a part of a flat tensor for each parameter, in the shape and the memory layout of the parameter."""
    pieces = torch.split(flat, [p.numel() for p in parameters])
    return [
        piece.as_strided(p.shape, p.stride(), piece.storage_offset())
        for piece, p in zip(pieces, parameters, strict=True)
    ]


def _exchange(device: torch.device, size: int, link: Link, over_tcp: bool) -> Exchange:
    if device.type == "cuda":
        return Nccl(device, size, link)
    if over_tcp:
        return Gloo(size, link)
    try:
        return SharedMemory(size, link)
    except NoSharedMemory as error:
        if link.rank == 0:
            say(f"Gradients are exchanged over TCP, because {error}.")
        return Gloo(size, link)


class Gloo:
    """The exchange of CPU replicas over TCP."""

    def __init__(self, size: int, link: Link) -> None:
        self.own = self.total = torch.zeros(size)
        self._link = link

    def sum(self) -> None:
        """Sum `own` over the ranks in place."""
        with self._link.exchange():
            self._link.gloo.allreduce([self.own]).wait()


class Nccl:
    """The exchange of GPUs. Each device of a rank has its own connection."""

    def __init__(self, device: torch.device, size: int, link: Link) -> None:
        from torch.distributed import (  # type: ignore[attr-defined]  # torch does not list these names in __all__
            PrefixStore,
            ProcessGroupNCCL,  # this class exists only in builds of torch with CUDA
        )

        self.own = self.total = torch.zeros(size, device=device)
        options = ProcessGroupNCCL.Options()
        # If a rank hangs, the exchanges of `link` end after link.timeout, with an error that names the rank. NCCL would
        # end the process without a message, so NCCL's time-out is longer.
        options._timeout = 2 * link.timeout
        self._group: Any = ProcessGroupNCCL(PrefixStore(link.new_name(), link.store), link.rank, link.size, options)
        link.at_end(self._group.abort)
        with link.exchange(), torch.cuda.device(device):
            self.sum()  # the first sum opens the connection, which is not possible while a CUDA graph is recorded
            torch.cuda.synchronize(device)

    def sum(self) -> None:
        """Queue the sum of `own` over the ranks in place.

        The current stream waits for the sum, but the host does not wait.
        """
        self._group.allreduce([self.own]).wait()

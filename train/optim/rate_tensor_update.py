"""The update rule (paper_sgd.py) of all parameters on one device, with the learning rates in a tensor.

A CUDA graph repeats the Python numbers that were recorded, but learning rates change. A tensor therefore holds the
learning rate of each parameter group. On a GPU, one Triton kernel updates all parameters of all groups. The kernel
reads a table with the addresses of the parameters, velocities and gradients. If a step is recorded as a CUDA graph, the
table is written after the recording, when the addresses of the gradients are known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from train.optim.fused_sgd import same_dense_layout

_BLOCK = 4096  # number of values that a program of the kernel updates


class Trio(NamedTuple):
    """A parameter with its velocity, the index of its parameter group, and its weight decay."""

    parameter: nn.Parameter
    velocity: Tensor
    group: int
    decay: float


@torch.no_grad()
def update_with_rate(w: Tensor, v: Tensor, gradient: Tensor, momentum: float, rate: Tensor, decay: float) -> None:
    """Update one parameter by the formula of RateTensorUpdate, with PyTorch operators. `rate` has the shape ()."""
    v.mul_(momentum).sub_(rate * (gradient + decay * w if decay else gradient))
    w.add_(v)


class RateTensorUpdate:
    """Updates parameters in place: v ← momentum · v − rate · decay · w − rate · g, then w ← w + v.

    `rate` is the learning rate of the parameter's group, times the parameter's scale if `run` is given scales.
    """

    def __init__(self, trios: Sequence[Trio], groups: int, momentum: float) -> None:
        """All parameters and velocities are float32 and on one device. Raises ValueError otherwise."""
        tensors = [t for trio in trios for t in (trio.parameter, trio.velocity)]
        if len({t.device for t in tensors}) > 1 or any(t.dtype != torch.float32 for t in tensors):
            raise ValueError("parameters of several devices or types: expected float32 on one device")
        self._trios, self._momentum, self._device = list(trios), momentum, tensors[0].device
        self._rates = torch.zeros(groups, device=self._device)
        self._written: list[float | None] = [None] * groups
        self._decays = torch.tensor([trio.decay for trio in trios], device=self._device)
        self._scales = torch.ones(len(trios), device=self._device)  # factor of each parameter's rate: λ of lars.py
        # One row for each parameter: addresses of parameter, velocity and gradient; number of values; group's index
        self._table = torch.zeros(len(trios), 5, dtype=torch.int64, device=self._device)
        sizes = [trio.parameter.numel() for trio in trios]
        blocks = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, _BLOCK)]
        self._blocks = torch.tensor(blocks, dtype=torch.int64, device=self._device)

    def write_rates(self, rates: Sequence[float]) -> None:
        """Set the learning rate of each group. Only rates that have changed are written to the device."""
        for index, rate in enumerate(rates):
            if self._written[index] != rate:
                self._rates[index].fill_(rate)  # fill_ passes the rate as an argument of a kernel, without a copy
                self._written[index] = rate

    def run(self, scales: Mapping[nn.Parameter, Tensor] | None = None) -> None:
        """Update every parameter that has a gradient.

        scales  for each parameter with a gradient, the factor of its learning rate: a tensor of shape () on the device;
                None: all factors are 1
        """
        if scales is not None:
            unscaled = torch.ones((), dtype=torch.float64, device=self._device)
            self._scales.copy_(torch.stack([scales.get(trio.parameter, unscaled) for trio in self._trios]))
        if self._device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
            self.write_addresses()
        if self._device.type == "cuda":
            self.launch()
        else:
            self.run_operators()

    @torch.no_grad()
    def run_operators(self) -> None:
        """Make the same update as `run`, but with PyTorch operators, on any device."""
        for (w, v, group, decay), scale in zip(self._trios, self._scales, strict=True):
            if w.grad is not None:
                update_with_rate(w, v, w.grad, self._momentum, self._rates[group] * scale, decay)

    def write_addresses(self) -> None:
        """Write the table for the kernel.

        In the row of a parameter without a gradient, the number of values is 0, so that the kernel does not update the
        parameter.
        """
        rows = []
        for w, v, group, _ in self._trios:
            if w.grad is None:
                rows.append((0, 0, 0, 0, group))
                continue
            if not same_dense_layout(w, v, w.grad):
                raise ValueError("a gradient has another memory layout than its parameter")
            if any(t.data_ptr() % 16 for t in (w, v, w.grad)):  # for example, t is a view into a larger tensor
                raise ValueError("a tensor's address is not a multiple of 16 bytes; the kernel needs a multiple of 16")
            rows.append((w.data_ptr(), v.data_ptr(), w.grad.data_ptr(), w.numel(), group))
        self._table.copy_(torch.tensor(rows, dtype=torch.int64))

    def launch(self) -> None:
        """Launch the Triton kernel for the addresses in the table."""
        from train.optim.rate_tensor_update_triton import update

        kernel: Any = update
        with torch.cuda.device_of(self._rates):  # type: ignore[no-untyped-call]  # torch has no types for it
            kernel[(len(self._blocks),)](
                self._table, self._blocks, self._decays, self._scales, self._rates, self._momentum, BLOCK=_BLOCK
            )
        torch.autograd.graph.increment_version([t for w, v, *_ in self._trios for t in (w, v)])

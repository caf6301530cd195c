"""Sums of losses and errors, and smallest and largest label, over the steps between two log lines.

The values are in tensors on the device. The tensors are allocated once and changed in place, so that a CUDA graph of a
step can contain the updates. Only `read` waits for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.evaluation.evaluate import top_k_misses
from train.replicas.group import ReplicaGroup

_NO_LABEL = (2**62, -1)  # initial values of the smallest and the largest label


class Counts(NamedTuple):
    """The counts of the steps between two calls of StepCounters.read."""

    losses: list[float]  # loss of each step, in nats
    loss_sum: float  # float32 sum of the losses
    misses: tuple[int, int]  # numbers of top-1 and top-5 misses
    smallest_label: int
    largest_label: int


class StepCounters:
    """Collects the results of up to `max_steps` steps on a device."""

    def __init__(self, device: torch.device, max_steps: int) -> None:
        self._losses, self._positions = torch.zeros(max_steps, device=device), torch.arange(max_steps, device=device)
        self._loss_sum = torch.zeros((), device=device)
        self._step = torch.zeros(1, dtype=torch.int64, device=device)  # number of steps that were added
        self._misses = torch.zeros(2, dtype=torch.int64, device=device)
        self._smallest = torch.full((), _NO_LABEL[0], device=device)
        self._largest = torch.full((), _NO_LABEL[1], device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add the result of a step: loss (), logits (N, classes), labels (N,), all on the device."""
        # With deterministic algorithms, index_copy_ would wait for the GPU, and a CUDA graph cannot contain a wait.
        torch.where(self._positions == self._step, loss, self._losses, out=self._losses)
        self._loss_sum += loss
        self._step += 1
        self._misses += top_k_misses(logits, labels)
        smallest, largest = labels.aminmax()
        torch.minimum(self._smallest, smallest, out=self._smallest)
        torch.maximum(self._largest, largest, out=self._largest)

    def read(self) -> Counts:
        """Return the counts since the last call, and reset the counters. This call waits once for the device.

        Raises IndexError if more than `max_steps` steps have been added.
        """
        numbers = (self._step, self._misses, self._smallest, self._largest, self._loss_sum, self._losses)
        steps, top1, top5, smallest, largest, loss_sum, *losses = torch.cat(
            # Float64 can hold every float32, and integers up to 2^53.
            [tensor.double().reshape(-1) for tensor in numbers]
        ).tolist()
        if steps > len(losses):
            raise IndexError(f"{int(steps)} steps were added, but the counters hold {len(losses)}")
        for tensor in (self._step, self._misses, self._loss_sum, self._losses):
            tensor.zero_()
        self._smallest.fill_(_NO_LABEL[0])
        self._largest.fill_(_NO_LABEL[1])
        return Counts(losses[: int(steps)], loss_sum, (int(top1), int(top5)), int(smallest), int(largest))


def counts_of_all(counts: Counts, group: ReplicaGroup) -> Counts:
    """Combine `counts`, the counts of this replica, with those of all other replicas. All ranks get the same result."""
    if group.size == 1:
        return counts
    numbers = [counts.loss_sum, *counts.misses, counts.smallest_label, counts.largest_label, *counts.losses]
    by_rank = group.gather_equal(np.array(numbers, dtype=np.float64))
    loss_sum, top1, top5, _, _, *losses = by_rank.sum(0).tolist()
    return Counts(losses, loss_sum, (int(top1), int(top5)), int(by_rank[:, 3].min()), int(by_rank[:, 4].max()))

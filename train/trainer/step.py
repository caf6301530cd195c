"""One training step: forward, cross-entropy, backward, update.

With --accumulate, a batch is computed in equal parts, one after the other. The gradients of the parts are averaged.
Apart from rounding, the update is the same as without --accumulate. Only the activations of one part are in memory at
any time. Dropout is drawn independently for every image, with or without --accumulate.

With several replicas (train/replicas), each replica computes the gradient of its part of the batch. The gradients are
summed over the replicas before the update. All replicas therefore have the same parameters after each step.

The host never waits for a device during a step. The two columns therefore run at the same time on two GPUs, although
one thread launches the layers of both columns (first those of column 0):

-   A launch queues work on the current stream of its device and returns. The step reads no value back from a device
    (no item(), no cpu(), no shape that depends on data). tests/train/trainer/test_step.py can therefore run the step on
    tensors without values.
-   At a crossing of the columns (AlexNet.cross), `to(device, non_blocking=True)` queues the copy on the sender's
    stream. CUDA events make the copy wait for the receiver's stream, and make the receiver's stream wait for the copy.
-   In the backward pass, autograd has a thread for each GPU. Each thread launches the work of its GPU. At a crossing,
    gradients are copied in the opposite direction.
-   The update is queued on each parameter's device. Learning rates are Python numbers, and are not read from a device.

GPU 1 starts a few hundred microseconds after GPU 0, because GPU 1's first layers are queued later. After the start, the
GPUs wait for each other only at the crossings, as in the paper (section 3.2). The host waits only when the caller reads
a value of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.alexnet import AlexNet
from train.model.precision import autocast, set_precision
from train.optim.paper_sgd import PaperSGD
from train.replicas.gradients import GradientSum


class StepResult(NamedTuple):
    """The result of a step, on column 0's device, detached from the autograd graph."""

    # (), float32, nats: the mean loss of the batch before the update, divided by the number of replicas. The sum over
    # the replicas is the mean loss of the step.
    loss: Tensor
    logits: Tensor  # (N, classes), float32
    labels: Tensor  # (N,), int64


class TrainingStep:
    """A callable that trains `network` on one batch."""

    def __init__(
        self,
        network: AlexNet,
        optimizer: PaperSGD,
        precision: str = "fp32",
        parts: int = 1,
        gradient_sum: GradientSum | None = None,
    ) -> None:
        """Raises UserError for a precision that the network's devices do not support.

        parts         number of equal parts in which a batch is computed
        gradient_sum  sums the gradients over the replicas of `network.replicas`; None if there is one replica
        """
        set_precision(precision, network.devices)
        self.network, self.optimizer, self.precision, self.parts = network, optimizer, precision, parts
        self._gradient_sum = gradient_sum

    def __call__(self, images: Tensor, labels: Tensor) -> StepResult:
        """Update the parameters once. `images` and `labels` belong to this replica, and can be on any device.

        images  float32 (N, 3, 224, 224), grey levels minus the mean
        labels  int64 (N,)

        Raises ValueError if `parts` does not divide N.
        """
        if len(labels) % self.parts:
            raise ValueError(f"a batch of {len(labels)} cannot be divided into {self.parts} equal parts")
        device = self.network.devices[0]
        labels = labels.to(device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        losses, logits = [], []
        for part, part_labels in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
            with autocast(self.precision, device):
                scores = self.network(part).float()
                loss = F.cross_entropy(scores, part_labels, label_smoothing=self.network.recipe.label_smoothing)
                loss = loss / (self.parts * self.network.replicas.size)
            loss.backward()  # type: ignore[no-untyped-call]  # torch has no type hints here
            losses.append(loss.detach())
            logits.append(scores.detach())
        if self._gradient_sum is not None:
            self._gradient_sum.run()
        self.optimizer.step()
        return StepResult(torch.stack(losses).sum(), torch.cat(logits), labels)

"""One training step: forward, cross-entropy, backward, update.

With --accumulate a batch is computed in equal parts, one after the other, and the gradients of the parts are averaged:
the same update up to rounding, while only one part's activations are in memory. Each part draws its own dropout, as
each image of a batch does.

The host never waits for a device during a step. So the two columns run at the same time on their two GPUs, although
one thread launches both, column 0's layers first:

-   A launch queues work on the current stream of its device and returns. No value is read back (no item(), no cpu(),
    no shape that depends on data): tests/train/trainer/test_step.py runs the step on tensors that hold no values.
-   Where columns cross (AlexNet.cross), `to(device, non_blocking=True)` queues the copy on the sender's stream. CUDA
    events make the copy wait for the receiver's stream, and the receiver's stream for the copy.
-   In the backward pass autograd has a thread for each GPU, which launches that GPU's part; copies go the other way.
-   The update queues additions on each parameter's device. Learning rates are numbers of the host.

GPU 1 has its first layers queued some hundred microseconds after GPU 0. From then on the GPUs wait for each other only
at the crossings, as in the paper (section 3.2). The first wait is the caller's, when it reads a value of the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.alexnet import AlexNet
from train.model.precision import autocast, set_precision
from train.optim.paper_sgd import PaperSGD


class StepResult(NamedTuple):
    """The result of a step, on column 0's device, detached from the autograd graph."""

    loss: Tensor  # (), float32, nats: the mean over the batch before the update
    logits: Tensor  # (N, classes), float32
    labels: Tensor  # (N,), int64


class TrainingStep:
    """A callable that trains `model` on one batch."""

    def __init__(self, model: AlexNet, optimizer: PaperSGD, precision: str = "fp32", parts: int = 1) -> None:
        """Raises UserError for a precision that the model's devices do not support.

        parts  equal parts in which a batch is computed
        """
        set_precision(precision, model.devices)
        self.model, self.optimizer, self.precision, self.parts = model, optimizer, precision, parts

    def __call__(self, images: Tensor, labels: Tensor) -> StepResult:
        """Update the parameters once. The tensors may be on any device.

        images  float32 (N, 3, 224, 224), grey levels minus the mean
        labels  int64 (N,)

        Raises ValueError if `parts` does not divide N.
        """
        if len(labels) % self.parts:
            raise ValueError(f"a batch of {len(labels)} cannot be divided into {self.parts} equal parts")
        device = self.model.devices[0]
        labels = labels.to(device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        losses, logits = [], []
        for part, part_labels in zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True):
            with autocast(self.precision, device):
                scores = self.model(part).float()
                loss = F.cross_entropy(scores, part_labels, label_smoothing=self.model.recipe.label_smoothing)
                loss = loss / self.parts
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            losses.append(loss.detach())
            logits.append(scores.detach())
        self.optimizer.step()
        return StepResult(torch.stack(losses).sum(), torch.cat(logits), labels)

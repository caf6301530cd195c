"""One training step: forward, cross-entropy, backward, update.

A batch too large for the memory is computed in equal parts, one after the other, whose gradients are averaged: the
same update up to rounding, while the activations of one part are held. Each part has dropout draws of its own, as the
images of a batch have.

Nothing in it waits for a device, and so the two columns run at the same time on their two GPUs although one thread
launches both, column 0's layers first:

-   A launch only queues work on the current stream of its device and returns. No value is read on the way (no item(),
    no cpu(), no shape that depends on data): tests/train/trainer/test_step.py runs the step on tensors that have no values.
-   Where columns cross (AlexNet.cross), `to(device, non_blocking=True)` queues the copy on the sender's stream, and
    events make it wait for the receiver's stream and the receiver's stream for it. The host goes on.
-   Backward, autograd has a thread for each GPU, which launches that GPU's part; the copies turn round.
-   The update queues additions on each parameter's device. Rates are numbers of the host.

So GPU 1 has its first layers queued some hundred microseconds after GPU 0, and from then on each waits for the other
only at the crossings, as in the paper. What the caller reads of the result is the only thing that waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from train.model.alexnet import AlexNet
from train.model.precision import autocast, set_precision
from train.trainer.optim import PaperSGD


class StepResult(NamedTuple):
    """What a step gives, on column 0's device, without a graph behind it."""

    loss: Tensor  # (), float32, nats: the mean over the batch, before the update
    logits: Tensor  # (N, classes), float32
    labels: Tensor  # (N,), int64


class TrainingStep:
    """step(images, labels) trains `model` on one batch."""

    def __init__(self, model: AlexNet, optimizer: PaperSGD, precision: str = "fp32", parts: int = 1) -> None:
        """Raises UserError for a precision that the model's devices do not have."""
        set_precision(precision, model.devices)
        self.model, self.optimizer, self.precision, self.parts = model, optimizer, precision, parts

    def __call__(self, images: Tensor, labels: Tensor) -> StepResult:
        """Images float32 (N, 3, 224, 224), grey levels minus the mean; labels int64 (N,); on any device.

        Raises ValueError for a batch that cannot be divided into `parts`.
        """
        if len(labels) % self.parts:
            raise ValueError(f"a batch of {len(labels)} in {self.parts} parts")
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

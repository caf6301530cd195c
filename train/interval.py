"""What the loop measures between two lines of metrics.jsonl, without waiting for a device before the line is due."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loader import TrainLoader
from prep.console import UserError
from train.evaluate import wrong
from train.model import AlexNet


class Diverged(UserError):
    """The loss, or a parameter, is no longer a number."""

    def __init__(self, what: str) -> None:
        """`what` is no number, and where."""
        super().__init__(
            f"{what}: training has diverged. The last checkpoint is kept. A lower rate usually helps: --set lr=…, "
            "another --recipe, or a larger --batch for the same rate."
        )


class Interval:
    """Sums since the last line, on the device: reading them is the only time the loop waits for it."""

    def __init__(self, loader: TrainLoader, model: AlexNet) -> None:
        self.loader, self.model = loader, model
        self._begin()

    def _begin(self) -> None:
        self.started = time.perf_counter()
        self.loader.waits()
        self.steps = self.images = 0
        self.loss: Tensor | float = 0.0
        self.misses: Tensor | int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a step: loss (), logits (N, classes), labels (N,), on any device."""
        self.steps, self.images = self.steps + 1, self.images + len(labels)
        self.loss, self.misses = self.loss + loss, self.misses + wrong(logits, labels)

    def read(self) -> dict[str, Any]:
        """Means over the interval, and norms and memory at its end; begins the next.

        Raises Diverged for a loss that is not finite.
        """
        loss = float(self.loss) / self.steps
        misses = torch.as_tensor(self.misses).tolist()
        if not math.isfinite(loss):
            raise Diverged(f"the loss is {loss} within the last {self.steps} steps")
        seconds, waits = time.perf_counter() - self.started, self.loader.waits()
        read = {
            "loss": loss,
            "top1_error": misses[0] / self.images,
            "top5_error": misses[1] / self.images,
            "images_per_s": self.images / seconds,
            "waiting_share": waits.waited_s / seconds,
            "stream_waiting_share": waits.held_s / seconds,
            **layer_norms(self.model),
            **peak_memory(self.model.devices),
        }
        self._begin()
        return read


def layer_norms(model: AlexNet) -> dict[str, dict[str, float | None]]:
    """Euclidean norms of each layer's weights, both columns together, and of their gradient in the last step.

    `{"gradient_norm": {"conv1": …}, "weight_norm": {"conv1": …}}`. Biases are left out, which recipes begin at 0 or 1;
    so is the gradient of a layer that is frozen. None is a norm that is not finite. Each device computes its own and is
    read once.
    """
    tensors: dict[torch.device, list[tuple[str, str, Tensor]]] = {}
    for name, parameters in model.by_joined_name().items():
        layer, _, kind = name.partition(".")
        for parameter in parameters if kind == "weight" else ():
            here = tensors.setdefault(parameter.device, [])
            here.append(("weight_norm", layer, parameter.detach()))
            if parameter.grad is not None:
                here.append(("gradient_norm", layer, parameter.grad))
    queued = {device: torch.stack([torch.linalg.vector_norm(t) for *_, t in here]) for device, here in tensors.items()}
    squares: dict[str, dict[str, float]] = {"gradient_norm": {}, "weight_norm": {}}
    for device, here in tensors.items():
        for (kind, layer, _), norm in zip(here, queued[device].tolist(), strict=True):
            squares[kind][layer] = squares[kind].get(layer, 0.0) + norm**2
    return {
        kind: {layer: math.sqrt(square) if math.isfinite(square) else None for layer, square in found.items()}
        for kind, found in squares.items()
    }


def peak_memory(devices: Sequence[torch.device]) -> dict[str, Any]:
    """The most memory since the process began, in 10⁶ bytes: resident, and what tensors had on each GPU."""
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    peak: dict[str, Any] = {"memory_mb": round(kibibytes * 1024 / 1e6, 1)}
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    if gpus:
        peak["gpu_memory_mb"] = [round(torch.cuda.max_memory_allocated(device) / 1e6, 1) for device in gpus]
    return peak

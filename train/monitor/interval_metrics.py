"""What the loop measures between two lines of metrics.jsonl, without waiting for a device before the line is due."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loader import TrainLoader
from train.evaluation.evaluate import wrong
from train.model.alexnet import AlexNet


class IntervalMetrics:
    """Sums since the last line, on the device: reading them is the only time the loop waits for it."""

    def __init__(self, loader: TrainLoader, model: AlexNet) -> None:
        self.loader, self.model = loader, model
        self._begin()

    def _begin(self) -> None:
        self.started = time.perf_counter()
        self.loader.wait_times()
        self.steps = self.images = 0
        self.loss: Tensor | float = 0.0
        self.misses: Tensor | int = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a step: loss (), logits (N, classes), labels (N,), on any device."""
        self.steps, self.images = self.steps + 1, self.images + len(labels)
        self.loss, self.misses = self.loss + loss, self.misses + wrong(logits, labels)

    def read(self, norms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Means over the interval, memory, and `norms` (guards.parameter_norms) by layer; begins the next."""
        loss = float(self.loss) / self.steps
        misses = torch.as_tensor(self.misses).tolist()
        seconds, waits = time.perf_counter() - self.started, self.loader.wait_times()
        read = {
            "loss": loss,
            "top1_error": misses[0] / self.images,
            "top5_error": misses[1] / self.images,
            "images_per_s": self.images / seconds,
            "waiting_share": waits.consumer_wait_s / seconds,
            "stream_waiting_share": waits.loader_wait_s / seconds,
            **layer_norms(norms),
            **peak_memory(self.model.devices),
        }
        self._begin()
        return read


def layer_norms(norms: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Of guards.parameter_norms the weights, by layer: `{"gradient_norm": {"conv1": …}, "weight_norm": {"conv1": …}}`.

    Biases are left out, which recipes begin at 0 or 1; so is the gradient of a layer that is frozen.
    """
    weights = {name.removesuffix(".weight"): of for name, of in norms.items() if name.endswith(".weight")}
    return {
        "gradient_norm": {layer: of["gradient"] for layer, of in weights.items() if "gradient" in of},
        "weight_norm": {layer: of["parameter"] for layer, of in weights.items()},
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

"""Metrics of an interval: means between two lines of metrics.jsonl. No device is waited for before the line is due."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loader import TrainLoader
from train.evaluation.evaluate import top_k_misses
from train.model.alexnet import AlexNet


class IntervalMetrics:
    """Sums of loss and errors since the last line, kept on the device. Only `read` waits for the device."""

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
        self.loss, self.misses = self.loss + loss, self.misses + top_k_misses(logits, labels)

    def read(self, norms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """The metrics of the interval, as metrics.jsonl has them; begins the next interval.

        norms  the result of train.trainer.watchdog.parameter_norms
        """
        loss = float(self.loss) / self.steps
        misses = torch.as_tensor(self.misses).tolist()
        seconds, waits = time.perf_counter() - self.started, self.loader.wait_times()
        metrics = {
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
        return metrics


def layer_norms(norms: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """`{"gradient_norm": {"conv1": …}, "weight_norm": {"conv1": …}}` from parameter_norms, for the weights alone.

    Biases are left out: recipes begin them at 0 or 1. A frozen layer has no gradient norm.
    """
    weights = {name.removesuffix(".weight"): kinds for name, kinds in norms.items() if name.endswith(".weight")}
    return {
        "gradient_norm": {layer: kinds["gradient"] for layer, kinds in weights.items() if "gradient" in kinds},
        "weight_norm": {layer: kinds["parameter"] for layer, kinds in weights.items()},
    }


def peak_memory(devices: Sequence[torch.device]) -> dict[str, Any]:
    """Peak memory since the process began, in units of 10⁶ bytes: `memory_mb` resident on the host, and on a machine
    with GPUs `gpu_memory_mb`, a list of the memory that tensors had on each.
    """
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    peak: dict[str, Any] = {"memory_mb": round(kibibytes * 1024 / 1e6, 1)}
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    if gpus:
        peak["gpu_memory_mb"] = [round(torch.cuda.max_memory_allocated(device) / 1e6, 1) for device in gpus]
    return peak

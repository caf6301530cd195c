"""Metrics of an interval: loss, errors, speed, norms and memory. An interval is the steps between two log lines.

The losses and errors come from the counters on the device (step_counters.py), which are read once per interval.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.loader import TrainLoader, WaitTimes
from train.model.alexnet import AlexNet
from train.monitor.step_counters import Counts


class StreamWaits:
    """Total wait times of a loader and its consumer.

    TrainLoader.wait_times returns the times since the last call of wait_times, so only one caller can use this method.
    `read` returns totals, so it can have several callers.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self.loader, self._total = loader, WaitTimes(0, 0.0, 0.0)

    def read(self) -> WaitTimes:
        """Return the number of batches served, and the wait times, since the loader was made."""
        total, new = self._total, self.loader.wait_times()
        self._total = WaitTimes(
            total.batches + new.batches,
            total.consumer_wait_s + new.consumer_wait_s,
            total.loader_wait_s + new.loader_wait_s,
        )
        return self._total


class IntervalMetrics:
    """Measures the time of the steps since the last log line, counts their images, and computes metrics."""

    def __init__(self, waits: StreamWaits, network: AlexNet) -> None:
        self.waits, self.network, self.group = waits, network, network.replicas
        self._begin()

    def _begin(self) -> None:
        self.started, self._waits_before = time.perf_counter(), self.waits.read()
        self.steps = self.images = 0

    def add(self, images: int) -> None:
        """Add a step of `images` images, over all replicas."""
        self.steps, self.images = self.steps + 1, self.images + images

    def read(self, counts: Counts, norms: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        """Return the metrics of the interval under their keys in metrics.jsonl.

        This call also begins the next interval.

        With several replicas, `waiting_share` and `stream_waiting_share` are those of the replica that waited longest
        for its stream. `memory_mb` and `gpu_memory_mb` are the largest values of all replicas.

        counts  the counts of the interval's steps, over all replicas (counts_of_all)
        norms   the result of train.trainer.divergence.parameter_norms
        """
        loss, misses = counts.loss_sum / self.steps, counts.misses
        seconds, before, waits = time.perf_counter() - self.started, self._waits_before, self.waits.read()
        shares = (
            (waits.consumer_wait_s - before.consumer_wait_s) / seconds,
            (waits.loader_wait_s - before.loader_wait_s) / seconds,
        )
        by_rank = self.group.gather_json([shares, peak_memory(self.network.devices)])
        waiting_share, stream_waiting_share = max(tuple(shares) for shares, _ in by_rank)
        metrics = {
            "loss": loss,
            "top1_error": misses[0] / self.images,
            "top5_error": misses[1] / self.images,
            "images_per_s": self.images / seconds,
            "waiting_share": waiting_share,
            "stream_waiting_share": stream_waiting_share,
            **layer_norms(norms),
            **largest_memory([memory for _, memory in by_rank]),
        }
        self._begin()
        return metrics


def layer_norms(norms: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the norms of the weights in `norms`, as `{"gradient_norm": {"conv1": …}, "weight_norm": {"conv1": …}}`.

    The norms of the biases are left out, because biases start with a constant value. A frozen layer has no gradient
    norm.
    """
    weights = {name.removesuffix(".weight"): kinds for name, kinds in norms.items() if name.endswith(".weight")}
    return {
        "gradient_norm": {layer: kinds["gradient"] for layer, kinds in weights.items() if "gradient" in kinds},
        "weight_norm": {layer: kinds["parameter"] for layer, kinds in weights.items()},
    }


def peak_memory(devices: Sequence[torch.device]) -> dict[str, Any]:
    """Return the peak memory since the process began, in units of 10⁶ bytes.

    `memory_mb` is the resident memory of the process on the host. `gpu_memory_mb` lists, for each GPU, the memory that
    torch allocated for tensors. Without a GPU this key is absent.
    """
    status = Path("/proc/self/status").read_text()
    kibibytes = int(status.partition("VmHWM:")[2].split()[0])
    peak: dict[str, Any] = {"memory_mb": round(kibibytes * 1024 / 1e6, 1)}
    gpus = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
    if gpus:
        peak["gpu_memory_mb"] = [round(torch.cuda.max_memory_allocated(device) / 1e6, 1) for device in gpus]
    return peak


def largest_memory(memory: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the largest memory of each kind in several results of peak_memory.

    The n-th GPUs of all processes are compared with each other.
    """
    largest: dict[str, Any] = {"memory_mb": max(peak["memory_mb"] for peak in memory)}
    if "gpu_memory_mb" in memory[0]:
        largest["gpu_memory_mb"] = [max(column) for column in zip(*(p["gpu_memory_mb"] for p in memory), strict=True)]
    return largest

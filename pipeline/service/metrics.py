"""Metrics of a service, which Ray exports to Prometheus. Ray adds the prefix `ray_` to each name.

docs/service.md lists all metrics.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any


class Metrics:
    """Counters and gauges of one service. Each metric has the tag `service` with the service's name."""

    def __init__(self, ray_metrics: ModuleType, service: str) -> None:
        """`ray_metrics` is the module ray.util.metrics."""

        def counter(name: str, text: str) -> Any:
            made = ray_metrics.Counter(f"alexstream_{name}", text, ("service",))
            made.set_default_tags({"service": service})
            return made

        def gauge(name: str, text: str) -> Any:
            made = ray_metrics.Gauge(f"alexstream_{name}", text, ("service",))
            made.set_default_tags({"service": service})
            return made

        self._images_made = counter("images_made", "Images that workers decoded and cropped.")
        self._images_served = counter("images_served", "Images that consumers received.")
        self._bytes_made = counter("bytes_made", "Bytes of the pixels that workers decoded and cropped.")
        self._bytes_served = counter("bytes_served", "Bytes of the decoded pixels that consumers received.")
        self._retries = counter("retries", "Batches that were made again after a worker or a node was lost.")
        self._consumer_wait = counter("consumer_wait_seconds", "Seconds for which training loops waited for batches.")
        self._queue = gauge("queue", "Batches that wait for a worker.")
        self._workers = gauge("workers", "Workers that are ready.")
        self._consumers = gauge("consumers", "Loaders that read from the service.")
        self._kept_bytes = gauge("kept_bytes", "Bytes of the decoded pixels that the service keeps for its consumers.")

    def made(self, images: int, size_bytes: int) -> None:
        """Count the images and bytes of a block (one or several batches) that a worker made."""
        self._images_made.inc(images)
        self._bytes_made.inc(size_bytes)

    def served(self, images: int, size_bytes: int) -> None:
        """Count the images and bytes of a block that a consumer received."""
        self._images_served.inc(images)
        self._bytes_served.inc(size_bytes)

    def retried(self, batches: int) -> None:
        """Count batches that must be made again."""
        self._retries.inc(batches)

    def waited(self, seconds: float) -> None:
        """Count the time for which a consumer's training loop waited."""
        if seconds > 0:
            self._consumer_wait.inc(seconds)

    def show(self, queue: int, workers: int, consumers: int, kept_bytes: int) -> None:
        """Set the gauges to the present values."""
        self._queue.set(queue)
        self._workers.set(workers)
        self._consumers.set(consumers)
        self._kept_bytes.set(kept_bytes)

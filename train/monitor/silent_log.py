"""The log of all ranks except rank 0, which writes and prints nothing."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.monitor.interval_metrics import IntervalMetrics, StreamWaits


class SilentLog:
    """Has the methods of MetricsLog that the training loop calls."""

    def __enter__(self) -> SilentLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def interval(self, waits: StreamWaits, network: AlexNet) -> IntervalMetrics:
        """Begin the interval of the next log line. All ranks measure it, because rank 0 logs maxima over the ranks."""
        return IntervalMetrics(waits, network)

    def train(self, line: dict[str, Any]) -> None:
        """Write nothing."""

    def validation(self, epoch: int, step: int, result: EvalResult) -> None:
        """Write nothing."""

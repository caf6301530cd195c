"""Example lines of metrics.jsonl, and the points of a run as TensorBoard reads them."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from train.monitor.console_view import RunLength
from train.runs.run_dir import read_metrics, tensorboard_scalars

# Length of the run to which the example lines belong.
RUN_LENGTH = RunLength(steps_per_epoch=10, steps=100, batch_size=8)


def training_line(step: int, **changes: object) -> dict:
    """Return the log line of the interval that ends with `step`, in the form that MetricsLog.train expects."""
    measured = {"loss": 3.0 / step, "top1_error": 0.5, "top5_error": 0.25, "images_per_s": 16.0, "waiting_share": 0.1}
    norms = {"gradient_norm": {"conv1": 0.5 * step}, "weight_norm": {"conv1": 2.0}}
    rest = {"stream_waiting_share": 0.2, **norms, "memory_mb": 1234.5, "lr": 0.01}
    return {"kind": "train", "epoch": step / 10, "step": step, **measured, **rest, **changes}


def validation_line(epoch: int, error: float) -> dict:
    """Return the log line of the validation after `epoch`, dated one minute ago. `error` is the top-1 error."""
    measured = {"top1_error": error, "top5_error": error / 2, "loss": 2.0, "images": 12}
    return {"kind": "val", "epoch": epoch, "step": 10 * epoch, **measured, "unix_time_s": time.time() - 60}


def tensorboard_points(run_dir: Path) -> list[tuple[str, int, float]]:
    """Return (tag, step, value) of every point that TensorBoard reads from a run folder."""
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return [(tag, point.step, point.value) for tag in events.Tags()["scalars"] for point in events.Scalars(tag)]


def points_of_metrics(run_dir: Path) -> list[tuple[str, int, float]]:
    """Return the points (tag, step, value) of metrics.jsonl.

    The values are rounded to float32, as in TensorBoard's files.
    """
    return [
        (tag, line["step"], float(np.float32(value)))
        for line in read_metrics(run_dir)
        for tag, value in tensorboard_scalars(line).items()
    ]

"""Names of the files in a run folder, and functions that read these files.

The functions also work while another process trains in the folder.

run/
  run.json                  settings, recipe, architecture, length, store and environment (train/runs/run.py)
  metrics.jsonl             a line for every --log-every steps and for each validation (train/monitor/metrics_log.py)
  status.json               whether the run is training, or how it ended (train/monitor/metrics_log.py)
  checkpoint-00001500.pt    the state after step 1,500 (train/runs/checkpoint.py)
  best.pt                   the checkpoint with the lowest validation error (train/runs/checkpoint.py)
  mean_image.npy            the mean image, if the recipe subtracts a mean image (train/runs/preprocessing.py)
  evaluations.jsonl         a line for each evaluation of a split (train/evaluation/predictions.py)
  scores-*.npz              probabilities of the classes for each image of a split (train/evaluation/trained_run.py)
  index-fc7-*.npz           fc7 activations of training images, for nearest neighbors (train/evaluation/neighbors.py)
  tensorboard/              the numbers of metrics.jsonl as TensorBoard's event files (train/monitor/tensorboard.py)

This module does not import torch, so that `alextrain status` starts quickly.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prep.console import UserError, shell_quoted
from train.formats.lines import METRICS as METRICS_MODELS
from train.formats.lines import read_lines

DESCRIPTION, METRICS, STATUS, EVENTS = "run.json", "metrics.jsonl", "status.json", "tensorboard"

# Keys of metrics.jsonl whose values depend on the clock or the machine. All other values have the same bits in an
# uninterrupted run and in a run that was interrupted and resumed.
CLOCK_DEPENDENT = (
    "images_per_s",
    "waiting_share",
    "stream_waiting_share",
    "memory_mb",
    "gpu_memory_mb",
    "unix_time_s",
)

RATE_LINES = 20  # number of newest training lines from which the remaining time is predicted

_MAX_SCALAR = 3e38  # the largest finite float32 is 3.4e38
_CHECKPOINT = r"checkpoint-([0-9]{8,12})\.pt"

# Settings that version 0.1.0 did not write, with the values that its runs had.
_LATER_SETTINGS = {
    "deterministic": False,
    "stream_seed": None,
    "service": None,
    "service_fallback": None,
    "replicas": 1,
}


def has_description(run_dir: Path) -> bool:
    """Return whether a folder contains run.json. A link to a missing file counts, too."""
    return os.path.lexists(run_dir / DESCRIPTION)


def read_description(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json, checked against train.formats.run_file.RunFile.

    Raises UserError if the file is missing or cannot be read, and for the first field that is missing or wrong.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run. Train a run with: alextrain run --run-dir {shell_quoted(run_dir)}")
    path = run_dir / DESCRIPTION
    try:
        # This import loads the recipes, which need NumPy, and --help must not load NumPy.
        from train.formats.run_file import read_run_file

        description = read_run_file(path)
    except FileNotFoundError:
        raise UserError(f"{run_dir}: not a run, there is no {DESCRIPTION} in it. Name a run folder.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    from train.config.recipe import with_eval_divisor

    recipe = description["recipe"]
    recipe = {**recipe, "augmentation": with_eval_divisor(recipe["augmentation"])}
    return {**description, "recipe": recipe, "settings": {**_LATER_SETTINGS, **description["settings"]}}


def read_metrics_lines(run_dir: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of metrics.jsonl in order, each as text and as an object.

    The list is empty if the file does not exist. A last line that a power cut left incomplete is left out. Raises
    UserError if a complete line is wrong, or if the file cannot be read.
    """
    path = run_dir / METRICS
    try:
        return read_lines(path, METRICS_MODELS, f"Remove this line from {METRICS}, or restore the file.")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl in order. The list is empty if there are no lines yet."""
    return [line for _, line in read_metrics_lines(run_dir)]


def last_line(lines: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """Return the newest line whose kind is `kind` ("train" or "val"); None if no line has this kind."""
    return next((line for line in reversed(lines) if line["kind"] == kind), None)


def seconds_left(lines: Sequence[Mapping[str, Any]], step: int, steps: int, batch_size: int) -> float | None:
    """Return the predicted time in seconds for training from step `step` to step `steps`, without validations.

    The prediction uses the mean time per image in the last RATE_LINES training lines. Returns None if there is no
    training line yet.
    """
    images_per_s = [line["images_per_s"] for line in lines if line["kind"] == "train"][-RATE_LINES:]
    if not images_per_s:
        return None
    seconds_per_image: float = sum(1 / rate for rate in images_per_s) / len(images_per_s)
    return max(0, steps - step) * batch_size * seconds_per_image


def shown_errors(classes: int) -> tuple[tuple[str, str], ...]:
    """Return (name, key in metrics.jsonl) of the errors to show.

    With five classes or fewer, there is no top-5 error.
    """
    errors = ("top-1 error", "top1_error"), ("top-5 error", "top5_error")
    return errors if classes > 5 else errors[:1]


def errors_text(line: Mapping[str, Any], classes: int) -> str:
    """Return the errors of a line of metrics.jsonl as text: `top-1 error 88.8%, top-5 error 23.0%`."""
    return ", ".join(f"{name} {line[key]:.1%}" for name, key in shown_errors(classes))


def tensorboard_scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by TensorBoard tag.

    Examples of tags are `train/loss`, `val/top1_error` and `gradient_norm/conv1`. Values that are not numbers, such as
    null, and numbers that are not finite as float32 are left out.
    """
    scalars = {}
    for key, value in line.items():
        if key in ("kind", "epoch", "step", "unix_time_s"):
            continue
        group: str = line["kind"]
        items: Iterable[tuple[Any, Any]] = [(key, value)]
        if isinstance(value, dict | list):
            group, items = key, value.items() if isinstance(value, dict) else enumerate(value)
        scalars.update(
            {f"{group}/{name}": float(n) for name, n in items if isinstance(n, int | float) and abs(n) < _MAX_SCALAR}
        )
    return scalars


def newest_checkpoint(run_dir: Path) -> tuple[int, float] | None:
    """Return (step, modification time in s since 1970) of the newest checkpoint file; None if there is no file."""
    by_step = [
        (int(match[1]), path)
        for path in run_dir.glob("checkpoint-*.pt")
        if (match := re.fullmatch(_CHECKPOINT, path.name))
    ]
    for step, path in sorted(by_step, reverse=True):
        try:
            return step, path.stat().st_mtime
        except FileNotFoundError:  # the training process has just removed the file
            continue
    return None

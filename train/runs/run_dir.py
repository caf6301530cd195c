"""Names of the files in a run folder, and functions that read these files.

The functions also work while another process trains in the folder.

run/
  run.json                  settings, recipe, architecture, length, store and environment (train/runs/run.py)
  metrics.jsonl             a line for each interval of training and for each validation (train/monitor/metrics_log.py)
  status.json               whether the run is training, or how it ended (train/monitor/metrics_log.py)
  checkpoint-00001500.pt    the state after step 1,500 (train/runs/checkpoint.py)
  best.pt                   the checkpoint with the lowest validation error (train/runs/checkpoint.py)
  mean_image.npy            the mean image, if the recipe subtracts a mean image (train/runs/preprocessing.py)
  evaluations.jsonl         a line for each evaluation of a split (train/evaluation/predictions.py)
  scores-*.npz              class probabilities of a split (train/evaluation/trained_run.py)
  index-fc7-*.npz           fc7 activations for the search of nearest neighbors (train/evaluation/neighbors.py)
  tensorboard/              the numbers of metrics.jsonl as TensorBoard's event files (train/monitor/tensorboard.py)

This module does not import torch, so that `alextrain status` starts quickly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prep.console import UserError, shell_quoted

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

_CHECKPOINT = r"checkpoint-(\d+)\.pt"

# Settings that version 0.1.0 did not write, with the values that its runs had.
_LATER_SETTINGS = {
    "deterministic": False,
    "stream_seed": None,
    "service": None,
    "service_fallback": None,
    "replicas": 1,
}


def read_description(run_dir: Path) -> dict[str, Any]:
    """Return the content of run.json.

    Raises UserError if the file is missing, cannot be read, or lacks a required part.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run. Train a run with: alextrain run --run-dir {shell_quoted(run_dir)}")
    path = run_dir / DESCRIPTION
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{run_dir}: not a run, there is no {DESCRIPTION} in it. Name a run folder.") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Repeat the alextrain run command to rewrite the file."
        ) from None
    parts = ("identity", "settings", "model", "recipe", "length", "store")
    is_object = isinstance(description, dict)
    missing = [part for part in parts if not is_object or not isinstance(description.get(part), dict)]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}, which this version needs. Repeat the alextrain run command to "
            "rewrite the file."
        )
    recipe = description["recipe"]
    if isinstance(recipe.get("augmentation"), dict):
        from train.config.recipe import with_eval_divisor  # this import loads NumPy, which --help must not load

        recipe = {**recipe, "augmentation": with_eval_divisor(recipe["augmentation"])}
    return {**description, "recipe": recipe, "settings": {**_LATER_SETTINGS, **description["settings"]}}


def parse_line(text: bytes) -> dict[str, Any] | None:
    """Return the object on a line of metrics.jsonl; None for an incomplete or damaged line."""
    try:
        line = json.loads(text)
        return dict(line) if isinstance(line["step"], int) and line["kind"] in ("train", "val") else None
    except (ValueError, KeyError, TypeError):
        return None


def read_raw_lines(run_dir: Path) -> list[bytes]:
    """Return all lines of metrics.jsonl, including damaged lines; empty if the file does not exist.

    Raises UserError if the file cannot be read.
    """
    try:
        return (run_dir / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{run_dir / METRICS}: cannot be read ({error}).") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Return the intact lines of metrics.jsonl in order; empty before the first interval has ended."""
    return [line for line in map(parse_line, read_raw_lines(run_dir)) if line is not None]


def last_line(lines: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """Return the newest line whose kind is `kind` ("train" or "val"); None if no line has this kind."""
    return next((line for line in reversed(lines) if line["kind"] == kind), None)


def seconds_left(lines: Sequence[Mapping[str, Any]], step: int, steps: int, batch_size: int) -> float | None:
    """Return the predicted time in seconds for training from step `step` to step `steps`, without validations.

    The prediction uses the mean time per image in the last RATE_LINES training lines. Returns None before the first
    interval has ended.
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
    null, are left out.
    """
    scalars = {}
    for key, value in line.items():
        if key in ("kind", "epoch", "step", "unix_time_s"):
            continue
        group: str = line["kind"]
        items: Iterable[tuple[Any, Any]] = [(key, value)]
        if isinstance(value, dict | list):
            group, items = key, value.items() if isinstance(value, dict) else enumerate(value)
        scalars.update({f"{group}/{name}": float(n) for name, n in items if isinstance(n, int | float)})
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

"""What is read of a run's folder, also while another process writes in it. Light to import: no torch.

run/
  run.json                  what the run is: settings, recipe, model, length, environment (train/runs/loading.py)
  metrics.jsonl             a line for each interval of training and for each validation (train/monitor/metrics_log.py)
  status.json               whether it trains, or how it ended (train/monitor/metrics_log.py)
  checkpoint-00001500.pt    the state after step 1,500 (train/runs/checkpoint.py)
  tensorboard/              the lines of metrics.jsonl as TensorBoard's event files (train/monitor/tensorboard.py)
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prep.console import UserError, shell_quoted

DESCRIPTION, METRICS, STATUS, EVENTS = "run.json", "metrics.jsonl", "status.json", "tensorboard"

# What of a line depends on the clock or the machine: all else is the same to the bit in a run that was interrupted.
CLOCKED = ("images_per_s", "waiting_share", "stream_waiting_share", "memory_mb", "gpu_memory_mb", "unix_time_s")

RATE_OVER = 20  # lines from which the rate is taken that tells how long the rest will last


def read_description(run_dir: Path) -> dict[str, Any]:
    """run.json of a run; raises UserError where there is none, or one that is not of this version."""
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run. Train one with: alextrain run --run-dir {shell_quoted(run_dir)}")
    path = run_dir / DESCRIPTION
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{run_dir}: not a run, there is no {DESCRIPTION} in it. Name the --run-dir of one.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}). The same alextrain run again writes it anew.") from None
    parts = ("identity", "settings", "model", "recipe", "length", "store")
    missing = [part for part in parts if not isinstance(found, dict) or not isinstance(found.get(part), dict)]
    if missing:
        raise UserError(
            f"{path}: has no {', '.join(missing)}, which this version reads. The same alextrain run again writes it "
            "anew."
        )
    return dict(found)


def parsed(text: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl; None for one that was cut short, or is none."""
    try:
        line = json.loads(text)
        return dict(line) if isinstance(line["step"], int) and line["kind"] in ("train", "val") else None
    except (ValueError, KeyError, TypeError):
        return None


def read_texts(run_dir: Path) -> list[bytes]:
    """The lines of a run's metrics.jsonl as they are there, whole or not; raises UserError where it cannot be read."""
    try:
        return (run_dir / METRICS).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{run_dir / METRICS}: cannot be read ({error}).") from None


def read_lines(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl in their order: none before the first interval has ended."""
    return [line for line in map(parsed, read_texts(run_dir)) if line is not None]


def last_of(lines: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    """The newest line of a kind, `train` or `val`."""
    return next((line for line in reversed(lines) if line["kind"] == kind), None)


def seconds_left(lines: Sequence[Mapping[str, Any]], step: int, steps: int, batch_size: int) -> float | None:
    """How long the steps after `step` will take at the rate of the last intervals, validations not counted.

    None before the first interval has ended.
    """
    rates = [line["images_per_s"] for line in lines if line["kind"] == "train"][-RATE_OVER:]
    if not rates:
        return None
    seconds_per_image: float = sum(1 / rate for rate in rates) / len(rates)
    return max(0, steps - step) * batch_size * seconds_per_image


def scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by TensorBoard's tags: `train/loss`, `val/top1_error`, `gradient_norm/conv1`."""
    found = {}
    for name, value in line.items():
        if name in ("kind", "epoch", "step", "unix_time_s"):
            continue
        parts: Iterable[tuple[Any, Any]] = [(name, value)]
        group = line["kind"]
        if isinstance(value, dict | list):
            group, parts = name, value.items() if isinstance(value, dict) else enumerate(value)
        numbers = {part: n for part, n in parts if isinstance(n, int | float)}  # not the null of what is not finite
        found.update({f"{group}/{part}": float(n) for part, n in numbers.items()})
    return found


def newest_checkpoint(run_dir: Path) -> tuple[int, float] | None:
    """(step, time of writing in seconds since 1970) of the newest checkpoint, whether it can be read or not."""
    found = [(int(match[1]), path) for path in run_dir.iterdir() if (match := re.fullmatch(_CHECKPOINT, path.name))]
    for step, path in sorted(found, reverse=True):
        try:
            return step, path.stat().st_mtime
        except FileNotFoundError:  # the run has replaced it meanwhile
            continue
    return None


_CHECKPOINT = r"checkpoint-(\d+)\.pt"

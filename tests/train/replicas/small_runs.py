"""Trainings of a small network by several processes that torchrun starts."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.project import ROOT
from tests.helpers.torchrun.job import Job, TorchrunServer

SMALL_ALEXTRAIN = ROOT / "tests/helpers/torchrun/small_alextrain.py"


def run_arguments(store: Path, run_dir: Path, *options: object) -> tuple[object, ...]:
    """Return arguments of `alextrain run`: 3 epochs of 3 steps of 8 images, with a validation after each epoch."""
    recipe = ("--recipe", "short", "--set", "dropout=0.5", "--batch", 8, "--epochs", 3, "--seed", 3)
    intervals = ("--log-every", 1, "--checkpoint-every", 2, "--keep", 100)
    return ("run", "--gpus", "cpu", "--store", store, "--run-dir", run_dir, *recipe, *intervals, *options)


def start_training(
    torchrun: TorchrunServer,
    replicas: int,
    store: Path,
    run_dir: Path,
    *options: object,
    fault: str = "",
    max_restarts: int = 0,
) -> Job:
    """Start a training in `replicas` processes. `fault` is the value of FAULT (tests/helpers/torchrun)."""
    return torchrun(
        *("--nproc-per-node", replicas, "--max-restarts", max_restarts),
        *(SMALL_ALEXTRAIN, *run_arguments(store, run_dir, *options)),
        env={"FAULT": fault} if fault else {},
    )


def steps_logged(run_dir: Path) -> int:
    """Return the number of lines in metrics.jsonl."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0

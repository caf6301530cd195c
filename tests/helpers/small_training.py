"""The configuration of a training that takes about a second on a CPU, and the comparison of the results of two runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from train.config.architecture import ALEXNET, Widths
from train.config.recipe import ScheduleChange
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.runs import checkpoint
from train.runs.run_dir import CLOCK_DEPENDENT

SMALL_ALEXNET = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 16, 16))


def small_config(store: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """Return a run of 9 steps of 8 images: 3 epochs of 3 steps on the 30 training images of the test store."""
    config = RunConfig(
        store=store,
        recipe=replace(SHORT, dropout=0.5, schedule=(ScheduleChange(1.5, lr=0.002),)),
        batch_size=8,
        seed=3,
        model=SMALL_ALEXNET,
        run_dir=run_dir,
        epochs=3,
        log_every=1,
        checkpoint_every=2,
        threads=2,
    )
    return replace(config, **changes)


def metrics_without_clock(run_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the keys that depend on the clock or the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK_DEPENDENT} for line in lines]


def assert_same_result(run_dir: Path, other_run_dir: Path) -> None:
    """Assert that two runs have the same metrics, last step, parameters and velocities, bit for bit."""
    assert metrics_without_clock(run_dir) == metrics_without_clock(other_run_dir)
    state, other = (checkpoint.load_latest(folder) for folder in (run_dir, other_run_dir))
    assert state is not None and other is not None and state.step == other.step
    for part in ("parameters", "velocity"):
        for name, tensor in getattr(state, part).items():
            assert torch.equal(tensor, getattr(other, part)[name]), name

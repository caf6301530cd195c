"""The configuration of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prep.console import UserError
from prep.store.manifest import Store
from train.config.architecture import ALEXNET, Architecture
from train.config.devices import Devices
from train.config.recipe import Recipe

KEPT = 2  # checkpoints, beside the best


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is given. The first block decides the result, the second only how and how long."""

    store: Path
    recipe: Recipe
    batch_size: int
    seed: int = 0
    model: Architecture = ALEXNET
    precision: str = "fp32"  # one of train.model.precision.PRECISIONS
    accumulate: int = 1  # equal parts that a batch is computed in, one after the other

    run_dir: Path = Path("run")
    devices: Devices = ("cpu", "cpu")
    epochs: int = 1
    steps: int | None = None  # stop after so many steps in all, if that comes first
    log_every: int = 20  # steps between two lines
    checkpoint_every: int = 1000  # steps between two checkpoints, beside the one at each epoch's end
    keep: int = KEPT  # checkpoints, beside the best
    threads: int | None = None  # of the stream on the CPU


def length(config: RunConfig, store: Store) -> tuple[int, int]:
    """(steps of an epoch, steps in all)."""
    steps_per_epoch = store.split("train").records // config.batch_size
    steps = config.epochs * steps_per_epoch
    return steps_per_epoch, steps if config.steps is None else min(steps, config.steps)


def check_parts(config: RunConfig) -> None:
    """Raise UserError for a batch that cannot be computed in so many equal parts."""
    if config.batch_size % config.accumulate:
        parts = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        raise UserError(
            f"--accumulate {config.accumulate}: a batch of {config.batch_size} has no such equal parts. Give one of "
            f"{', '.join(map(str, parts))}, or another --batch."
        )

"""Configuration of one run: everything that `alextrain run` is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prep.console import UserError
from train.config.architecture import ALEXNET, Architecture
from train.config.choices import CHECKPOINTS_KEPT
from train.config.devices import Devices
from train.config.recipe import Recipe


@dataclass(frozen=True)
class RunConfig:
    """The first block of fields decides the result; the second decides where, how long and how often."""

    store: Path
    recipe: Recipe
    batch_size: int  # images of a step
    seed: int = 0
    model: Architecture = ALEXNET
    precision: str = "fp32"  # one of PRECISIONS: train/model/precision.py
    accumulate: int = 1  # equal parts in which a batch is computed, one after the other

    run_dir: Path = Path("run")
    devices: Devices = ("cpu", "cpu")  # of column 0 and of column 1
    epochs: int = 1
    steps: int | None = None  # end after this many steps in all, if that comes before the last epoch ends
    log_every: int = 20  # steps between two lines of metrics.jsonl
    checkpoint_every: int = 1000  # steps between two checkpoints; each epoch ends with one, too
    keep: int = CHECKPOINTS_KEPT  # checkpoints to keep, beside the best
    threads: int | None = None  # of the stream on the CPU; None: all cores that the process may use


def check_parts(config: RunConfig) -> None:
    """Raise UserError if `accumulate` does not divide the batch into equal parts."""
    if config.batch_size % config.accumulate:
        divisors = [n for n in range(1, config.batch_size + 1) if config.batch_size % n == 0]
        raise UserError(
            f"--accumulate {config.accumulate}: a batch of {config.batch_size} cannot be divided into that many equal "
            f"parts. Give one of {', '.join(map(str, divisors))}, or another --batch."
        )

"""What one run is: its configuration, its folder, and the network that it has trained."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError, disk_error, quoted
from prep.manifest import Store, write_atomic
from train import checkpoint
from train.architecture import ALEXNET, Architecture, architecture_from_json
from train.devices import Devices, keep_freed_memory
from train.identity import identity, plain
from train.keepsake import keep_mean_image, store_facts
from train.model import AlexNet
from train.recipe import Recipe, recipe_from_json


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is given. The first block decides the result, the second only how and how long."""

    store: Path
    recipe: Recipe
    batch_size: int
    seed: int = 0
    model: Architecture = ALEXNET
    precision: str = "fp32"  # one of train.precision.PRECISIONS
    accumulate: int = 1  # equal parts that a batch is computed in, one after the other

    run_dir: Path = Path("run")
    devices: Devices = ("cpu", "cpu")
    epochs: int = 1
    steps: int | None = None  # stop after so many steps in all, if that comes first
    log_every: int = 20  # steps between two lines
    checkpoint_every: int = 1000  # steps between two checkpoints, beside the one at each epoch's end
    keep: int = checkpoint.KEPT  # checkpoints, beside the best
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


def claim(run_dir: Path) -> None:
    """Make the run folder; raises UserError where it cannot be made or belongs to something else."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        names = [p.name for p in run_dir.iterdir() if p.name != ".lock"]
        others = [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror or error}. Name another.") from None
    if others and "run.json" not in others:
        raise UserError(f"{run_dir}: a folder that holds something else than a run. Name another --run-dir.")


def describe(config: RunConfig, store: Store, ancestry: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write run.json, what the run is, for people; `ancestry`: the checkpoints that it came from, see train.fork.

    Raises UserError for an error of the disk, DiskFull where it is full.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("recipe", "model")}
    steps_per_epoch, steps = length(config, store)
    about = {
        "identity": identity(config, store),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        **what_it_trains(config, store),
        "store": store_facts(store),
        "length": {"steps_per_epoch": steps_per_epoch, "steps": steps},
        "ancestry": list(ancestry),
    }
    path = config.run_dir / "run.json"
    try:
        write_atomic(path, json.dumps(about, indent=1).encode())
        keep_mean_image(config.run_dir, store, config.recipe)
    except OSError as error:
        raise disk_error(error, f"{path}: cannot be written ({error.strerror or error}). Make room.") from None


def what_it_trains(config: RunConfig, store: Store) -> dict[str, Any]:
    """Network, recipe with its sources, classes and versions: what a checkpoint needs to be used alone."""
    about: dict[str, Any] = plain(
        {
            "model": asdict(config.model),
            "recipe": asdict(config.recipe),
            "classes": list(store.classes),
            "environment": {
                "alexnet": version("alexnet"),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.machine(),
            },
        }
    )
    return about


def run_and_checkpoint(path: Path, which: str) -> tuple[Path, str]:
    """A run's folder, and which checkpoint of it: `which`, or `path` where that is a checkpoint in its run's folder."""
    return (path.parent, str(path)) if path.is_file() else (path, which)


def load_trained(run_dir: Path, devices: Devices, which: str = "last") -> tuple[AlexNet, dict[str, Any], list[str]]:
    """The network of a run's checkpoint on `devices`, the checkpoint, and the names of the classes.

    `which` as checkpoint.load takes it. Built by model and recipe as the checkpoint has them, whatever this program's
    say now; `run_dir` may be a checkpoint itself. Raises UserError where there is no run, or no such checkpoint in it.
    """
    if devices[0] == "cpu":
        keep_freed_memory()
    if not run_dir.exists():
        raise UserError(f"{run_dir}: no such run. Train one with: alextrain run --run-dir {quoted(run_dir)}")
    state = checkpoint.load(run_dir, which) if run_dir.is_dir() else checkpoint.read(run_dir)
    classes: list[str] = state["classes"]
    model, recipe = architecture_from_json(state["model"]), recipe_from_json(state["recipe"])
    network = AlexNet(len(classes), recipe, devices, model)
    network.load_joined(state["parameters"])
    return network, state, classes

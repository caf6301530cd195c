"""What one run is."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError, disk_error
from prep.files import write_atomic
from prep.store.manifest import Store
from train.config.identity import identity, plain
from train.config.run_config import RunConfig, length
from train.runs.preprocessing import keep_mean_image, store_facts


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
    """Write run.json, what the run is, for people; `ancestry`: the checkpoints that it came from, see train.trainer.fork.

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

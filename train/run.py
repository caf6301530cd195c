"""What one run is: its configuration, its folder, and what makes it the same run when it goes on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError
from prep.manifest import Store, digest_json, write_atomic
from train import checkpoint
from train.devices import Devices, keep_freed_memory
from train.model import AlexNet, Widths
from train.recipe import Recipe, recipe_named


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is given. The first block decides the result, the second only how and how long."""

    store: Path
    recipe: Recipe
    batch_size: int
    seed: int = 0
    widths: Widths = field(default_factory=Widths)

    run_dir: Path = Path("run")
    devices: Devices = ("cpu", "cpu")
    epochs: int = 1
    steps: int | None = None  # stop after so many steps in all, if that comes first
    log_every: int = 20  # steps between two lines
    checkpoint_every: int = 1000  # steps between two checkpoints, beside the one at each epoch's end
    threads: int | None = None  # of the stream on the CPU


def identity(config: RunConfig, store: Store) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    return {
        "store_fingerprint": store.split("train").fingerprint,
        "classes": len(store.classes),
        "recipe": config.recipe.name,
        "recipe_digest": digest_json({k: v for k, v in asdict(config.recipe).items() if k != "sources"}),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "widths": asdict(config.widths),
    }


def check_identity(state: Mapping[str, Any], mine: Mapping[str, Any], run_dir: Path) -> None:
    """Raise UserError naming the first thing in which a checkpoint's run differs from this one."""
    for name, here in mine.items():
        there = state["identity"].get(name)
        if there != here:
            shown = [str(v)[:16] for v in (there, here)]
            raise UserError(
                f"{run_dir} was trained with another {name.replace('_', ' ')} ({shown[0]}, here {shown[1]}). "
                "Give the settings it began with, or start a new --run-dir."
            )


def begin(config: RunConfig, store: Store) -> None:
    """Make the run folder and write run.json; raises UserError where the folder belongs to something else."""
    path = config.run_dir / "run.json"
    if config.run_dir.exists() and not path.exists() and any(config.run_dir.iterdir()):
        raise UserError(f"{config.run_dir}: a folder that holds something else than a run. Name another --run-dir.")
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            check_identity(json.loads(path.read_bytes()), identity(config, store), config.run_dir)
        write_atomic(path, json.dumps(_description(config, store), indent=1).encode())
    except OSError as error:
        raise UserError(f"--run-dir {config.run_dir}: {error.strerror or error}.") from None


def _description(config: RunConfig, store: Store) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(config).items() if k not in ("recipe", "widths")}
    return {
        "identity": identity(config, store),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "recipe": asdict(config.recipe),
        "classes": list(store.classes),
        "environment": {
            "alexnet": version("alexnet"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def load_trained(run_dir: Path, devices: Devices) -> tuple[AlexNet, dict[str, Any]]:
    """The network of a run's newest checkpoint, on `devices`, and the checkpoint; raises UserError where there is
    none.
    """
    if devices[0] == "cpu":
        keep_freed_memory()
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run. Train one with: alextrain run --run-dir {run_dir}")
    state = checkpoint.load_latest(run_dir)
    if state is None:
        raise UserError(f"{run_dir}: no checkpoint in it. Train it with: alextrain run --run-dir {run_dir}")
    about = state["identity"]
    model = AlexNet(about["classes"], recipe_named(about["recipe"]), devices, Widths(**about["widths"]))
    model.load_joined(state["parameters"])
    return model, state

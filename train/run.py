"""What one run is: its configuration, its folder, and what makes it the same run when it goes on."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError
from prep.manifest import Store, digest_json, write_atomic
from train import checkpoint
from train.architecture import ALEXNET, Architecture, architecture_from_json, numbers_of
from train.devices import Devices, keep_freed_memory
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

    run_dir: Path = Path("run")
    devices: Devices = ("cpu", "cpu")
    epochs: int = 1
    steps: int | None = None  # stop after so many steps in all, if that comes first
    log_every: int = 20  # steps between two lines
    checkpoint_every: int = 1000  # steps between two checkpoints, beside the one at each epoch's end
    threads: int | None = None  # of the stream on the CPU


def length(config: RunConfig, store: Store) -> tuple[int, int]:
    """(steps of an epoch, steps in all)."""
    steps_per_epoch = store.split("train").records // config.batch_size
    steps = config.epochs * steps_per_epoch
    return steps_per_epoch, steps if config.steps is None else min(steps, config.steps)


def identity(config: RunConfig, store: Store) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued."""
    return {
        "store_fingerprint": store.split("train").fingerprint,
        "classes": len(store.classes),
        "model": config.model.name,
        "model_digest": digest_json(numbers_of(config.model)),
        "recipe": config.recipe.name,
        "recipe_digest": recipe_digest(config.recipe),
        "batch_size": config.batch_size,
        "seed": config.seed,
        "precision": config.precision,
    }


def check_identity(state: Mapping[str, Any], mine: Mapping[str, Any], run_dir: Path) -> None:
    """Raise UserError naming the first thing in which a checkpoint's run differs from this one."""
    for name, here in mine.items():
        there = state["identity"].get(name)
        if there != here:
            shown = [str(v)[:60] for v in (there, here)]
            raise UserError(
                f"{run_dir} was trained with another {name.replace('_', ' ')} ({shown[0]}, here {shown[1]}). "
                "Give the settings it began with, or start a new --run-dir."
            )


def claim(run_dir: Path) -> None:
    """Make the run folder; raises UserError where it cannot be made or belongs to something else."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        others = [p.name for p in run_dir.iterdir() if p.name not in (".lock", "metrics.jsonl")]
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror or error}. Name another.") from None
    if others and "run.json" not in others:
        raise UserError(f"{run_dir}: a folder that holds something else than a run. Name another --run-dir.")


def describe(config: RunConfig, store: Store) -> None:
    """Write run.json: what the run is, for people and for load_trained."""
    write_atomic(config.run_dir / "run.json", json.dumps(_description(config, store), indent=1).encode())


def _description(config: RunConfig, store: Store) -> dict[str, Any]:
    settings = {k: v for k, v in asdict(config).items() if k not in ("recipe", "model")}
    steps_per_epoch, steps = length(config, store)
    return {
        "identity": identity(config, store),
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()},
        "model": asdict(config.model),
        "recipe": asdict(config.recipe),
        "length": {"steps_per_epoch": steps_per_epoch, "steps": steps},
        "classes": list(store.classes),
        "environment": {
            "alexnet": version("alexnet"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        },
    }


def load_trained(run_dir: Path, devices: Devices) -> tuple[AlexNet, dict[str, Any], list[str]]:
    """The network of a run's newest checkpoint on `devices`, the checkpoint, and the names of the classes.

    Built by model and recipe as run.json has them, whatever this program's say now. Raises UserError where there is no
    run, or no checkpoint in it.
    """
    if devices[0] == "cpu":
        keep_freed_memory()
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run. Train one with: alextrain run --run-dir {run_dir}")
    state = checkpoint.load_latest(run_dir)
    if state is None:
        raise UserError(f"{run_dir}: no checkpoint in it. Train it with: alextrain run --run-dir {run_dir}")
    about = state["identity"]
    try:
        description = json.loads((run_dir / "run.json").read_bytes())
        model, recipe = architecture_from_json(description["model"]), recipe_from_json(description["recipe"])
        classes = list(description["classes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{run_dir / 'run.json'}: cannot be read ({error!r}), and the checkpoint needs it.") from None
    found = {"model_digest": digest_json(numbers_of(model)), "recipe_digest": recipe_digest(recipe)}
    if {**found, "classes": len(classes)} != {name: about.get(name) for name in (*found, "classes")}:
        raise UserError(f"{run_dir / 'run.json'}: its model, recipe or classes are not those of the checkpoint there.")
    network = AlexNet(len(classes), recipe, devices, model)
    network.load_joined(state["parameters"])
    return network, state, classes


def recipe_digest(recipe: Recipe) -> str:
    """Digest of a recipe's numbers, sources left out."""
    return digest_json({k: v for k, v in asdict(recipe).items() if k != "sources"})

"""What one run is: its configuration, its folder, and the network that it has trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prep.console import UserError, quoted
from train.config.architecture import architecture_from_json
from train.config.devices import Devices, keep_freed_memory
from train.config.recipe import recipe_from_json
from train.model.alexnet import AlexNet
from train.runs import checkpoint


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

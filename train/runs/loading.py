"""Loads trained networks from the checkpoints of runs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from prep.console import UserError, shell_quoted
from train.config.architecture import architecture_from_json
from train.config.devices import Devices, keep_freed_memory
from train.config.recipe import recipe_from_json
from train.model.alexnet import AlexNet
from train.runs import checkpoint
from train.runs.checkpoint import Checkpoint
from train.runs.ensemble_dir import check_single_run
from train.runs.run_dir import has_description, read_description


class TrainedNetwork(NamedTuple):
    """A checkpoint, and a network with the parameters of this checkpoint."""

    network: AlexNet
    checkpoint: Checkpoint


def run_and_checkpoint(path: Path, which: str) -> tuple[Path, str]:
    """Return the run folder and the checkpoint that the arguments of a command select.

    The checkpoint is "last", "best" or the path of a file.

    path   argument RUN_DIR of a command: a run folder, or a checkpoint file in a run folder
    which  option --checkpoint of a command; ignored if `path` is a checkpoint file
    """
    return (path.parent, str(path)) if path.is_file() else (path, which)


def load_trained(run_dir: Path, devices: Devices, which: str = "last") -> TrainedNetwork:
    """Return a checkpoint of a run, and its network on `devices`.

    run_dir  a run folder, or a checkpoint file
    which    "last", "best" or the path of a file; ignored if `run_dir` is a checkpoint file

    Architecture and recipe come from the checkpoint, even if this version of the program defines an architecture or a
    recipe of the same name with other values. Raises UserError if the run or the checkpoint does not exist or cannot be
    read, or if the run.json beside the checkpoint is damaged. Also raises UserError if `run_dir` is the folder of an
    ensemble.
    """
    if devices[0] == "cpu":
        keep_freed_memory()
    if not run_dir.exists():
        raise UserError(f"{run_dir}: no such run. Train a run with: alextrain run --run-dir {shell_quoted(run_dir)}")
    check_single_run(run_dir)
    folder = run_dir if run_dir.is_dir() else run_dir.parent
    if has_description(folder):
        read_description(folder)  # a damaged run.json is reported before the checkpoint is read or a file is written
    state = checkpoint.load(run_dir, which) if run_dir.is_dir() else checkpoint.read(run_dir)
    architecture, recipe = architecture_from_json(state.model), recipe_from_json(state.recipe)
    network = AlexNet(len(state.classes), recipe, devices, architecture)
    network.load_joined_tensors(state.parameters)
    return TrainedNetwork(network, state)

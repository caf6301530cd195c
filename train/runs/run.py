"""Opens a run: checks the configuration, opens the store, and computes the identity and the length of the run.

`Run.open` does all steps of opening a run. The functions below the class Run create the run folder and write run.json.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError, WrongArgument, count_noun, disk_error, encodable
from prep.files import check_output_folder, write_atomic
from prep.store.manifest import Store
from prep.version import package_version
from train.config.identity import as_json, identity_of
from train.config.run_config import RunConfig, check_parts
from train.runs.preprocessing import save_mean_image, store_facts
from train.runs.run_dir import DESCRIPTION, newest_checkpoint


@dataclass(frozen=True)
class Run:
    """A run: its configuration, opened store, identity and length. `Run.open` returns a Run."""

    config: RunConfig
    store: Store
    identity: Mapping[str, Any]  # the run continues only from a checkpoint with the same identity
    steps_per_epoch: int  # number of full batches in the training split; 0 if the records do not fill a batch
    last_step: int  # the run ends after this step, counted from 1; a plateau schedule can end the run earlier

    @staticmethod
    def open(config: RunConfig, store: Store | None = None) -> Run:
        """Return the run of a configuration.

        store  the opened store; None: opens `config.store`

        Raises UserError if the batch cannot be divided equally among the replicas and into the parts of --accumulate.
        Raises StoreError if the store is missing or damaged, or has no split `train`.
        """
        check_parts(config)
        store = Store.open(config.store) if store is None else store
        steps_per_epoch = store.split("train").records // config.batch_size
        last_step = config.epochs * steps_per_epoch
        if config.steps is not None:
            last_step = min(last_step, config.steps)
        return Run(config, store, identity_of(config, store), steps_per_epoch, last_step)

    def check_batch(self) -> None:
        """Raise WrongArgument if the training split has fewer records than a batch."""
        if not self.steps_per_epoch:
            records = self.store.split("train").records
            raise WrongArgument(
                f"--batch {self.config.batch_size}: {self.config.store} has only {records:,} training records. "
                f"Pass --batch {records} or less."
            )

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.config.run_dir

    @property
    def how_to_train_further(self) -> str:
        """Return a sentence that names the options with which the run can be trained after its last step."""
        epochs = self.config.epochs
        if self.config.steps is not None and self.config.steps < epochs * self.steps_per_epoch:
            return "To train further, pass more --steps or --epochs."
        return f"To train further, pass more --epochs; {count_noun(epochs, 'epoch')} end after step {self.last_step:,}."

    def training_facts(self) -> dict[str, Any]:
        """Return architecture, recipe with its sources, classes and software versions, as JSON values.

        Both run.json and every checkpoint contain these values. A checkpoint is therefore usable without run.json, even
        after the recipes in the program have changed.
        """
        facts: dict[str, Any] = as_json(
            {
                "model": asdict(self.config.model),
                "recipe": asdict(self.config.recipe),
                "classes": list(self.store.classes),
                "environment": {
                    "alexnet": package_version(),
                    "torch": torch.__version__,
                    "python": platform.python_version(),
                    "machine": platform.machine(),
                },
            }
        )
        return facts


def make_run_dir(run_dir: Path) -> None:
    """Create the run folder, or accept a folder that is empty or already holds a run: run.json or a checkpoint.

    Raises UserError if the folder cannot be created, or if it holds files but no run.
    """
    check_output_folder(run_dir, "--run-dir")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in run_dir.iterdir() if path.name != ".lock"]
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror or error}. Name another folder.") from None
    # Temporary files, which a killed process may have left, do not count.
    names = [name for name in names if not (name.startswith(".") and name.endswith(".tmp"))]
    if names and DESCRIPTION not in names and newest_checkpoint(run_dir) is None:
        raise UserError(f"{run_dir}: the folder holds files but no run. Name another --run-dir.")


def write_description(run: Run, ancestry: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write run.json, and mean_image.npy if the recipe subtracts a mean image.

    ancestry  the checkpoints from which the run and its ancestors were forked, the oldest first (train/trainer/fork.py)

    Raises DiskFull if there is no disk space, and UserError if a file cannot be written for another reason.
    """
    settings = {name: value for name, value in asdict(run.config).items() if name not in ("recipe", "model")}
    description = {
        "identity": run.identity,
        "settings": {
            **{name: encodable(str(value)) if isinstance(value, Path) else value for name, value in settings.items()},
            "store_absolute": encodable(os.path.abspath(run.config.store)),
        },
        **run.training_facts(),
        "store": store_facts(run.store),
        "length": {"steps_per_epoch": run.steps_per_epoch, "steps": run.last_step},
        "ancestry": list(ancestry),
    }
    path = run.run_dir / DESCRIPTION
    try:
        write_atomic(path, json.dumps(description, indent=1).encode())
        save_mean_image(run.run_dir, run.store, run.config.recipe)
    except OSError as error:
        raise disk_error(error, f"{path}: cannot be written ({error.strerror or error}). Free disk space.") from None

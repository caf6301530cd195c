"""Program for torchrun: trains the runs of a JSON file one after another, each on all replicas.

The file holds a list of [name, settings]. `run_config` describes the settings. Rank 0 writes the folder of each run
next to the file.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.small_training import SMALL_ALEXNET
from train.config.overrides import apply_overrides
from train.config.recipes import RECIPES
from train.config.run_config import RunConfig
from train.monitor.console_view import QuietView
from train.replicas.group import group_from_environment, joined
from train.runs.run import Run
from train.trainer.loop import fit


def run_config(store: Path, run_dir: Path, settings: dict[str, Any]) -> RunConfig:
    """Return the configuration of a run of a small network.

    `settings` has the keys "recipe", "set" (a list of FIELD=VALUE), and names of fields of RunConfig.
    """
    recipe = apply_overrides(RECIPES[settings["recipe"]], settings.get("set", []))
    fields = {name: value for name, value in settings.items() if name not in ("recipe", "set")}
    config = RunConfig(store, recipe, 8, seed=3, model=SMALL_ALEXNET, run_dir=run_dir, log_every=1, threads=1)
    return replace(config, **fields)


def main(store: Path, runs: Path) -> None:
    """Train all runs of the file `runs` on the images of `store`."""
    with joined(group_from_environment(), 60) as group:
        for name, settings in json.loads(runs.read_text()):
            config = run_config(store, runs.parent / name, {**settings, "replicas": group.size})
            fit(Run.open(config), QuietView(), group)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))

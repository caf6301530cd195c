"""A training that takes about a second on a CPU, a comparison of two runs, and a small checkpoint and run.json."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from train.config.architecture import ALEXNET, Architecture, Widths, architecture_values
from train.config.identity import as_json, recipe_values
from train.config.recipe import Recipe, ScheduleChange
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.model.summary import summarize
from train.runs import checkpoint
from train.runs.checkpoint import Checkpoint
from train.runs.run_dir import CLOCK_DEPENDENT

SMALL_ALEXNET = replace(ALEXNET, widths=Widths(8, 8, 8, 8, 8, 16, 16))


def small_config(store: Path, run_dir: Path, **changes: Any) -> RunConfig:
    """Return the settings of a run on the 30 training images of `store`: 3 epochs of 3 steps of 8 images."""
    config = RunConfig(
        store=store,
        recipe=replace(SHORT, dropout=0.5, schedule=(ScheduleChange(1.5, lr=0.002),)),
        batch_size=8,
        seed=3,
        model=SMALL_ALEXNET,
        run_dir=run_dir,
        epochs=3,
        log_every=1,
        checkpoint_every=2,
        threads=2,
    )
    return replace(config, **changes)


TINY_ALEXNET = replace(ALEXNET, widths=Widths(2, 2, 2, 2, 2, 2, 2))
ENVIRONMENT = {"alexnet": "0.1.0", "torch": "2.6.0", "python": "3.11.0", "machine": "x86_64"}
IDENTITY = {
    "store_fingerprint": "f" * 64,
    "classes": 2,
    "model": "alexnet",
    "model_numbers": as_json({k: v for k, v in architecture_values(TINY_ALEXNET).items() if k != "name"}),
    "recipe": "short",
    "recipe_numbers": recipe_values(SHORT),
    "batch_size": 8,
    "accumulate": 1,
    "seed": 0,
    "precision": "fp32",
}


def tiny_checkpoint(step: int, **changes: Any) -> Checkpoint:
    """Return a checkpoint of step `step`. The network has two units in each layer, and all its parameters are 0."""
    network = AlexNet(2, SHORT, ("cpu", "cpu"), TINY_ALEXNET)
    shapes = network.joined_tensors()
    stream = {"graph_version": 3, "store_fingerprint": "f" * 64, "split": "train", "batch_size": 8, "world_size": 1}
    stream |= {"seed": 0, "augmentation": asdict(SHORT.augmentation), "layout": "NCHW", "dtype": "float32"}
    fields: dict[str, Any] = {
        "identity": IDENTITY,
        "model": as_json(asdict(TINY_ALEXNET)),
        "recipe": as_json(asdict(SHORT)),
        "classes": ["a", "b"],
        "environment": ENVIRONMENT,
        "steps_per_epoch": 1,
        "validation_due": False,
        "parameters": {name: torch.zeros_like(tensor) for name, tensor in shapes.items()},
        "velocity": {name: torch.zeros_like(tensor) for name, tensor in shapes.items()},
        "schedule": {"best_error": float("inf"), "epochs_since_best": 0, "drops": 0, "finished": False},
        "devices": ["cpu", "cpu"],
        "random": torch.get_rng_state(),
        "random_cuda": [],
        "stream": {**stream, "shard": 0, "epoch": 0, "step": 0},
    }
    return Checkpoint(**{**fields, "step": step, **changes})


def tiny_description(
    recipe: Recipe = SHORT, model: Architecture = TINY_ALEXNET, fingerprint: str = "f" * 64, **settings: Any
) -> dict[str, Any]:
    """Return the content of a run.json, for a store with two classes. `settings` replaces or adds settings."""
    ones, identity_matrix = [1.0] * 3, [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    colour = {"records": 80, "pixels": 80 << 16, "mean_rgb": [100.0] * 3, "covariance": identity_matrix}
    colour |= {"eigenvalues": ones, "stdevs": ones, "eigenvectors": identity_matrix, "pixel_scale": 255}
    of_store = {"side_px": 256, "keep_aspect": False, "format": "jpeg", "quality": 90, "filter": "area", "seed": 0}
    all_settings = {
        **{"store": "store", "batch_size": 8, "seed": 0, "precision": "fp32", "accumulate": 1, "run_dir": "run"},
        **{"devices": ["cpu", "cpu"], "epochs": 10, "steps": None, "log_every": 1, "checkpoint_every": 10},
        **{"keep": 2, "threads": 1},
        **settings,
    }
    identity = {
        **IDENTITY,
        "store_fingerprint": fingerprint,
        "model": model.name,
        "model_numbers": as_json({k: v for k, v in architecture_values(model).items() if k != "name"}),
        "recipe": recipe.name,
        "recipe_numbers": recipe_values(recipe),
        **{name: all_settings[name] for name in ("batch_size", "accumulate", "seed", "precision")},
    }
    return {
        "identity": identity,
        "settings": all_settings,
        "model": as_json(asdict(model)),
        "recipe": as_json(asdict(recipe)),
        "classes": ["a", "b"],
        "environment": ENVIRONMENT,
        "store": {
            "fingerprint": "e" * 64,
            "settings": of_store,
            "tools": {"alexnet": "0.1.0"},
            "splits": {"train": {"records": 80, "bytes": 1000, "label_counts": [40, 40]}},
            "colour": colour,
        },
        "length": {"steps_per_epoch": 10, "steps": 100},
        "ancestry": [],
    }


def load_modules_of_a_training() -> None:
    """Import the modules that torch and TensorBoard import when a process first trains. This takes three seconds.

    A program calls this function before it forks processes that train. No thread is started.
    """
    import_module("tensorboard.summary.writer.record_writer")
    summarize(3, SMALL_ALEXNET, SHORT)  # makes torch import its modules for the device `meta`


def metrics_without_clock(run_dir: Path) -> list[dict]:
    """Return the lines of metrics.jsonl without the keys that depend on the clock or the machine."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK_DEPENDENT} for line in lines]


def assert_same_result(run_dir: Path, other_run_dir: Path) -> None:
    """Assert that two runs have the same metrics, last step, parameters and velocities, bit for bit."""
    assert metrics_without_clock(run_dir) == metrics_without_clock(other_run_dir)
    state, other = (checkpoint.load_latest(folder) for folder in (run_dir, other_run_dir))
    assert state is not None and other is not None and state.step == other.step
    for part in ("parameters", "velocity"):
        for name, tensor in getattr(state, part).items():
            assert torch.equal(tensor, getattr(other, part)[name]), name

"""Checkpoints without a network, for tests of how checkpoints are written, kept and read."""

from __future__ import annotations

from typing import Any

import torch

from train.runs.checkpoint import Checkpoint


def empty_checkpoint(step: int, **fields: Any) -> Checkpoint:
    """A checkpoint of `step` with no parameters; `fields` replace others of it."""
    mappings = ("identity", "model", "recipe", "environment", "parameters", "velocity", "schedule", "stream")
    sequences = ("classes", "devices", "random_cuda")
    defaults: dict[str, Any] = {name: {} for name in mappings} | {name: [] for name in sequences}
    rest = {"steps_per_epoch": 1, "validation_due": False, "random": torch.zeros(1, dtype=torch.uint8)}
    return Checkpoint(**{**defaults, **rest, "step": step, **fields})

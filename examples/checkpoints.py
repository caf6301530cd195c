"""Checkpoints of everything that a training program must restore: network, optimizer, schedule and loader."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def save(path: Path, parts: Mapping[str, Any]) -> None:
    """Save the state_dict() of each object in `parts`. If a kill interrupts the writing, the old checkpoint stays."""
    partial = path.with_name(f"{path.name}.partial")
    torch.save({name: part.state_dict() for name, part in parts.items()}, partial)
    os.replace(partial, path)


def load(path: Path, parts: Mapping[str, Any]) -> None:
    """Restore the states of the objects in `parts`. If there is no checkpoint, change nothing."""
    if path.exists():
        states = torch.load(path, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(states[name])

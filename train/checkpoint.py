"""Checkpoints: one file, whole or not there, loaded without executing anything.

`checkpoint-00001500.pt` in the run folder is the state after step 1,500: parameters and velocity in the joined shapes,
schedule, stream, random generators, and the identity of the run. Written to a temporary name, synced, renamed; the last
two are kept.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prep.console import UserError, say
from prep.manifest import sync_folder

FORMAT = 1
KEPT = 2


def save(run_dir: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, and containers of these) as the checkpoint of `step`."""
    path = run_dir / f"checkpoint-{step:08d}.pt"
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error}). The checkpoints before it are whole: make room and "
            "give the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(run_dir)
    for old in [p for p in checkpoints(run_dir) if p <= path][:-KEPT]:
        old.unlink()
    return path


def drop_after(run_dir: Path, step: int) -> None:
    """Remove checkpoints of later steps: a run that goes on from `step` found that they cannot be read."""
    for path in checkpoints(run_dir):
        if path.name > f"checkpoint-{step:08d}.pt":
            path.unlink()


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(run_dir.glob("checkpoint-*.pt"))


def load_latest(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, on the CPU; None where the run has none.

    One that cannot be read is named and passed over. Raises UserError where none of several can be read, or the newest
    is of another format.
    """
    found = checkpoints(run_dir)
    for path in reversed(found):
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception:  # a torn file makes torch raise many kinds, some with advice that is not ours
            say(f"{path}: torn, altered or not a checkpoint; the one before it is used.")
            continue
        if state.get("format") != FORMAT:
            raise UserError(f"{path}: checkpoint format {state.get('format')}, this program reads {FORMAT}.")
        return state
    if found:
        raise UserError(f"{run_dir}: none of its {len(found)} checkpoints can be read. Start a new --run-dir.")
    return None

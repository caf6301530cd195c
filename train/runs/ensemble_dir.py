"""The folder of an ensemble. An ensemble is several runs that train networks with different seeds on one stream.

ensemble/
  ensemble.json   number of members, the seed from which the members' seeds are counted, seed of the stream
  member-1/       a run folder (train/runs/run_dir.py), like that of a run that was trained alone
  member-2/       …

This module does not import torch, so that `alextrain status` starts quickly.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from prep.console import UserError, disk_error, shell_quoted
from prep.files import hold_lock, write_atomic
from train.runs.run_dir import DESCRIPTION

ENSEMBLE = "ensemble.json"


@dataclass(frozen=True)
class Ensemble:
    """The content of ensemble.json."""

    members: int  # number of members, which are numbered from 1
    seed: int  # member k has the seed `seed` + k
    stream_seed: int  # seed of the stream, which is the same for all members


def member_dir(folder: Path, number: int) -> Path:
    """Return the run folder of a member. Members are numbered from 1."""
    return folder / f"member-{number}"


def member_dirs(folder: Path, members: int) -> list[Path]:
    """Return the run folders of all members of an ensemble."""
    return [member_dir(folder, number) for number in range(1, members + 1)]


def read_ensemble(folder: Path) -> Ensemble | None:
    """Return the ensemble in `folder`. Returns None if `folder` is not the folder of an ensemble.

    Raises UserError if ensemble.json cannot be read.
    """
    path = folder / ENSEMBLE
    try:
        content = json.loads(path.read_bytes())
        ensemble = Ensemble(**content)
        if not all(isinstance(value, int) for value in content.values()) or ensemble.members < 1:
            raise ValueError("expected whole numbers, and at least one member")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Repeat the alextrain run command with all its options to rewrite it."
        ) from None
    return ensemble


def make_ensemble_dir(folder: Path, ensemble: Ensemble) -> None:
    """Create the folder of an ensemble and write ensemble.json, or accept a folder that already holds an ensemble.

    Raises UserError if the folder cannot be created, or if it holds other files. Raises DiskFull if there is no disk
    space.
    """
    path = folder / ENSEMBLE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise UserError(f"{folder}: the folder holds files but no ensemble. Name another --run-dir.")
        with hold_lock(folder, "training"):
            for leftover in folder.glob(f".{ENSEMBLE}.*.tmp"):  # temporary files of a killed process
                leftover.unlink()
            write_atomic(path, json.dumps(asdict(ensemble)).encode())
    except OSError as error:
        raise disk_error(error, f"--run-dir {folder}: {error.strerror or error}. Name another.") from None


def with_members(paths: Iterable[Path]) -> list[Path]:
    """Return `paths`, with the folder of each ensemble replaced by the run folders of its members.

    Raises UserError if the training of a member has not begun.
    """
    expanded: list[Path] = []
    for path in paths:
        ensemble = read_ensemble(path)
        if ensemble is None:
            expanded.append(path)
            continue
        for run_dir in member_dirs(path, ensemble.members):
            if not (run_dir / DESCRIPTION).exists():
                raise UserError(
                    f"{run_dir}: the training of this member has not begun. Train the ensemble with: alextrain run "
                    f"--run-dir {shell_quoted(path)}. Or name the members that are trained."
                )
            expanded.append(run_dir)
    return expanded


def check_single_run(path: Path) -> None:
    """Raise UserError if `path` is the folder of an ensemble, for commands that open one run."""
    ensemble = read_ensemble(path)
    if ensemble is not None:
        raise UserError(
            f"{path}: an ensemble of {ensemble.members} networks, not a single run. Name one of its members, "
            f"such as {member_dir(path, 1)}."
        )

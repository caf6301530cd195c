"""The folder of an ensemble. An ensemble is several runs that train networks with different seeds on one stream.

ensemble/
  ensemble.json   number of members, the seed from which the members' seeds are counted, seed of the stream
  member-1/       a run folder (train/runs/run_dir.py), like that of a run that was trained alone
  member-2/       …

This module does not import torch, so that `alextrain status` starts quickly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from prep.console import UserError, disk_error, shell_quoted
from prep.files import check_output_folder, hold_lock, write_atomic
from prep.schema import decode, read_regular
from train.formats.small_files import MAX_BYTES, EnsembleFile
from train.runs.run_dir import has_description, read_description

ENSEMBLE = "ensemble.json"


@dataclass(frozen=True)
class Ensemble:
    """The content of ensemble.json."""

    members: int  # number of members, which are numbered from 1
    seed: int  # member k has the seed `seed` + k
    stream_seed: int  # seed of the stream, which is the same for all members

    def __str__(self) -> str:
        return f"{self.members} networks, seed {self.seed}, stream seed {self.stream_seed}"


def member_dir(folder: Path, number: int) -> Path:
    """Return the run folder of a member. Members are numbered from 1."""
    return folder / f"member-{number}"


def member_dirs(folder: Path, members: int) -> list[Path]:
    """Return the run folders of all members of an ensemble."""
    return [member_dir(folder, number) for number in range(1, members + 1)]


def read_ensemble(folder: Path) -> Ensemble | None:
    """Return the ensemble in `folder`. Returns None if `folder` is not the folder of an ensemble.

    Raises UserError if ensemble.json cannot be read, or if it is missing in a folder with members.
    """
    path = folder / ENSEMBLE
    advice = (
        f"To write {ENSEMBLE} again, repeat the alextrain run command with --members, and with --seed and "
        "--stream-seed if they were given."
    )
    try:
        content = read_regular(path, MAX_BYTES, advice)
    except NotADirectoryError:
        return None
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not _member_numbers(folder):
            return None
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    return Ensemble(**msgspec.structs.asdict(decode(EnsembleFile, content, str(path), advice)))


def _member_numbers(folder: Path) -> list[int]:
    """Return the numbers of the members that have a folder."""
    names = (re.fullmatch(r"member-([1-9]\d*)", path.name) for path in folder.glob("member-*/"))
    return sorted(int(name[1]) for name in names if name)


def check_ensemble_dir(folder: Path, ensemble: Ensemble) -> None:
    """Raise UserError if `ensemble` cannot be trained in `folder`, because the folder holds something else.

    The folder may be missing or empty. It may also hold the same ensemble, with at most `ensemble.members` members. If
    ensemble.json is missing or damaged, the folder must hold nothing except folders of members.
    """
    check_output_folder(folder)
    if not folder.exists():
        return
    try:
        held = read_ensemble(folder)
    except UserError:
        held = None
        numbers = _member_numbers(folder)
        if numbers and numbers[-1] > ensemble.members:
            raise UserError(
                f"--members {ensemble.members}: {folder} holds {member_dir(folder, numbers[-1]).name}. Pass --members "
                f"{numbers[-1]}, or move {member_dir(folder, numbers[-1])} away."
            ) from None
    if held is not None:
        if (held.seed, held.stream_seed) != (ensemble.seed, ensemble.stream_seed) or held.members > ensemble.members:
            raise UserError(f"{folder} holds another ensemble ({held}; here {ensemble}). Name another folder.")
        return
    known = {ENSEMBLE, *(member_dir(folder, number).name for number in _member_numbers(folder))}
    if any(path.name not in known and not path.name.startswith(".") for path in folder.iterdir()):
        raise UserError(f"{folder}: the folder holds files but no ensemble. Name another folder.")


def make_ensemble_dir(folder: Path, ensemble: Ensemble) -> None:
    """Create the folder of an ensemble and write ensemble.json, or accept a folder that already holds the ensemble.

    Raises the errors of check_ensemble_dir. Raises UserError if the folder cannot be created, and DiskFull if there is
    no disk space.
    """
    path = folder / ENSEMBLE
    try:
        check_ensemble_dir(folder, ensemble)
        folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(folder, "training"):
            for leftover in folder.glob(f".{ENSEMBLE}.*.tmp"):  # temporary files of a killed process
                leftover.unlink()
            write_atomic(path, json.dumps(asdict(ensemble)).encode())
    except OSError as error:
        raise disk_error(error, f"--run-dir {folder}: {error.strerror or error}. Name another folder.") from None


def with_members(paths: Iterable[Path]) -> list[Path]:
    """Return `paths`, with the folder of each ensemble replaced by the run folders of its members.

    Raises UserError if the training of a member has not begun, or if the folder of a member holds a run with other
    seeds.
    """
    expanded: list[Path] = []
    for path in paths:
        ensemble = read_ensemble(path)
        if ensemble is None:
            expanded.append(path)
            continue
        for number, run_dir in enumerate(member_dirs(path, ensemble.members), start=1):
            if not has_description(run_dir):
                raise UserError(
                    f"{run_dir}: the training of this member has not begun. Train the ensemble with: alextrain run "
                    f"--run-dir {shell_quoted(path)}. Or name the folders of members that have been trained."
                )
            identity = read_description(run_dir)["identity"]
            seeds = identity.get("seed"), identity.get("stream_seed", identity.get("seed"))
            if seeds != (ensemble.seed + number, ensemble.stream_seed):
                raise UserError(
                    f"{run_dir}: was trained with seed {seeds[0]} and stream seed {seeds[1]}, but member {number} has "
                    f"seed {ensemble.seed + number} and stream seed {ensemble.stream_seed}. Move this folder away, and "
                    f"train the member with: alextrain run --run-dir {shell_quoted(path)}"
                )
            expanded.append(run_dir)
    return expanded


def check_single_run(path: Path) -> None:
    """Raise UserError if `path` is the folder of an ensemble. Commands that open one run call this function."""
    ensemble = read_ensemble(path)
    if ensemble is not None:
        raise UserError(
            f"{path}: an ensemble of {ensemble.members} networks, not a single run. Name one of its members, "
            f"such as {member_dir(path, 1)}."
        )

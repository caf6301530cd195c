"""Finds the ensemble that the options of `alextrain run` describe: a new ensemble, or the ensemble in --run-dir.

`alextrain run` reports a missing store before it imports torch. Because this module is used before that import, it does
not import torch at its top.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prep.console import UserError, WrongArgument
from prep.store.manifest import Store
from train.runs.ensemble_dir import Ensemble, member_dirs, read_ensemble
from train.runs.run_dir import has_description, newest_checkpoint

if TYPE_CHECKING:
    from train.runs.run import Run


def requested_ensemble(options: Mapping[str, Any], given: Collection[str]) -> Ensemble | None:
    """Return the ensemble to train; None if the options describe a single run.

    options  the values of the command's options by parameter name
    given    names of the options that the user gave

    An ensemble in --run-dir can get more members, but cannot lose members. Raises UserError for options that contradict
    the content of --run-dir.
    """
    run_dir, members, fork = options["run_dir"], options["members"], options["fork"]
    try:
        held = read_ensemble(run_dir)
    except UserError:
        if members is None or fork:
            raise
        held = None  # make_ensemble_dir rewrites the damaged ensemble.json
    if held is None and members is None:
        if options["one_at_a_time"]:
            raise WrongArgument("--one-at-a-time: a single network is trained. Pass --members N to train an ensemble.")
        return None
    if held is None:
        _check_new(run_dir, members, fork)
        stream_seed = options["seed"] if options["stream_seed"] is None else options["stream_seed"]
        return Ensemble(members, options["seed"], stream_seed)
    count = held.members if members is None else members
    if count < held.members or (fork and count > held.members):
        fewer = "" if fork else " or more"
        raise WrongArgument(
            f"--members {count}: the ensemble in {run_dir} has {held.members} networks. Pass --members "
            f"{held.members}{fewer}, or omit the option."
        )
    seeds = {name: options[name] if name in given else getattr(held, name) for name in ("seed", "stream_seed")}
    for name, seed in seeds.items():
        if seed != getattr(held, name) and not fork:
            raise UserError(
                f"--{name.replace('_', '-')} {seed}: the ensemble in {run_dir} has the {name.replace('_', ' ')} "
                f"{getattr(held, name)}. Omit the option, name a new --run-dir, or begin new runs from the newest "
                "checkpoints with --fork NEW_DIR."
            )
    return Ensemble(count, **seeds)


def _check_new(run_dir: Path, members: int, fork: Path | None) -> None:
    if fork:
        raise UserError(
            f"--members {members}: {run_dir} holds no ensemble to fork. Name the folder of an ensemble, or fork "
            "a single run without --members."
        )
    if has_description(run_dir) or newest_checkpoint(run_dir) is not None:
        raise UserError(
            f"--members {members}: {run_dir} holds a single run. Name another --run-dir for the ensemble, or continue "
            "the run without --members."
        )


def open_members(ensemble: Ensemble, options: Mapping[str, Any], given: Collection[str]) -> list[Run]:
    """Return the members of an ensemble, with the settings that the options give.

    Settings that no option gives have the values in the run.json of a member, or their defaults. Raises the errors of
    requested_config and Run.open.
    """
    run_dir = options["run_dir"]
    described = [path for path in member_dirs(run_dir, ensemble.members) if has_description(path)]
    store = None
    # A missing store is reported before torch is imported.
    if "store" in given or not described:
        store = Store.open(options["store"])
        store.split("train")
    from train.experiments.ensemble import member_configs
    from train.runs.run import Run
    from train.runs.saved_config import requested_config, saved_config

    saved = next((config for path in described if (config := saved_config(path))), None)
    seeds = {"seed": ensemble.seed, "stream_seed": ensemble.stream_seed}
    config = requested_config({**options, **seeds}, {*given, *seeds}, saved)
    configs = member_configs(replace(config, run_dir=run_dir), ensemble.members)
    first = Run.open(configs[0], store)
    return [first, *(Run.open(other, first.store) for other in configs[1:])]

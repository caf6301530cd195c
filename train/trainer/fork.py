"""A new run from another's newest checkpoint, with other settings: `alextrain run --fork NEW_DIR`.

What may change is all that leaves the shapes of the parameters as they are. Parameters and velocity are taken over.
The step is that of the same place in the data: as many epochs, and as large a share of the next one, which another
batch size counts in other steps. The schedule goes on where it was if it is the same, and begins anew otherwise; so do
the random generators with the seed. The fork's first checkpoint is written at once, and from then on it is a run as
any other, which keeps the checkpoints that it came from as `ancestry`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from prep.console import UserError, count_noun, say
from prep.files import hold_lock
from prep.store.manifest import Store
from train.config.identity import check_identity, differences, identity
from train.config.run_config import RunConfig, check_parts, length
from train.model.alexnet import AlexNet
from train.runs import checkpoint
from train.runs.run import claim, describe, what_it_trains
from train.trainer.loop import stream_at
from train.trainer.schedule import Schedule


def fork(config: RunConfig, new_dir: Path) -> RunConfig:
    """The configuration of the run `new_dir`, which begins with the newest checkpoint of config.run_dir.

    Does nothing else where the fork has begun. Raises UserError for a run without a checkpoint, for parameters of other
    shapes, and for a folder that is another's.
    """
    forked = _forked(config, new_dir)
    claim(new_dir)
    with hold_lock(new_dir, "training"):
        _begin(forked, config.run_dir)
    return forked


def foretell(config: RunConfig, new_dir: Path | None) -> str:
    """What a run, with --fork where `new_dir` is given, would begin with, for --dry-run; writes nothing.

    Raises UserError where the run would for what is in the folders.
    """
    store, planned = Store.open(config.store), _forked(config, new_dir) if new_dir else config
    begun = None
    if planned.run_dir.exists():
        claim(planned.run_dir)
        begun = checkpoint.load_latest(planned.run_dir)
    if begun is not None:
        if new_dir:
            _check_origin(begun, new_dir, config.run_dir)
        check_identity(begun, identity(planned, store), planned.run_dir)
        return f"{planned.run_dir}: would go on after step {begun['step']:,}."
    if new_dir:
        state = _load_origin(planned, store, config.run_dir)
        return f"{new_dir}: would begin with {config.run_dir} after step {state['step']:,}."
    return f"{planned.run_dir}: would begin at step 0."


def _forked(config: RunConfig, new_dir: Path) -> RunConfig:
    check_parts(config)
    if config.run_dir.resolve() == new_dir.resolve():
        raise UserError(f"--fork {new_dir}: that is --run-dir itself. Name another folder.")
    return replace(config, run_dir=new_dir)


def _check_origin(begun: Mapping[str, Any], new_dir: Path, origin: Path) -> None:
    came = begun["ancestry"][-1]["path"] if begun["ancestry"] else None
    if came != str(origin.resolve()) and (came is None or Path(came).exists()):
        raise UserError(f"--fork {new_dir}: a run that began with {came or 'nothing'}, not with {origin}.")


def _load_origin(config: RunConfig, store: Store, origin: Path) -> dict[str, Any]:
    if not origin.is_dir():
        raise UserError(f"--run-dir {origin}: no such run to fork.")
    state = checkpoint.load(origin)
    _check_shapes(config, store, state)
    return state


def _begin(config: RunConfig, origin: Path) -> None:
    begun = checkpoint.load_latest(config.run_dir)
    if begun is not None:
        _check_origin(begun, config.run_dir, origin)
        return
    store = Store.open(config.store)
    state = _load_origin(config, store, origin)
    mine = identity(config, store)
    changed = differences(state["identity"], mine)
    names = {difference.name for difference in changed}
    step, epoch, place = _step(config, store, state)
    schedule = Schedule(config.recipe)
    if any(name.startswith("recipe.schedule") for name in names):
        state["schedule"] = schedule.state_dict()
    schedule.load_state_dict(state["schedule"])
    with stream_at(config, schedule, epoch) as loader:
        loader.seek(epoch, place)
        stream = loader.state_dict()
    ancestor = {
        "path": str(origin.resolve()),
        "step": state["step"],
        "checkpoint_digest": state["digest"],
        "differences": [difference._asdict() for difference in changed],
    }
    ancestry = [*state["ancestry"], ancestor]
    state |= {
        "identity": mine,
        **what_it_trains(config, store),
        "step": step,
        "steps_per_epoch": length(config, store)[0],
        "stream": stream,
        "devices": [] if "seed" in names else state["devices"],  # generators of other devices begin anew
        "best": None,
        "ancestry": ancestry,
    }
    del state["digest"]
    describe(config, store, ancestry)
    checkpoint.save(config.run_dir, step, state)
    say(
        f"{config.run_dir}: begins with {origin} after step {ancestor['step']:,}, as step {step:,}; "
        f"{count_noun(len(changed), 'difference')}{': ' if names else ''}{', '.join(sorted(names))}"
    )


def _step(config: RunConfig, store: Store, state: dict[str, Any]) -> tuple[int, int, int]:
    """(step, epoch, step of the epoch) of this run at which as much of the data is done as in the checkpoint."""
    theirs, mine = state["steps_per_epoch"], length(config, store)[0]
    epoch, place = divmod(state["step"], theirs)
    return epoch * mine + place * mine // theirs, epoch, place * mine // theirs


def _check_shapes(config: RunConfig, store: Store, state: dict[str, Any]) -> None:
    network = AlexNet(len(store.classes), config.recipe, ("meta", "meta"), config.model)
    shapes = {
        name: (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
        for name, parameters in network.by_joined_name().items()
    }
    for name, tensor in state["parameters"].items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"--fork {config.run_dir}: {name} has shape {tuple(tensor.shape)} in the checkpoint, {shapes[name]} in "
                "this network. What a fork changes may not change shapes: give the model, the crossings and as many "
                "classes as it began with."
            )

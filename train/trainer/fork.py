"""Starts a new run from another run's newest checkpoint, with other settings: `alextrain run --fork NEW_DIR`.

A fork has the settings of the other run, except those that its command gives (train/runs/saved_config.py). All settings
that differ are listed before the training. A fork can change any setting that does not change the shape of a parameter.
The fork copies the parameters and the velocity from the checkpoint. The fork begins at the checkpoint's position in the
data: a number of whole epochs and a fraction of the next epoch. The fraction is rounded down to a whole step of the
fork. If the batch size changes, the step number at this position also changes. If the fork does not change the
schedule, it also copies the state of the schedule: for a plateau schedule, the lowest error, the number of epochs since
then and the number of drops so far. A changed schedule begins without such a state. A schedule that depends only on the
epoch, such as a cosine, is in both cases evaluated at the epoch of the fork. If the seed changes, the random generators
are seeded anew.

`fork` writes the first checkpoint of the new run. The new run is then trained like any other run. The key "ancestry"
in run.json and in the checkpoints lists the checkpoint from which the run was forked, and the ancestors of that
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from prep.console import UserError, WrongArgument, count_noun, encodable, path_of, say
from prep.files import hold_lock
from train.config.identity import Difference, check_identity, differences
from train.model.alexnet import AlexNet
from train.optim.schedule import Schedule
from train.replicas.group import ALONE, ReplicaGroup
from train.runs import checkpoint
from train.runs.checkpoint import Checkpoint
from train.runs.run import Run, make_run_dir, write_description
from train.runs.saved_config import changed_settings, difference_lines, saved_config
from train.trainer.loop import training_stream, without_service


def fork(run: Run, new_dir: Path, group: ReplicaGroup = ALONE) -> Run:
    """Start a new run in `new_dir` with the settings of `run`. Returns the new run.

    The new run begins with the newest checkpoint in the folder of `run`. If `new_dir` already holds the same fork,
    nothing is written. With several replicas, only rank 0 reads and writes the folders. Raises UserError if the folder
    of `run` has no checkpoint, or if the shape of a parameter would change. Raises UserError if `new_dir` holds another
    run or other files.
    """
    with group.together():
        forked = _moved_to(run, new_dir)
        if group.is_first:
            make_run_dir(new_dir)
            with hold_lock(new_dir, "training"):
                _begin(forked, run.run_dir)
    return forked


def preview_fork(run: Run, new_dir: Path | None) -> list[str]:
    """Return the messages of `alextrain run --dry-run`, which say after which step the run or its fork would begin.

    For a new fork, the messages also list the settings in which the fork differs from the run that is forked. Writes
    nothing. Raises UserError if `alextrain run` would refuse to train because of the content of a run folder.
    """
    planned = _moved_to(run, new_dir) if new_dir else run
    resumed = None
    if planned.run_dir.exists():
        make_run_dir(planned.run_dir)
        resumed = checkpoint.load_latest(planned.run_dir)
    if resumed is not None:
        if new_dir:
            _check_origin(resumed, new_dir, run.run_dir)
        check_identity(resumed.identity, planned.identity, planned.run_dir)
        return [f"{planned.run_dir}: would resume after step {resumed.step:,}.", *_no_step_left(planned, resumed.step)]
    if new_dir:
        origin = _load_origin(planned, run.run_dir)
        changed = _differences(planned, run.run_dir, origin)
        step = _position(planned, origin).step
        return [
            f"{new_dir}: would begin with the checkpoint of {run.run_dir} after step {origin.step:,}, which is step "
            f"{step:,} of the fork; {_count_text(changed)}",
            *difference_lines(changed),
            *_no_step_left(planned, step),
        ]
    return [f"{planned.run_dir}: would begin at step 0."]


def _differences(run: Run, origin: Path, parent: Checkpoint) -> list[Difference]:
    """Return the settings in which a fork differs from its origin, the run from which it is forked."""
    before = saved_config(origin)
    if before is None:
        return differences(parent.identity, run.identity)
    return changed_settings(before, run, parent.identity)


def _no_step_left(run: Run, step: int) -> list[str]:
    is_done = step >= run.last_step
    return [f"No step is left of {run.last_step:,}. {run.how_to_train_further}"] * is_done


def _count_text(changed: Sequence[Difference]) -> str:
    names = ", ".join(sorted(difference.name for difference in changed))
    return f"{count_noun(len(changed), 'difference')}{': ' if names else ''}{names}"


def _moved_to(run: Run, new_dir: Path) -> Run:
    """Return `run` with its folder replaced by `new_dir`."""
    if run.run_dir.resolve() == new_dir.resolve():
        raise WrongArgument(f"--fork {new_dir}: that is --run-dir itself. Name another folder.")
    return replace(run, config=replace(run.config, run_dir=new_dir))


def _check_origin(resumed: Checkpoint, new_dir: Path, origin: Path) -> None:
    """Raise UserError if the run in `new_dir` was not forked from `origin`.

    If the folder from which the run was forked no longer exists, there is no error, because that folder may have been
    renamed to `origin`.
    """
    parent = resumed.ancestry[-1]["path"] if resumed.ancestry else None
    if parent != encodable(str(origin.resolve())) and (parent is None or path_of(parent).exists()):
        held = (
            f"a run that was forked from {parent}, not from {origin}"
            if parent
            else f"a run that is no fork of {origin}"
        )
        raise UserError(f"--fork {new_dir}: holds {held}. Name a new folder.")


def _load_origin(run: Run, origin: Path) -> Checkpoint:
    if not origin.is_dir():
        raise UserError(f"--run-dir {origin}: no such run to fork. Name the folder of a run.")
    state = checkpoint.load(origin)
    _check_shapes(run, state)
    return state


def _begin(run: Run, origin: Path) -> None:
    """Write the first checkpoint of a fork, unless the fork already has a checkpoint."""
    existing = checkpoint.load_latest(run.run_dir)
    if existing is not None:
        _check_origin(existing, run.run_dir, origin)
        return
    parent = _load_origin(run, origin)
    changed = differences(parent.identity, run.identity)
    names = {difference.name for difference in changed}
    position = _position(run, parent)
    schedule = Schedule(run.config.recipe, run.config.batch_size)
    if not any(name.startswith("recipe.schedule") for name in names):
        schedule.load_state_dict(parent.schedule)
    with training_stream(without_service(run), schedule, position.epoch) as loader:
        loader.seek(position.epoch, position.step_of_epoch)
        stream = loader.state_dict()
    ancestor: dict[str, Any] = {
        "path": encodable(str(origin.resolve())),
        "step": parent.step,
        "checkpoint_digest": parent.digest,
        "differences": [difference._asdict() for difference in changed],
    }
    ancestry = [*parent.ancestry, ancestor]
    first = replace(
        parent,
        identity=run.identity,
        **run.training_facts(),
        step=position.step,
        steps_per_epoch=run.steps_per_epoch,
        stream=stream,
        schedule=schedule.state_dict(),
        devices=[] if "seed" in names else parent.devices,  # with an empty list, the run seeds its generators again
        best=None,
        ancestry=ancestry,
    )
    shown = _differences(run, origin, parent)
    say(
        f"{run.run_dir}: begins with the checkpoint of {origin} after step {parent.step:,}, which is step "
        f"{position.step:,} of the fork; {_count_text(shown)}"
    )
    for line in difference_lines(shown):
        say(line)
    write_description(run, ancestry)
    checkpoint.write(run.run_dir, first)


class _Position(NamedTuple):
    step: int
    epoch: int
    step_of_epoch: int


def _position(run: Run, parent: Checkpoint) -> _Position:
    """Return the position at which a fork begins.

    The position is the number of epochs that `parent` has completed, with a fraction that is rounded down to a step of
    the fork.
    """
    epoch, parent_step_of_epoch = divmod(parent.step, parent.steps_per_epoch)
    step_of_epoch = parent_step_of_epoch * run.steps_per_epoch // parent.steps_per_epoch
    return _Position(epoch * run.steps_per_epoch + step_of_epoch, epoch, step_of_epoch)


def _check_shapes(run: Run, state: Checkpoint) -> None:
    config = run.config
    network = AlexNet(len(run.store.classes), config.recipe, ("meta", "meta"), config.model)
    shapes = {
        name: (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
        for name, parameters in network.parameters_by_joined_name().items()
    }
    for name, tensor in state.parameters.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"--fork {config.run_dir}: {name} has shape {tuple(tensor.shape)} in the checkpoint, {shapes[name]} in "
                "this network. A fork cannot change the shapes of parameters: use the same --model, crossings and "
                "number of classes."
            )

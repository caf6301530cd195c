"""Status of an ensemble, which combines the status of all members."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prep.console import duration_text
from train.runs.ensemble_dir import Ensemble, member_dirs
from train.runs.run_dir import errors_text, has_description
from train.runs.status import status_of

# States of an ensemble in the order of their precedence. The state of an ensemble is the first state in this list that
# a member has.
_PRECEDENCE = ("training", "failed", "dead", "stopped", "new", "finished")
_STATE_TEXT = {"new": "not trained yet", "dead": "crashed"}


def ensemble_status(folder: Path, ensemble: Ensemble) -> dict[str, Any]:
    """Return the object that `alextrain status --json` prints for an ensemble.

    run_dir            path of the ensemble's folder, as given on the command line
    state              "training" if a member is being trained; "finished" if all members have finished; otherwise the
                       first of "failed", "dead", "stopped" and "new" that is the state of a member
    alive, finished    alive: a process is training a member; finished: all members have finished
    seed, stream_seed  seed: member k has the seed `seed` + k; stream_seed: the seed of the stream
    seconds_left       predicted time until all members are trained; None until each member has a line in metrics.jsonl
    members            the status of each member (status_of); {"run_dir", "state": "new"} for a member without run.json

    Raises UserError for a member whose run.json cannot be read.
    """
    members: list[dict[str, Any]] = []
    for run_dir in member_dirs(folder, ensemble.members):
        members.append(status_of(run_dir) if has_description(run_dir) else {"run_dir": str(run_dir), "state": "new"})
    states = {member["state"] for member in members}
    left: list[float | None] = [member.get("seconds_left") for member in members]
    known = [seconds for seconds in left if seconds is not None]
    return {
        "run_dir": str(folder),
        "state": next(state for state in _PRECEDENCE if state in states),
        "alive": "training" in states,
        "finished": states == {"finished"},
        "seed": ensemble.seed,
        "stream_seed": ensemble.stream_seed,
        "seconds_left": max(known) if len(known) == len(left) else None,
        "members": members,
    }


def ensemble_status_lines(status: Mapping[str, Any]) -> list[str]:
    """Return the result of `ensemble_status` as text: one line for the ensemble, and one line for each member."""
    members = status["members"]
    counts = Counter(_state_text(member) for member in members)
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    seconds = status["seconds_left"]
    time_left = f"; {duration_text(seconds)} left{'' if status['alive'] else ' to train'}" if seconds else ""
    lines = [f"{status['run_dir']}: ensemble of {len(members)} networks: {states}{time_left}"]
    known = next((member for member in members if "model" in member), None)
    if known is not None:
        first, last = status["seed"] + 1, status["seed"] + len(members)
        lines.append(
            f"{known['model']}, recipe {known['recipe']}, seeds {first} to {last}, stream seed {status['stream_seed']}"
        )
    lines += [_member_line(member) for member in members]
    if not status["alive"] and not status["finished"]:
        lines.append("The same alextrain run command continues each member after its newest checkpoint.")
    return lines


def _state_text(member: Mapping[str, Any]) -> str:
    state: str = member["state"]
    return _STATE_TEXT.get(state, state)


def _member_line(member: Mapping[str, Any]) -> str:
    name, state = Path(member["run_dir"]).name, _state_text(member)
    if "step" not in member:
        return f"{name}: {state}"
    reason = f" ({member['said']})" if member["said"] else ""
    train, val, classes = member["train"], member["val"], member["classes"]
    parts = [f"{name}: {state}{reason}", f"step {member['step']:,} of {member['steps']:,}"]
    if train:
        parts.append(f"loss {train['loss']:.3f}")
    if val:
        parts.append(f"validation at epoch {val['epoch']}: {errors_text(val, classes)}")
    return ", ".join(parts)

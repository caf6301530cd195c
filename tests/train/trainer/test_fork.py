"""Forks: what they take over from another run's checkpoint, what they may change, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from prep.console import UserError
from tests.helpers.small_training import SMALL_ALEXNET, metrics_without_clock, small_config
from train.config.recipes import SHORT
from train.runs import checkpoint
from train.runs.checkpoint import checkpoint_paths, read
from train.runs.run import Run
from train.trainer.fork import fork
from train.trainer.loop import fit


def test_a_fork_without_changes_is_the_same_run(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path
) -> None:
    origin = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", steps=4)))
    forked = fork(Run.open(small_config(stores["jpeg"], origin)), tmp_path / "fork")
    fit(forked)
    assert (
        metrics_without_clock(tmp_path / "fork") == metrics_without_clock(uninterrupted_run)[5:]
    )  # 4 steps and a validation
    one, two = checkpoint.load(tmp_path / "fork"), checkpoint.load(uninterrupted_run)
    assert all(torch.equal(tensor, two.parameters[name]) for name, tensor in one.parameters.items())
    (ancestor,) = json.loads((tmp_path / "fork" / "run.json").read_text())["ancestry"]
    assert (ancestor["path"], ancestor["step"], ancestor["differences"]) == (str(origin), 4, [])
    assert ancestor["checkpoint_digest"] == read(checkpoint_paths(origin)[-1]).digest


def test_a_fork_changes_settings_goes_on_and_tells_where_it_came_from(stores: dict[str, Path], tmp_path: Path) -> None:
    origin = fit(Run.open(small_config(stores["ppm"], tmp_path / "run", steps=4)))
    changed = replace(
        small_config(stores["ppm"], origin), batch_size=4, seed=5, recipe=replace(SHORT, dropout=0.25, schedule=())
    )
    state = checkpoint.load(origin)
    checkpoint.write(origin, replace(state, schedule={**state.schedule, "drops": 2}))
    fork(Run.open(small_config(stores["ppm"], origin, seed=5)), tmp_path / "other")
    assert checkpoint.load(tmp_path / "other").schedule["drops"] == 2  # of the same schedule
    first = fork(Run.open(changed), tmp_path / "fork")
    assert checkpoint.load(first.run_dir).schedule["drops"] == 0
    assert checkpoint.load(first.run_dir).step == 9  # 4 of 3 an epoch: an epoch and a third; 7 an epoch of half
    fit(Run.open(replace(first.config, steps=12)))
    again = fork(Run.open(changed), tmp_path / "fork")  # the same command again: it goes on
    fit(again)
    lines = [line for line in metrics_without_clock(first.run_dir) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(10, 22)) and lines[0]["epoch"] == pytest.approx(10 / 7)
    about = json.loads((first.run_dir / "run.json").read_text())
    assert checkpoint.load(first.run_dir).ancestry == about["ancestry"]
    found = {d["name"]: (d["there"], d["here"]) for d in about["ancestry"][0]["differences"]}
    plan = [{"after_epochs": 1.5, "lr": 0.002, "lr_conv1": None, "colour": None}]
    assert found == {
        "recipe.dropout": (0.5, 0.25),
        "recipe.schedule": (plan, []),
        "batch_size": (8, 4),
        "seed": (3, 5),
    }
    fork(Run.open(replace(changed, run_dir=first.run_dir)), tmp_path / "second")
    came = json.loads((tmp_path / "second" / "run.json").read_text())["ancestry"]
    assert [ancestor["path"] for ancestor in came] == [str(origin), str(first.run_dir)]
    with pytest.raises(UserError, match=rf"a run that began with {origin}, not with {tmp_path / 'second'}"):
        fork(Run.open(replace(changed, run_dir=tmp_path / "second")), first.run_dir)
    with pytest.raises(UserError, match="another batch size"):
        fit(Run.open(replace(first.config, batch_size=8)))
    wider = replace(SMALL_ALEXNET, widths=replace(SMALL_ALEXNET.widths, fc7=18))
    with pytest.raises(UserError, match=r"fc7\.weight has shape \(16, 16\) in the checkpoint, \(18, 16\)"):
        fork(Run.open(replace(changed, model=wider)), tmp_path / "third")
    with pytest.raises(UserError, match="that is --run-dir itself"):
        fork(Run.open(changed), origin)
    with pytest.raises(UserError, match="no such run to fork"):
        fork(Run.open(replace(changed, run_dir=tmp_path / "nowhere")), tmp_path / "third")

"""Tests of forks: the state from the checkpoint of another run, the settings that may change, and refused forks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prep.console import UserError
from tests.helpers.alextrain import refusal
from tests.helpers.small_training import SMALL_ALEXNET, metrics_without_clock, small_config
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.runs import checkpoint
from train.runs.checkpoint import checkpoint_paths, read
from train.runs.run import Run
from train.trainer.fork import fork
from train.trainer.loop import fit


def test_a_fork_without_changes_has_the_result_of_the_uninterrupted_run(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path
) -> None:
    origin = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", steps=4)))
    forked = fork(Run.open(small_config(stores["jpeg"], origin)), tmp_path / "fork")
    fit(forked)
    lines_of_origin = 5  # four steps and one validation
    assert metrics_without_clock(tmp_path / "fork") == metrics_without_clock(uninterrupted_run)[lines_of_origin:]
    state, expected = checkpoint.load(tmp_path / "fork"), checkpoint.load(uninterrupted_run)
    assert all(torch.equal(tensor, expected.parameters[name]) for name, tensor in state.parameters.items())
    (ancestor,) = ancestry(tmp_path / "fork")
    assert (ancestor["path"], ancestor["step"], ancestor["differences"]) == (str(origin), 4, [])
    assert ancestor["checkpoint_digest"] == read(checkpoint_paths(origin)[-1]).digest


def ancestry(run_dir: Path) -> list[dict[str, Any]]:
    """Return the checkpoints from which a run and its ancestors were forked, oldest first, as run.json lists them."""
    return json.loads((run_dir / "run.json").read_text())["ancestry"]


@pytest.fixture(scope="module")
def four_steps(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after 4 steps, which are 1 1/3 epochs. A test must not write into the folder of this run."""
    return fit(Run.open(small_config(stores["ppm"], tmp_path_factory.mktemp("origin") / "run", steps=4)))


@pytest.fixture
def origin(four_steps: Path, tmp_path: Path) -> Path:
    """A copy of `four_steps`. In its checkpoint, the schedule has already lowered the learning rate twice."""
    run_dir = Path(shutil.copytree(four_steps, tmp_path / "run"))
    state = checkpoint.load(run_dir)
    checkpoint.write(run_dir, replace(state, schedule={**state.schedule, "drops": 2}))
    return run_dir


@pytest.fixture
def changed(stores: dict[str, Path], origin: Path) -> RunConfig:
    """The configuration of `origin` with half the batch, another seed, another dropout and a constant learning rate."""
    recipe = replace(SHORT, dropout=0.25, schedule=())
    return small_config(stores["ppm"], origin, batch_size=4, seed=5, recipe=recipe)


def test_an_unchanged_schedule_continues_and_a_changed_one_starts_again(
    stores: dict[str, Path], origin: Path, changed: RunConfig, tmp_path: Path
) -> None:
    fork(Run.open(small_config(stores["ppm"], origin, seed=5)), tmp_path / "same schedule")
    assert checkpoint.load(tmp_path / "same schedule").schedule["drops"] == 2
    fork(Run.open(changed), tmp_path / "other schedule")
    assert checkpoint.load(tmp_path / "other schedule").schedule["drops"] == 0


def test_a_fork_with_other_settings_begins_at_the_same_fraction_of_the_epoch_and_resumes(
    origin: Path, changed: RunConfig, tmp_path: Path
) -> None:
    forked = fork(Run.open(changed), tmp_path / "fork")
    # The origin has 3 steps per epoch, and has made 4 steps, which are 1 1/3 epochs. The fork has 7 steps per epoch,
    # and begins after step 9.
    assert checkpoint.load(forked.run_dir).step == 9
    fit(Run.open(replace(forked.config, steps=12)))
    fit(fork(Run.open(changed), tmp_path / "fork"))  # the same command, run again, continues the fork
    lines = [line for line in metrics_without_clock(forked.run_dir) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(10, 22)) and lines[0]["epoch"] == pytest.approx(10 / 7)
    with pytest.raises(UserError, match="another batch size"):
        fit(Run.open(replace(forked.config, batch_size=8)))


def test_run_json_and_checkpoint_of_a_fork_name_its_ancestors_and_the_differences(
    origin: Path, changed: RunConfig, tmp_path: Path
) -> None:
    forked = fork(Run.open(changed), tmp_path / "fork")
    fit(Run.open(replace(forked.config, steps=10)))
    assert checkpoint.load(forked.run_dir).ancestry == ancestry(forked.run_dir)
    differences = {d["name"]: (d["there"], d["here"]) for d in ancestry(forked.run_dir)[0]["differences"]}
    schedule = [{"after_epochs": 1.5, "lr": 0.002, "lr_conv1": None, "colour": None}]
    assert differences == {
        "recipe.dropout": (0.5, 0.25),
        "recipe.schedule": (schedule, []),
        "batch_size": (8, 4),
        "seed": (3, 5),
    }
    fork(Run.open(replace(changed, run_dir=forked.run_dir)), tmp_path / "second")
    paths = [ancestor["path"] for ancestor in ancestry(tmp_path / "second")]
    assert paths == [str(origin), str(forked.run_dir)]
    with pytest.raises(UserError, match=rf"a run that was forked from {origin}, not from {tmp_path / 'second'}"):
        fork(Run.open(replace(changed, run_dir=tmp_path / "second")), forked.run_dir)


def test_a_fork_that_changes_shapes_or_has_no_other_run_as_its_origin_is_refused(
    origin: Path, changed: RunConfig, tmp_path: Path
) -> None:
    wider = replace(SMALL_ALEXNET, widths=replace(SMALL_ALEXNET.widths, fc7=18))
    with pytest.raises(UserError, match=r"fc7\.weight has shape \(16, 16\) in the checkpoint, \(18, 16\)"):
        fork(Run.open(replace(changed, model=wider)), tmp_path / "fork")
    with pytest.raises(UserError, match="that is --run-dir itself"):
        fork(Run.open(changed), origin)
    fit(Run.open(replace(changed, run_dir=tmp_path / "own", steps=1)))
    with pytest.raises(UserError, match=rf"holds a run that is no fork of {origin}\. Name a new folder"):
        fork(Run.open(changed), tmp_path / "own")
    missing = refusal("run", "--run-dir", tmp_path / "nowhere", "--fork", tmp_path / "fork", "--store", "nowhere")
    assert f"--run-dir {tmp_path / 'nowhere'}: no such run to fork." in missing
    with pytest.raises(UserError, match="no such run to fork"):
        fork(Run.open(replace(changed, run_dir=tmp_path / "nowhere")), tmp_path / "fork")

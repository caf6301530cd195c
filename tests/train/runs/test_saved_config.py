"""`alextrain run` continues a run with the settings that the run has saved.

Forks inherit the settings of their origin, and runs find their training store again.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.alextrain import alextrain, json_lines, lose_store, refusal
from tests.helpers.small_training import SMALL_ALEXNET
from train.config.architecture import ARCHITECTURES
from train.config.identity import recipe_values
from train.config.recipe import recipe_from_json
from train.config.recipes import RECIPES, RELEASED, SHORT
from train.runs import checkpoint
from train.runs.run_dir import read_description
from train.runs.saved_config import saved_config
from train.runs.training_store import training_store

OPTIONS = "--recipe short --set lr=0.002 --batch 10 --seed 3 --stream-seed 4 --keep 1".split()


@pytest.fixture(autouse=True)
def small_alexnet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)


@pytest.fixture(scope="module")
def own_run(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, in a folder that also has a copy of the store.

    The run was started with relative paths of the run folder and the store.
    """
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(store, project / "store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        patch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
        result = alextrain("run", "--run-dir", "runs/a", "--gpus", "cpu", *OPTIONS, "--steps", "1", "--accumulate", "2")
    assert result.exit_code == 0 and "runs/a: 1 step trained. Next:" in result.stderr, result.output
    return project / "runs" / "a"


@pytest.fixture
def run_dir(own_run: Path, tmp_path: Path) -> Path:
    """A copy of the run `own_run`, without a copy of its store."""
    return Path(shutil.copytree(own_run, tmp_path / "copy"))


def settings_of(run_dir: Path) -> dict[str, Any]:
    description = json.loads((run_dir / "run.json").read_text())
    kept = {name: value for name, value in description["settings"].items() if name not in ("run_dir", "store")}
    return {**kept, "identity": description["identity"]}


def test_run_dir_alone_goes_on_with_the_settings_of_the_run(run_dir: Path) -> None:
    before = settings_of(run_dir)
    result = alextrain("run", "--run-dir", run_dir)
    assert result.exit_code == 0 and "resumes after step 1." in result.stderr, result.output
    assert "0 steps trained, because the run had ended after step 1. To train further, pass more" in result.stderr
    assert "1 step trained" not in result.stderr and settings_of(run_dir) == before
    result = alextrain("run", "--run-dir", run_dir, "--steps", "2")
    assert result.exit_code == 0 and "1 step trained." in result.stderr
    assert settings_of(run_dir) == {**before, "steps": 2} and checkpoint.load(run_dir).step == 2


def test_options_that_are_given_count_and_the_identity_is_still_compared(run_dir: Path) -> None:
    alone = alextrain("run", "--run-dir", run_dir, "--dry-run")
    assert (
        alone.exit_code == 0 and "would resume after step 1." in alone.stderr and "batch 10 in 2 parts" in alone.stderr
    )
    again = alextrain("run", "--run-dir", run_dir, *OPTIONS, "--epochs", "7", "--dry-run")
    assert again.exit_code == 0 and "21 steps in all" in again.stderr  # --epochs removes the limit of 1 step
    for options, what in (
        (("--set", "lr=0.5"), "lr is 0.002, here 0.5"),
        (("--seed", "5"), "another seed (3, here 5)"),
        (("--recipe", "short"), "lr is 0.002, here 0.004"),
        (("--model", "half"), "model (alexnet, here half)"),
    ):
        assert what in alextrain("run", "--run-dir", run_dir, *options, "--dry-run").stderr


def test_a_fork_inherits_the_settings_and_lists_the_differences_before_the_training(
    run_dir: Path, tmp_path: Path
) -> None:
    command = ["run", "--run-dir", run_dir, "--fork", tmp_path / "fork", "--set", "momentum=0.8", "--steps", "2"]
    expected = ["  recipe.momentum: 0.9 -> 0.8", "  steps: 1 -> 2"]
    preview = alextrain(*command, "--dry-run")
    assert preview.exit_code == 0 and not (tmp_path / "fork").exists()
    forked = alextrain(*command, "--log-every", "1")
    assert forked.exit_code == 0, forked.output
    for lines, more in ((preview.stderr.splitlines(), []), (forked.stderr.splitlines(), ["  log_every: 20 -> 1"])):
        first = next(k for k, line in enumerate(lines) if " differences: " in line)
        assert lines[first + 1 : first + 1 + len(expected + more)] == expected[:2] + more
    trained = next(k for k, line in enumerate(lines) if line.startswith("epoch"))
    assert first < trained
    theirs, ours = settings_of(run_dir), settings_of(tmp_path / "fork")
    theirs["identity"]["recipe_numbers"]["momentum"] = 0.8
    theirs["identity"]["recipe"] = "short, lr=0.002, momentum=0.8"
    assert ours == {**theirs, "steps": 2, "log_every": 1}
    nothing_left = alextrain("run", "--run-dir", run_dir, "--fork", tmp_path / "other", "--dry-run")
    assert "0 differences" in nothing_left.stderr and "No step is left of 1." in nothing_left.stderr


def test_another_recipe_brings_its_batch_size_and_epochs(run_dir: Path, tmp_path: Path) -> None:
    command = ["run", "--run-dir", run_dir, "--fork", tmp_path / "fork", "--dry-run"]
    refused = alextrain(*command, "--recipe", "modern")
    assert refused.exit_code == 2 and "--batch 512: " in refused.stderr  # the batch size of the recipe `modern` is 512
    (answer,) = json_lines(*command, "--recipe", "modern", "--batch", "6")
    assert answer["batch_size"] == 6 and answer["recipe"] == "modern"


def test_a_run_finds_its_store_from_any_folder_and_after_a_move(
    own_run: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = own_run.parents[1]
    settings = json.loads((own_run / "run.json").read_text())["settings"]
    assert (settings["store"], settings["store_absolute"]) == ("store", str(project / "store"))
    monkeypatch.chdir(tmp_path)
    (answer,) = json_lines("evaluate", run_dir, "--views", "1", "--gpus", "cpu")
    assert answer["images"] == 12
    moved = Path(shutil.copytree(project, tmp_path / "moved"))
    description = json.loads((moved / "runs/a/run.json").read_text())
    description["settings"]["store_absolute"] = "/nowhere/store"  # after a move of the folder, the path is wrong
    (moved / "runs/a/run.json").write_text(json.dumps(description))
    found = training_store(moved / "runs/a", read_description(moved / "runs/a"))
    assert found is not None and found.root == moved / "store"
    del description["settings"]["store_absolute"]  # version 0.1.0 wrote the file without this field
    (moved / "runs/a/run.json").write_text(json.dumps(description))
    (shape,) = json_lines("features", moved / "runs/a", "--layer", "fc8", "--gpus", "cpu")
    assert shape["out"] == str(moved / "runs/a/features-fc8-val.npy") and shape["shape"] == [12, 3]
    saved = saved_config(moved / "runs/a")
    assert saved is not None and saved.store == moved / "store"


def test_a_missing_store_is_named_and_the_exit_code_is_1(run_dir: Path, tmp_path: Path) -> None:
    lose_store(run_dir)
    weights = run_dir / "weights.pth"
    weights.touch()
    for command in (
        ("run", "--run-dir", run_dir),
        ("evaluate", run_dir),
        ("features", run_dir),
        ("search", run_dir, run_dir / "run.json"),
        ("import", weights, "--run-dir", tmp_path / "imported"),
    ):
        assert "its training store /nowhere/store was moved, removed or rebuilt. Name a store" in refusal(*command)


def test_recipes_of_older_runs_divide_no_evaluation_image() -> None:
    """Version 0.1.0 had no eval_divisor, and divided training images but no evaluation images."""
    old: dict[str, Any] = json.loads(json.dumps({**vars(RELEASED)}, default=vars))
    del old["augmentation"]["eval_divisor"]
    read = recipe_from_json(old)
    assert read.augmentation == RELEASED.augmentation and recipe_values(read) == recipe_values(RELEASED)
    for recipe in RECIPES.values():
        # The default of eval_divisor is not part of a run's identity, so that older runs keep their identity.
        assert "eval_divisor" not in recipe_values(recipe)["augmentation"]
    divided = replace(SHORT, augmentation=replace(SHORT.augmentation, divisor=2.0))
    assert recipe_values(divided)["augmentation"]["eval_divisor"] == 2.0
    old["augmentation"]["divisor"] = 2.0
    assert recipe_from_json(old).augmentation.divisor_in_evaluation == 1.0


def test_the_divisor_of_the_command_line_holds_in_training_and_evaluation() -> None:
    for options, divisors in (
        (("augmentation.divisor=58",), (58.0, 58.0)),
        (("augmentation.divisor=58", "augmentation.eval_divisor=1"), (58.0, 1.0)),
        (("augmentation.divisor=1",), (1.0, 1.0)),
        (("augmentation=none,off,0.1,58,1",), (58.0, 58.0)),
    ):
        settings = [word for option in options for word in ("--set", option)]
        (recipe,) = json_lines("recipe", "released", *settings)
        augmentation = recipe_from_json(recipe).augmentation
        assert (augmentation.divisor, augmentation.divisor_in_evaluation) == divisors, options

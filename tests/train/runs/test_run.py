"""Tests of opening a run: its length, and the settings, stores and folders that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from prep.console import UserError
from prep.files import hold_lock
from tests.helpers.alextrain import json_lines
from tests.helpers.small_training import SMALL_ALEXNET, small_config
from train.config.architecture import HALF
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.evaluation.predictions import load_predictions
from train.runs.run import Run
from train.runs.run_dir import read_description
from train.runs.saved_config import saved_config
from train.trainer.fork import fork
from train.trainer.loop import fit

WIDER = replace(SMALL_ALEXNET, widths=replace(SMALL_ALEXNET.widths, fc7=18))


def test_a_run_is_as_long_as_the_shorter_of_epochs_and_steps(stores: dict[str, Path], tmp_path: Path) -> None:
    runs = [Run.open(small_config(stores["ppm"], tmp_path, steps=steps)) for steps in (None, 5, 100)]
    assert [(run.steps_per_epoch, run.last_step) for run in runs] == [(3, 9), (3, 5), (3, 9)]
    by_epochs = "To train further, pass more --epochs; 3 epochs end after step 9."
    advice = [by_epochs, "To train further, pass more --steps or --epochs.", by_epochs]
    assert [run.how_to_train_further for run in runs] == advice


def test_a_number_of_parts_that_does_not_divide_the_batch_is_refused(store: Path, tmp_path: Path) -> None:
    config = RunConfig(store, SHORT, 8, accumulate=3, run_dir=tmp_path / "run")
    with pytest.raises(UserError, match=r"a batch of 8 cannot be divided into 3 equal parts\. Pass one of 1, 2, 4, 8"):
        fit(Run.open(config))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"batch_size": 4}, "batch size"),
        ({"seed": 4}, "seed"),
        ({"model": HALF}, r"model \(alexnet, here half\): columns is 2, here 1"),
        ({"model": WIDER}, "model: widths.fc7 is 16, here 18"),
        ({"recipe": replace(SHORT, lr=0.5)}, "recipe: dropout is 0.5, here 0.0"),
    ],
)
def test_another_configuration_in_the_folder_of_a_run_is_refused_with_the_difference(
    stores: dict[str, Path], uninterrupted_run: Path, change: dict, difference: str
) -> None:
    with pytest.raises(UserError, match=f"another {difference}"):
        fit(Run.open(small_config(stores["jpeg"], uninterrupted_run, **change)))


def test_another_store_in_the_folder_of_a_run_is_refused(stores: dict[str, Path], uninterrupted_run: Path) -> None:
    with pytest.raises(UserError, match="was trained with another store fingerprint"):
        fit(Run.open(small_config(stores["ppm"], uninterrupted_run)))


@pytest.mark.parametrize("name", ["letter.txt", "metrics.jsonl"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(
    stores: dict[str, Path], tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_text("dear")
    with pytest.raises(UserError, match="holds files but no run"):
        fit(Run.open(small_config(stores["jpeg"], tmp_path)))
    assert (tmp_path / name).read_text() == "dear"


def test_a_second_training_in_one_folder_is_refused(stores: dict[str, Path], uninterrupted_run: Path) -> None:
    with hold_lock(uninterrupted_run, "training"), pytest.raises(UserError, match="another training is at work"):
        fit(Run.open(small_config(stores["jpeg"], uninterrupted_run)))


def test_a_run_that_never_reached_a_checkpoint_may_be_started_with_other_settings(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".run.json.77.tmp").write_text("{")  # a temporary file of a run that was killed at its start
    with pytest.raises(UserError, match="a batch takes 64"):
        fit(Run.open(small_config(stores["jpeg"], run_dir, batch_size=64)))
    fit(Run.open(small_config(stores["jpeg"], run_dir, steps=1)))
    assert json.loads((run_dir / "run.json").read_text())["settings"]["batch_size"] == 8


def test_a_run_in_a_folder_whose_name_is_not_utf_8_is_read_and_forked(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos-\udcff"  # the byte 0xff
    folder.mkdir()
    (folder / "store").symlink_to(stores["jpeg"])
    monkeypatch.chdir(folder)
    fit(Run.open(small_config(Path("store"), Path("run"), steps=1)))
    config = saved_config(Path("run"))
    assert config is not None and config.store == Path("store")
    for _ in range(2):  # the second call continues the fork that the first call began
        fit(fork(Run.open(replace(config, steps=2)), Path("fork")))
    path = read_description(Path("fork"))["ancestry"][0]["path"]
    assert path == f"{tmp_path}/photos-\\udcff/run"
    with pytest.raises(UserError, match="holds a run that was forked from"):  # run.json has the path of the origin
        fork(Run.open(replace(config, run_dir=Path("other"))), Path("fork"))
    monkeypatch.chdir(tmp_path)
    config = saved_config(folder / "run")  # run.json has the absolute path of the store
    assert config is not None and config.store == folder / "store"
    monkeypatch.chdir(folder)
    args = ["evaluate", folder / "fork", "--store", "store", "--gpus", "cpu", "--views", 1]
    json_lines(*args, "--out", "scores.npz")
    assert load_predictions(Path("scores.npz")).about["run"].endswith("photos-\\udcff/fork")
    json_lines("evaluate", folder / "fork", "scores.npz", *args[2:], "--out", "average.npz")
    assert load_predictions(Path("average.npz")).about["run"][0].endswith("photos-\\udcff/fork")

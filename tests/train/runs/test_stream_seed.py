"""Tests of `alextrain run --stream-seed`: batches and identity of a run, and files and commands that show the seed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.loader import TrainLoader, train_loader
from prep.console import UserError
from tests.helpers.alextrain import alextrain, json_lines
from tests.helpers.small_training import SMALL_ALEXNET, assert_same_result, small_config
from train.config.architecture import ARCHITECTURES
from train.convert.import_torchvision import create_run
from train.experiments.ablate import plan_runs
from train.model.alexnet import AlexNet
from train.report.compare import differing_fields, read_runs, run_labels
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.fork import fork
from train.trainer.loop import fit

SEED, STREAM_SEED = 3, 11


@pytest.fixture(scope="module")
def seeded_run(stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps with the seed 3 and the stream seed 11. A test must not write into the folder of this run."""
    run_dir = tmp_path_factory.mktemp("seeded") / "run"
    return fit(Run.open(small_config(stores["ppm"], run_dir, seed=SEED, stream_seed=STREAM_SEED, steps=4)))


def test_runs_with_equal_stream_seeds_train_on_the_batches_of_that_seed_and_begin_with_their_own_parameters(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs have 4 steps, so that step 4 takes a batch of the second epoch."""
    iterate = TrainLoader.__iter__
    served: dict[str, list[torch.Tensor]] = {}
    first_weights: dict[str, torch.Tensor] = {}

    def recorded(self: TrainLoader) -> Any:
        for batch in iterate(self):
            served[name].append(batch.images.clone())
            yield batch

    monkeypatch.setattr(TrainLoader, "__iter__", recorded)
    for name, changes in {
        "seed 3": {"seed": 3, "stream_seed": STREAM_SEED},
        "seed 4": {"seed": 4, "stream_seed": STREAM_SEED},
        "default": {"seed": STREAM_SEED},
    }.items():
        served[name] = []
        config = small_config(stores["ppm"], tmp_path / name, steps=4, recipe=no_learning(), **changes)
        first_weights[name] = checkpoint.load(fit(Run.open(config))).parameters["conv2.weight"]
    monkeypatch.undo()
    augmentation = no_learning().augmentation.for_stream()
    with train_loader(stores["ppm"], 8, seed=STREAM_SEED, augmentation=augmentation, threads=1) as loader:
        expected = [batch.images.clone() for _ in range(2) for batch in loader][:4]
    for name, images in served.items():
        assert len(images) == 4 and all(map(torch.equal, images, expected)), name
    weights = list(first_weights.values())
    assert not any(torch.equal(weights[a], weights[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def no_learning() -> Any:
    """The recipe of `small_config` with a learning rate so small that the parameters keep their initial values."""
    return replace(small_config(Path(), Path()).recipe, lr=1e-30, weight_decay=0.0, schedule=())


def test_a_stream_seed_equal_to_the_seed_changes_nothing(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path
) -> None:
    run_dir = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", stream_seed=SEED)))
    assert_same_result(run_dir, uninterrupted_run)
    state, expected = checkpoint.load(run_dir), checkpoint.load(uninterrupted_run)
    assert state.identity == expected.identity and state.stream == expected.stream
    assert "stream_seed" not in expected.identity


def test_a_run_with_a_stream_seed_resumes_to_the_result_of_the_uninterrupted_run(
    stores: dict[str, Path], seeded_run: Path, tmp_path: Path
) -> None:
    config = small_config(stores["ppm"], tmp_path / "run", seed=SEED, stream_seed=STREAM_SEED)
    fit(Run.open(replace(config, steps=2)))
    fit(Run.open(replace(config, steps=4)))
    assert_same_result(tmp_path / "run", seeded_run)


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({}, r"stream seed \(11, here 3\)"),
        ({"stream_seed": 12}, r"stream seed \(11, here 12\)"),
        ({"seed": 4, "stream_seed": STREAM_SEED}, r"seed \(3, here 4\)"),
    ],
)
def test_a_run_with_a_stream_seed_is_not_resumed_with_another(
    stores: dict[str, Path], seeded_run: Path, changes: dict, difference: str
) -> None:
    with pytest.raises(UserError, match=f"another {difference}"):
        fit(Run.open(small_config(stores["ppm"], seeded_run, **changes)))


def test_a_run_without_a_stream_seed_is_not_resumed_with_one(stores: dict[str, Path], uninterrupted_run: Path) -> None:
    with pytest.raises(UserError, match=r"another stream seed \(3, here 11\)"):
        fit(Run.open(small_config(stores["jpeg"], uninterrupted_run, stream_seed=STREAM_SEED)))


def test_a_fork_can_change_the_stream_seed_and_records_it(
    stores: dict[str, Path], seeded_run: Path, tmp_path: Path
) -> None:
    config = small_config(stores["ppm"], seeded_run, seed=SEED, stream_seed=12)
    fit(fork(Run.open(config), tmp_path / "fork"))
    state = checkpoint.load(tmp_path / "fork")
    assert state.step == 9 and state.stream["seed"] == 12
    assert state.ancestry[0]["differences"] == [{"name": "stream_seed", "there": STREAM_SEED, "here": 12}]


def test_a_run_that_was_created_with_a_stream_seed_is_trained_with_it(stores: dict[str, Path], tmp_path: Path) -> None:
    """`alextrain import` creates a run with create_run. The training loop refuses a stream state with another seed."""
    config = small_config(stores["ppm"], tmp_path / "run", stream_seed=STREAM_SEED, steps=1)
    create_run(Run.open(config), AlexNet(3, config.recipe, ("cpu", "cpu"), config.model))
    fit(Run.open(config))
    assert checkpoint.load(tmp_path / "run").step == 1


def test_the_commands_show_the_stream_seed(
    stores: dict[str, Path], seeded_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert json.loads((seeded_run / "run.json").read_text())["settings"]["stream_seed"] == STREAM_SEED
    (status,) = json_lines("status", seeded_run)
    assert (status["seed"], status["stream_seed"]) == (SEED, STREAM_SEED)
    assert "alexnet, recipe short, seed 3, stream seed 11\n" in alextrain("status", seeded_run).stdout
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
    words = ["run", "--store", stores["ppm"], "--run-dir", tmp_path / "run", "--gpus", "cpu", "--recipe", "short"]
    words += ["--batch", "8", "--seed", "3", "--dry-run"]
    assert "seed 3, stream seed 11, fp32" in alextrain(*words, "--stream-seed", "11").stderr
    assert "seed 3, fp32" in alextrain(*words).stderr


def test_compare_shows_stream_seeds_only_if_a_run_has_its_own(
    stores: dict[str, Path], seeded_run: Path, tmp_path: Path
) -> None:
    for name, changes in {
        "shared 4": {"seed": 4, "stream_seed": STREAM_SEED},
        "shared 11": {"seed": STREAM_SEED, "stream_seed": STREAM_SEED},
        "default 11": {"seed": STREAM_SEED},
        "default 3": {"seed": SEED},
    }.items():
        fit(Run.open(small_config(stores["ppm"], tmp_path / name, steps=1, **changes)))
    seeds = {"settings.seed", "settings.stream_seed"}

    def shown(*names: str) -> dict[str, list[Any]]:
        rows = differing_fields(read_runs([tmp_path / name for name in names]))
        return {name: values for name, values in rows.items() if name in seeds}

    assert shown("shared 4", "shared 11") == {"settings.seed": [4, 11]}
    assert shown("default 3", "default 11") == {"settings.seed": [3, 11]}
    assert shown("default 11", "shared 11") == {}
    assert shown("default 3", "shared 4") == {"settings.seed": [3, 4], "settings.stream_seed": [3, 11]}
    labels = run_labels(read_runs([tmp_path / "shared 4", tmp_path / "shared 11"]))
    assert labels == ["shared 4: seed 4", "shared 11: seed 11"]


def test_all_seeds_of_an_ablation_can_share_a_stream(tmp_path: Path) -> None:
    runs = plan_runs(tmp_path, tmp_path, "short", only=["pool-2"], seeds=2, stream_seed=7, gpus="cpu")
    assert {(run.config.seed, run.config.seed_of_stream) for run in runs} == {(0, 7), (1, 7)}

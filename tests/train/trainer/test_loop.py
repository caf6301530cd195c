"""The training loop on a small network: it learns, resumes to the bit, and follows the recipe's schedule."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.loader import EvalLoader, TrainLoader, train_loader
from prep.console import UserError
from tests.helpers.small_training import SMALL_ALEXNET, assert_same_result, metrics_without_clock, small_config
from train.config.architecture import HALF, Widths
from train.config.recipe import Cosine, Plateau, ScheduleChange
from train.config.recipes import SHORT
from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.runs import checkpoint
from train.runs.loading import load_trained
from train.runs.run import Run
from train.trainer.loop import fit


def test_metrics_have_every_step_once(uninterrupted_run: Path) -> None:
    lines = metrics_without_clock(uninterrupted_run)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    validations = [line for line in lines if line["kind"] == "val"]
    assert [line["epoch"] for line in validations] == [1, 2, 3] and len({line["images"] for line in validations}) == 1
    assert lines[0]["lr"] == SHORT.lr
    assert steps[-1] % 3 == 0 and lines[-2]["lr"] == 0.002


def test_steps_end_a_run_and_more_steps_continue_it(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(small_config(stores["jpeg"], run_dir, steps=5)))
    assert checkpoint.load_latest(run_dir).step == 5
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_the_colour_noise_can_end_during_a_run(stores: dict[str, Path], tmp_path: Path) -> None:
    plan = small_config(
        stores["jpeg"], tmp_path / "a", recipe=replace(SHORT, schedule=(ScheduleChange(1, colour="off"),))
    )
    fit(Run.open(plan))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b", steps=6)))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b")))
    assert_same_result(tmp_path / "a", tmp_path / "b")
    assert checkpoint.load_latest(tmp_path / "a").stream["augmentation"]["colour"] == "off"


def test_a_small_network_learns_its_pictures_by_heart(stores: dict[str, Path], tmp_path: Path) -> None:
    recipe = replace(SHORT, schedule=(), dropout=0.0, lr=0.003)
    run_dir = fit(
        Run.open(
            small_config(
                stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=30, log_every=4, checkpoint_every=1000, seed=0
            )
        )
    )
    lines = [line for line in metrics_without_clock(run_dir) if line["kind"] == "train"]
    last = lines[-5:]
    assert lines[0]["loss"] > 0.9
    assert sum(line["loss"] for line in last) / len(last) < 0.5
    assert sum(line["top1_error"] for line in last) / len(last) < 0.25


def test_a_plateau_drops_the_rate_ends_the_run_and_survives_a_stop(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors that never fall: a drop after the second validation, the end after the third."""
    monkeypatch.setattr("train.trainer.loop.evaluate", lambda *of: EvalResult(0.5, 0.25, 2.0, 12))
    recipe = replace(SHORT, schedule=Plateau(factor=0.5, patience_epochs=1, drops=1))
    plan = small_config(stores["ppm"], tmp_path / "a", recipe=recipe, epochs=5)
    fit(Run.open(plan))
    lines = metrics_without_clock(plan.run_dir)
    assert [line["epoch"] for line in lines if line["kind"] == "val"] == [1, 2, 3]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates == [SHORT.lr] * 6 + [SHORT.lr / 2] * 3
    for steps in (7, None, None):
        fit(Run.open(replace(plan, run_dir=tmp_path / "b", steps=steps)))
    assert_same_result(plan.run_dir, tmp_path / "b")


def test_another_network_with_changed_numbers_trains_goes_on_and_is_loaded_as_it_was(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """One column, no overlap, tanh: run.json tells of it, the folder holds to it, two parts make the same whole."""
    from train.config.overrides import OVERRIDE_SOURCE, apply_overrides

    half = replace(HALF, widths=Widths(6, 7, 8, 8, 8, 16, 16))
    recipe = apply_overrides(replace(SHORT, schedule=()), ["activation=tanh", "pool_px=2", "dropout=0.5"])
    plan = small_config(stores["jpeg"], tmp_path / "a", recipe=recipe, model=half, epochs=2)
    fit(Run.open(plan))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b", steps=4)))
    with pytest.raises(UserError, match="another recipe"):
        fit(Run.open(replace(plan, run_dir=tmp_path / "b", recipe=apply_overrides(recipe, ["pool_px=3"]))))
    fit(Run.open(replace(plan, run_dir=tmp_path / "b")))
    assert_same_result(tmp_path / "a", tmp_path / "b")
    model, _ = load_trained(tmp_path / "a", ("cpu", "cpu"))
    assert model.architecture == half and model.recipe == recipe and len(model.columns) == 1
    described = json.loads((tmp_path / "a" / "run.json").read_text())
    assert described["identity"]["model"] == "half" and described["recipe"]["sources"]["pool_px"] == OVERRIDE_SOURCE
    assert described["recipe"]["name"] == "short, activation=tanh, dropout=0.5, pool_px=2"


def test_labels_are_smoothed_as_the_recipe_says_under_a_cosine_with_warm_up(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """The first loss by the formula of Szegedy et al. 2016: (1 - e) times that of the label, e times that of all."""
    recipe = replace(SHORT, dropout=0.0, label_smoothing=0.3, epochs=2, schedule=Cosine(1, 0.1, 0.01))
    plan = small_config(stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=2)
    fit(Run.open(plan))
    lines = [line for line in metrics_without_clock(tmp_path / "run") if line["kind"] == "train"]
    rates = [line["lr"] / SHORT.lr for line in lines]
    assert rates == pytest.approx([0.1, 0.4, 0.7, 1.0, 0.7525, 0.2575])
    torch.manualseed_generators(plan.seed)
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL_ALEXNET)
    with train_loader(stores["jpeg"], 8, "cpu", plan.seed, augmentation=recipe.augmentation) as loader:
        images, labels = next(iter(loader))
    p = torch.log_softmax(model(images).double(), 1).detach()
    wanted = -0.7 * p[torch.arange(8), labels].mean() - 0.3 * p.mean()
    assert lines[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("ends", ["well", "diverged"])
def test_the_streams_of_a_run_are_closed(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """Though someone keeps them, as a traceback does: both, that of training and that of validation."""
    kept: list[TrainLoader | EvalLoader] = []
    for kind in (TrainLoader, EvalLoader):
        begin = kind._start
        monkeypatch.setattr(kind, "_start", lambda self, jobs, begin=begin: (kept.append(self), begin(self, jobs)))
    recipe = replace(SHORT, schedule=(), lr=0.001 if ends == "well" else 1e12)
    plan = small_config(stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=2)
    if ends == "well":
        fit(Run.open(plan))
        assert {type(loader) for loader in kept} == {TrainLoader, EvalLoader}
    else:
        with pytest.raises(UserError, match="diverged"):
            fit(Run.open(plan))
    for loader in list(kept):
        with pytest.raises(ValueError, match="closed"):
            next(iter(loader))

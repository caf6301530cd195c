"""Tests of the training loop on a small network: learning, resuming with the same bits, and the recipe's schedule."""

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
from train.config.overrides import OVERRIDE_SOURCE, apply_overrides
from train.config.recipe import Cosine, Plateau, Polynomial, ScheduleChange
from train.config.recipes import LARGE, SHORT
from train.evaluation.evaluate import EvalResult
from train.model.alexnet import AlexNet
from train.runs import checkpoint
from train.runs.loading import load_trained
from train.runs.run import Run
from train.trainer.loop import fit


def test_metrics_jsonl_has_every_step_and_every_validation_once(uninterrupted_run: Path) -> None:
    lines = metrics_without_clock(uninterrupted_run)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    validations = [line for line in lines if line["kind"] == "val"]
    assert [line["epoch"] for line in validations] == [1, 2, 3] and len({line["images"] for line in validations}) == 1
    assert lines[0]["lr"] == SHORT.lr
    assert steps[-1] % 3 == 0 and lines[-2]["lr"] == 0.002


def test_a_run_ended_by_steps_resumes_with_more_steps_to_the_same_bits(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(small_config(stores["jpeg"], run_dir, steps=5)))
    assert checkpoint.load(run_dir).step == 5
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_a_run_with_lars_resumes_to_the_same_bits(stores: dict[str, Path], tmp_path: Path) -> None:
    """The run resumes from a checkpoint in the warm-up.

    The learning rate is proportional to the batch size: the recipe's rate is for 16 images, and the batch has 8.
    """
    schedule = Polynomial(warmup_epochs=1, start=0.1, power=2, end=1e-6)
    recipe = replace(LARGE, lr=20.0, lr_batch=16, epochs=2, schedule=schedule)
    whole, parts = (
        small_config(stores["ppm"], tmp_path / name, recipe=recipe, epochs=2) for name in ("whole", "parts")
    )
    fit(Run.open(whole))
    fit(Run.open(replace(parts, steps=2)))
    fit(Run.open(parts))
    assert_same_result(whole.run_dir, parts.run_dir)
    rates = [line["lr"] for line in metrics_without_clock(whole.run_dir) if line["kind"] == "train"]
    assert rates == pytest.approx([1, 4, 7] + [10 * (1 - step / 6) ** 2 for step in (3, 4, 5)])
    description = json.loads((whole.run_dir / "run.json").read_text())
    assert description["identity"]["recipe_numbers"]["lars_trust"] == 0.001
    assert description["identity"]["recipe_numbers"]["schedule"]["power"] == 2
    with pytest.raises(UserError, match=r"lars_trust is 0\.001, here None"):
        fit(Run.open(replace(parts, recipe=replace(recipe, lars_trust=None))))


def test_the_schedule_ends_colour_noise_during_a_run_and_after_resuming(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    recipe = replace(SHORT, schedule=(ScheduleChange(1, colour="off"),))
    config = small_config(stores["jpeg"], tmp_path / "a", recipe=recipe)
    fit(Run.open(config))
    fit(Run.open(replace(config, run_dir=tmp_path / "b", steps=6)))
    fit(Run.open(replace(config, run_dir=tmp_path / "b")))
    assert_same_result(tmp_path / "a", tmp_path / "b")
    assert checkpoint.load(tmp_path / "a").stream["augmentation"]["colour"] == "off"


@pytest.mark.soak
def test_a_small_network_memorizes_30_training_images(stores: dict[str, Path], tmp_path: Path) -> None:
    recipe = replace(SHORT, schedule=(), dropout=0.0, lr=0.003)
    changes = {"recipe": recipe, "epochs": 30, "log_every": 4, "checkpoint_every": 1000, "seed": 0}
    fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", **changes)))
    lines = [line for line in metrics_without_clock(tmp_path / "run") if line["kind"] == "train"]
    last = lines[-5:]
    assert lines[0]["loss"] > 0.9
    assert sum(line["loss"] for line in last) / len(last) < 0.5
    assert sum(line["top1_error"] for line in last) / len(last) < 0.25


def test_a_plateau_reduces_the_rate_and_ends_a_run_also_after_resuming(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error does not improve. The learning rate drops after validation 2, and the run ends after validation 3."""
    monkeypatch.setattr("train.trainer.training.evaluate", lambda *args, **keywords: EvalResult(0.5, 0.25, 2.0, 12))
    recipe = replace(SHORT, schedule=Plateau(factor=0.5, patience_epochs=1, drops=1))
    config = small_config(stores["ppm"], tmp_path / "a", recipe=recipe, epochs=5)
    fit(Run.open(config))
    lines = metrics_without_clock(config.run_dir)
    assert [line["epoch"] for line in lines if line["kind"] == "val"] == [1, 2, 3]
    rates = [line["lr"] for line in lines if line["kind"] == "train"]
    assert rates == [SHORT.lr] * 6 + [SHORT.lr / 2] * 3
    for steps in (7, None, None):
        fit(Run.open(replace(config, run_dir=tmp_path / "b", steps=steps)))
    assert_same_result(config.run_dir, tmp_path / "b")


def test_another_architecture_with_overridden_recipe_fields_trains_resumes_and_is_loaded(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """The network has one column, tanh, and pooling without overlap.

    run.json has the overridden fields, which the resumed run and the loaded network need.
    """
    half = replace(HALF, widths=Widths(6, 7, 8, 8, 8, 16, 16))
    recipe = apply_overrides(replace(SHORT, schedule=()), ["activation=tanh", "pool_px=2", "dropout=0.5"])
    config = small_config(stores["jpeg"], tmp_path / "a", recipe=recipe, model=half, epochs=2)
    fit(Run.open(config))
    fit(Run.open(replace(config, run_dir=tmp_path / "b", steps=4)))
    with pytest.raises(UserError, match="another recipe"):
        fit(Run.open(replace(config, run_dir=tmp_path / "b", recipe=apply_overrides(recipe, ["pool_px=3"]))))
    fit(Run.open(replace(config, run_dir=tmp_path / "b")))
    assert_same_result(tmp_path / "a", tmp_path / "b")
    network, _ = load_trained(tmp_path / "a", ("cpu", "cpu"))
    assert network.architecture == half and network.recipe == recipe and len(network.columns) == 1
    description = json.loads((tmp_path / "a" / "run.json").read_text())
    assert description["identity"]["model"] == "half"
    assert description["recipe"]["sources"]["pool_px"] == OVERRIDE_SOURCE
    assert description["recipe"]["name"] == "short, activation=tanh, dropout=0.5, pool_px=2"


def test_label_smoothing_and_a_cosine_with_warm_up_follow_their_formulas(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    """Szegedy et al. 2016 define: loss = (1 - e) · (loss of the label) + e · (mean loss over all classes)."""
    recipe = replace(SHORT, dropout=0.0, label_smoothing=0.3, epochs=2, schedule=Cosine(1, 0.1, 0.01))
    config = small_config(stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=2)
    fit(Run.open(config))
    lines = [line for line in metrics_without_clock(tmp_path / "run") if line["kind"] == "train"]
    rates = [line["lr"] / SHORT.lr for line in lines]
    assert rates == pytest.approx([0.1, 0.4, 0.7, 1.0, 0.7525, 0.2575])
    torch.manual_seed(config.seed)
    network = AlexNet(3, recipe, ("cpu", "cpu"), SMALL_ALEXNET)
    with train_loader(stores["jpeg"], 8, "cpu", config.seed, augmentation=recipe.augmentation.for_stream()) as loader:
        images, labels = next(iter(loader))
    log_p = torch.log_softmax(network(images).double(), 1).detach()
    expected = -0.7 * log_p[torch.arange(8), labels].mean() - 0.3 * log_p.mean()
    assert lines[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("outcome", ["finished", "diverged"])
def test_both_streams_are_closed_when_a_run_ends(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: str
) -> None:
    """The training stream and the validation stream are closed, even if a traceback still refers to them."""
    loaders: list[TrainLoader | EvalLoader] = []
    for loader_class in (TrainLoader, EvalLoader):
        start = loader_class._start
        monkeypatch.setattr(
            loader_class, "_start", lambda self, *args, start=start: (loaders.append(self), start(self, *args))
        )
    recipe = replace(SHORT, schedule=(), lr=0.001 if outcome == "finished" else 1e12)
    config = small_config(stores["jpeg"], tmp_path / "run", recipe=recipe, epochs=2)
    if outcome == "finished":
        fit(Run.open(config))
        assert {type(loader) for loader in loaders} == {TrainLoader, EvalLoader}
    else:
        with pytest.raises(UserError, match="diverged"):
            fit(Run.open(config))
    for loader in list(loaders):
        with pytest.raises(ValueError, match="closed"):
            next(iter(loader))

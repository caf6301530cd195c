"""Losses, gradients and parameters that end a run, and losses that it warns of."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from prep.console import UserError
from tests.helpers.small_training import SMALL_ALEXNET, small_config
from train.config.recipes import SHORT
from train.config.run_config import RunConfig
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.step import StepResult, TrainingStep
from train.trainer.watchdog import Diverged, Watchdog, parameter_norms


def test_norms_are_those_of_numpy() -> None:
    torch.manual_seed(0)
    model = AlexNet(5, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    optimizer = make_optimizer(model, SHORT)
    TrainingStep(model, optimizer)(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    norms = parameter_norms(model)
    gradients = model.joined_tensors(lambda p: p.grad)
    for name, tensor in model.joined_tensors().items():
        assert norms[name]["parameter"] == pytest.approx(np.linalg.norm(tensor.double().numpy().ravel()), rel=1e-5)
        wanted = np.linalg.norm(gradients[name].double().numpy().ravel())
        assert norms[name]["gradient"] == pytest.approx(wanted, rel=1e-5)
    model.fc8.bias.requires_grad_(False).grad = None
    assert set(parameter_norms(model)["fc8.bias"]) == {"parameter"}


def test_a_loss_that_is_no_number_stops_the_run(stores: dict[str, Path], tmp_path: Path) -> None:
    plan = small_config(stores["jpeg"], tmp_path / "run", recipe=replace(SHORT, schedule=(), lr=1e12))
    with pytest.raises(UserError, match="diverged"):
        fit(Run.open(plan))
    state = checkpoint.load_latest(tmp_path / "run")
    assert state is None or all(torch.isfinite(t).all() for t in state.parameters.values())


@pytest.mark.parametrize("part", ["parameter", "gradient"])
def test_a_parameter_or_gradient_that_is_no_number_stops_though_the_loss_is_one(
    numbered: Path, tmp_path: Path, part: str
) -> None:
    model = AlexNet(37, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    broken = model.columns[1].conv3.weight
    with torch.no_grad():
        (broken if part == "parameter" else broken.grad)[0, 0, 0, 0] = math.inf
    (tmp_path / "run").mkdir()
    watch = Watchdog(Run.open(small_config(numbered, tmp_path / "run")), model)
    watch.add(*stepped(1.0))
    whose = "the gradient of " if part == "gradient" else ""
    with pytest.raises(Diverged, match=rf"step 4: {whose}conv3\.weight has norm inf: .*offending-step-4"):
        watch.check(4, SHORT.augmentation)


def stepped(loss: float, labels: range | list[int] = range(8)) -> StepResult:
    return StepResult(torch.tensor(loss), torch.zeros(len(labels), 37), torch.tensor(list(labels)))


@pytest.fixture
def watch(numbered: Path, tmp_path: Path) -> Watchdog:
    """Of a run of 400 steps on 37 classes: 200 of them at ln 37 are stuck."""
    model = AlexNet(37, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    return Watchdog(Run.open(RunConfig(numbered, SHORT, 8, epochs=100, run_dir=tmp_path)), model)


def judged(watch: Watchdog, losses: list[float], first: int = 0) -> None:
    """Ten steps a line."""
    for place, loss in enumerate(losses):
        for _ in range(10):
            watch.add(*stepped(loss))
        watch.check(first + 10 * (place + 1), SHORT.augmentation)


def test_a_loss_that_stays_a_guess_is_said_once(watch: Watchdog, capsys: pytest.CaptureFixture[str]) -> None:
    guess = math.log(37)
    judged(watch, [guess * 1.009, guess * 0.991] * 9 + [guess])
    assert "Warning" not in capsys.readouterr().err
    judged(watch, [guess] * 30, 190)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and "step 200: the loss has been within 1% of ln 37 = 3.611" in said
    assert "for 200 steps. Usually: a learning rate" in said


def test_a_loss_that_left_its_guess_is_not_stuck(watch: Watchdog, capsys: pytest.CaptureFixture[str]) -> None:
    guess = math.log(37)
    judged(watch, ([guess] * 19 + [guess * 0.98]) * 3)
    assert "Warning" not in capsys.readouterr().err


def test_a_loss_of_zero_and_labels_of_one_class_are_said_once(
    watch: Watchdog, capsys: pytest.CaptureFixture[str]
) -> None:
    judged(watch, [0.0] * 3)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and "step 10: the loss is 0. Usually: a store with one class" in said
    for _ in range(2):
        for _ in range(4):
            watch.add(*stepped(1.0, [5] * 8))
        watch.check(34, SHORT.augmentation)
    said = capsys.readouterr().err
    assert said.count("Warning") == 1 and "all 32 labels since step 30 are 5." in said


def test_few_labels_of_one_class_are_chance_and_one_other_is_enough(
    watch: Watchdog, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in ([4] + [5] * 7, [5] * 7 + [6]):
        for labels in ([5] * 8, [5] * 8, other, [5] * 8):
            watch.add(*stepped(1.0, labels))
        watch.check(4, SHORT.augmentation)
    for _ in range(3):
        watch.add(*stepped(1.0, [5] * 8))
    watch.check(3, SHORT.augmentation)
    assert "Warning" not in capsys.readouterr().err

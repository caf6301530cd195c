"""Tests of DivergenceCheck: NaN and infinite values end a run; a stuck loss or equal labels only cause a warning."""

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
from train.monitor.step_counters import StepCounters
from train.optim.paper_sgd import make_optimizer
from train.runs import checkpoint
from train.runs.run import Run
from train.trainer.divergence import Diverged, DivergenceCheck, parameter_norms
from train.trainer.loop import fit
from train.trainer.step import StepResult, TrainingStep


def test_parameter_norms_equal_those_of_numpy() -> None:
    torch.manual_seed(0)
    model = AlexNet(5, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    optimizer = make_optimizer(model, SHORT)
    TrainingStep(model, optimizer)(torch.randn(2, 3, 224, 224), torch.tensor([0, 1]))
    norms = parameter_norms(model)
    gradients = model.joined_tensors(lambda p: p.grad)
    for name, tensor in model.joined_tensors().items():
        assert norms[name]["parameter"] == pytest.approx(np.linalg.norm(tensor.double().numpy().ravel()), rel=1e-5)
        gradient_norm = np.linalg.norm(gradients[name].double().numpy().ravel())
        assert norms[name]["gradient"] == pytest.approx(gradient_norm, rel=1e-5)
    model.fc8.bias.requires_grad_(False).grad = None
    assert set(parameter_norms(model)["fc8.bias"]) == {"parameter"}


def test_a_run_that_diverges_is_an_error_and_leaves_no_checkpoint_with_nan(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    config = small_config(stores["jpeg"], tmp_path / "run", recipe=replace(SHORT, schedule=(), lr=1e12))
    with pytest.raises(UserError, match="diverged"):
        fit(Run.open(config))
    state = checkpoint.load_latest(tmp_path / "run")
    assert state is None or all(torch.isfinite(t).all() for t in state.parameters.values())


@pytest.mark.parametrize("part", ["parameter", "gradient"])
def test_an_infinite_parameter_or_gradient_stops_the_run_although_the_loss_is_finite(
    numbered_store: Path, tmp_path: Path, part: str
) -> None:
    model = AlexNet(37, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    weight = model.columns[1].conv3.weight
    with torch.no_grad():
        (weight if part == "parameter" else weight.grad)[0, 0, 0, 0] = math.inf
    (tmp_path / "run").mkdir()
    divergence = DivergenceCheck(Run.open(small_config(numbered_store, tmp_path / "run")), model)
    prefix = "the gradient of " if part == "gradient" else ""
    with pytest.raises(Diverged, match=rf"step 4: {prefix}conv3\.weight has norm inf: .*offending-step-4"):
        check(divergence, 4, [step_result(1.0)])


def check(divergence: DivergenceCheck, step: int, results: list[StepResult]) -> None:
    """Pass `results`, the results of the last steps up to `step`, to the check, as the training loop does."""
    counters = StepCounters(torch.device("cpu"), len(results))
    for result in results:
        counters.add(*result)
    images = sum(len(result.labels) for result in results)
    divergence.check(step, images, counters.read(), SHORT.augmentation.for_stream())


def step_result(loss: float, labels: range | list[int] = range(8)) -> StepResult:
    return StepResult(torch.tensor(loss), torch.zeros(len(labels), 37), torch.tensor(list(labels)))


GUESSING = math.log(37)  # the loss of uniform guessing among 37 classes


@pytest.fixture
def divergence(numbered_store: Path, tmp_path: Path) -> DivergenceCheck:
    """The check of a run of 400 steps on 37 classes. The check warns if the loss stays at ln 37 for 200 steps."""
    model = AlexNet(37, SHORT, ("cpu", "cpu"), SMALL_ALEXNET)
    return DivergenceCheck(Run.open(RunConfig(numbered_store, SHORT, 8, epochs=100, run_dir=tmp_path)), model)


def check_losses(divergence: DivergenceCheck, losses: list[float], steps_before: int = 0) -> None:
    """For each loss in `losses`, pass an interval of ten steps with this loss to the check."""
    for interval, loss in enumerate(losses, start=1):
        check(divergence, steps_before + 10 * interval, [step_result(loss)] * 10)


def test_a_loss_that_stays_at_the_loss_of_guessing_causes_one_warning(
    divergence: DivergenceCheck, capsys: pytest.CaptureFixture[str]
) -> None:
    check_losses(divergence, [GUESSING * 1.009, GUESSING * 0.991] * 9 + [GUESSING])
    assert "Warning" not in capsys.readouterr().err
    check_losses(divergence, [GUESSING] * 30, steps_before=190)
    messages = capsys.readouterr().err
    assert messages.count("Warning") == 1
    assert "step 200: the loss has been within 1% of ln 37 = 3.611" in messages
    assert "for 200 steps. Usual causes: a learning rate" in messages


def test_a_loss_that_was_lower_for_an_interval_is_not_stuck(
    divergence: DivergenceCheck, capsys: pytest.CaptureFixture[str]
) -> None:
    check_losses(divergence, ([GUESSING] * 19 + [GUESSING * 0.98]) * 3)
    assert "Warning" not in capsys.readouterr().err


def test_a_loss_of_zero_and_labels_of_one_class_cause_one_warning_each(
    divergence: DivergenceCheck, capsys: pytest.CaptureFixture[str]
) -> None:
    check_losses(divergence, [0.0] * 3)
    messages = capsys.readouterr().err
    assert messages.count("Warning") == 1
    assert "step 10: the loss is 0. Usual causes: a store with one class" in messages
    for _ in range(2):
        check(divergence, 34, [step_result(1.0, [5] * 8)] * 4)
    messages = capsys.readouterr().err
    assert messages.count("Warning") == 1 and "all 32 labels since step 30 are 5." in messages


def test_fewer_than_32_labels_of_one_class_or_one_label_of_another_cause_no_warning(
    divergence: DivergenceCheck, capsys: pytest.CaptureFixture[str]
) -> None:
    for with_another in ([4] + [5] * 7, [5] * 7 + [6]):
        check(divergence, 4, [step_result(1.0, labels) for labels in ([5] * 8, [5] * 8, with_another, [5] * 8)])
    check(divergence, 3, [step_result(1.0, [5] * 8)] * 3)
    assert "Warning" not in capsys.readouterr().err

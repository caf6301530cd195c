"""Learning-rate schedules are compared with the tables and formulas of their sources. Also tests frozen layers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.config.architecture import ALEXNET, Widths
from train.config.recipe import Cosine, Plateau, Polynomial, ScheduleChange
from train.config.recipes import CAFFE, LARGE, MODERN, PAPER, RECIPES, RELEASED, SHORT
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule

SMALL = replace(ALEXNET, widths=Widths(4, 4, 4, 4, 4, 6, 6))


@pytest.mark.parametrize(
    ("epochs_done", "lr", "lr_conv1", "colour"),
    [
        (0, 1e-2, 1e-2, "stdev"),
        (24, 1e-2, 1e-2, "stdev"),
        (25, 1e-3, 1e-3, "stdev"),
        (50, 1e-3, 1e-3, "stdev"),
        (51, 1e-4, 1e-4, "stdev"),
        (66, 1e-4, 1e-4, "stdev"),
        (67, 1e-4, 1e-5, "off"),
        (71, 1e-4, 1e-5, "off"),
        (72, 1e-4, 0.0, "off"),
        (78, 1e-4, 0.0, "off"),
        (79, 1e-5, 0.0, "off"),
        (90, 1e-5, 0.0, "off"),
    ],
)
def test_the_released_schedule_is_the_table_of_net_145(
    epochs_done: int, lr: float, lr_conv1: float, colour: str
) -> None:
    schedule = Schedule(RELEASED)
    assert schedule.learning_rates(epochs_done) == (lr, lr_conv1, 0.02)
    assert schedule.colour(epochs_done) == colour


@pytest.mark.parametrize(
    ("batches", "lr"), [(0, 1e-2), (99_000, 1e-2), (101_000, 1e-3), (201_000, 1e-4), (301_000, 1e-5), (449_000, 1e-6)]
)
def test_caffes_rate_drops_at_its_iterations_and_biases_have_twice_the_rate(batches: int, lr: float) -> None:
    epochs_done = batches * CAFFE.batch_size / 1_281_167
    assert Schedule(CAFFE).learning_rates(epochs_done) == pytest.approx((lr, lr, 2 * lr))
    assert abs(450_000 * CAFFE.batch_size / 1_281_167 - CAFFE.epochs) < 0.1


def test_a_cosine_with_warm_up_follows_its_formula() -> None:
    recipe = replace(MODERN, lr=0.2, epochs=50, schedule=Cosine(warmup_epochs=5, start=0.1, end=0.01))
    schedule, epochs = Schedule(recipe), np.linspace(0, 60, 241)
    rates = [schedule.learning_rates(epoch)[0] for epoch in epochs]
    warm_up = 0.02 + (0.2 - 0.02) * epochs / 5
    cosine = 0.002 + 0.5 * (0.2 - 0.002) * (1 + np.cos(np.pi * (epochs - 5) / 45))
    assert np.allclose(rates, np.where(epochs < 5, warm_up, np.where(epochs < 50, cosine, 0.002)), rtol=1e-12)
    assert max(rates) == rates[20] == 0.2
    assert Schedule(replace(recipe, schedule=Cosine(0, 1.0, 0.01))).learning_rates(0)[0] == 0.2
    schedule.record_validation(0.5)
    assert not schedule.finished and schedule == Schedule(recipe, best_error=schedule.best_error)


def test_a_polynomial_with_warm_up_follows_its_formula() -> None:
    """As in the authors' code, the decay is computed from the first step of the run, not from the end of the warm-up.

    At the end of the warm-up, the rate therefore drops from lr to a value below lr.
    """
    recipe = replace(LARGE, lr=8.0, epochs=50, schedule=Polynomial(warmup_epochs=5, start=0.1, power=2, end=1e-4))
    schedule, epochs = Schedule(recipe), np.linspace(0, 60, 241)
    rates = np.array([schedule.learning_rates(epoch)[0] for epoch in epochs])
    warm_up, decay = 0.8 + 7.2 * epochs / 5, 8 * np.maximum(1 - epochs / 50, 0) ** 2
    assert np.allclose(rates, np.where(epochs < 5, warm_up, np.maximum(decay, 8e-4)), rtol=1e-12)
    assert rates[20] == pytest.approx(8 * 0.81) and rates[-1] == pytest.approx(8e-4)
    cubic = Schedule(replace(recipe, schedule=Polynomial(0, 1.0, power=3, end=1e-9)))
    assert [cubic.learning_rates(epoch)[0] for epoch in (0, 25)] == [8, 1]


def test_all_rates_are_proportional_to_the_batch_if_the_recipe_sets_lr_batch() -> None:
    assert Schedule(LARGE).learning_rates(50) == Schedule(LARGE, 8192).learning_rates(50) == pytest.approx([2.5] * 3)
    assert Schedule(LARGE, 1024).learning_rates(50) == pytest.approx([2.5 / 8] * 3)
    recipe = replace(RELEASED, lr_batch=128)
    for epochs_done in (0, 30, 70, 80):
        expected = 4 * np.array(Schedule(RELEASED, 512).learning_rates(epochs_done))
        assert Schedule(recipe, 512).learning_rates(epochs_done) == pytest.approx(tuple(expected))
    assert Schedule(RELEASED, 512).learning_rates(0) == Schedule(RELEASED).learning_rates(0)


def test_a_plateau_reduces_the_rate_three_times_then_ends_the_run_and_its_state_is_restored() -> None:
    schedule = Schedule(replace(PAPER, schedule=Plateau(0.1, patience_epochs=2, drops=3)))
    rates = []
    for error in [0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.7, 0.71, 0.7, 0.7]:
        schedule.record_validation(error)
        rates.append(schedule.learning_rates(0)[0])
        if schedule.finished:
            break
    assert np.allclose(rates, [1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5])
    assert schedule.finished
    restored = Schedule(schedule.recipe)
    restored.load_state_dict(schedule.state_dict())
    assert restored == schedule and restored.finished


def test_a_rate_of_zero_for_conv1_gives_it_no_gradient_and_no_update() -> None:
    torch.manual_seed(0)
    recipe = replace(SHORT, schedule=(ScheduleChange(1, lr_conv1=0.0),), dropout=0.0)
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
    optimizer, schedule = make_optimizer(model, recipe), Schedule(recipe)
    schedule.apply(optimizer, 1)
    model(torch.randn(2, 3, 224, 224)).square().sum().backward()
    conv1 = list(model.columns[0].conv1.parameters())  # both the weights and the biases are frozen
    assert all(p.grad is None for p in conv1) and model.columns[1].conv2.weight.grad is not None
    before = [p.detach().clone() for p in conv1]
    optimizer.step()
    assert all(map(torch.equal, conv1, before))


def test_biases_have_a_multiple_of_the_rate_or_a_rate_of_their_own() -> None:
    """The learning rate of biases is twice lr in Caffe, lr in the paper, and a constant in the released code."""
    for recipe, bias_rate in ((CAFFE, lambda lr: 2 * lr), (PAPER, lambda lr: lr), (RELEASED, lambda lr: 0.02)):
        model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
        optimizer, schedule = make_optimizer(model, recipe), Schedule(recipe)
        for epochs_done in (0, 30, 60):
            lr = schedule.apply(optimizer, epochs_done)
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            assert rates["weights"] == rates["conv1"] == lr
            assert rates["biases"] == rates["conv1 biases"] == pytest.approx(bias_rate(lr))


def test_the_rate_of_every_recipe_is_above_zero_at_each_of_its_epochs() -> None:
    """In an epoch with a learning rate of 0, nothing would be trained."""
    for recipe in RECIPES.values():
        schedule = Schedule(recipe)
        assert all(schedule.learning_rates(epoch / 2)[0] > 0 for epoch in range(2 * recipe.epochs + 2)), recipe.name

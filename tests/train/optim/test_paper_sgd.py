"""The update against the paper's two lines written out in NumPy, and the schedules against their tables."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from train.config.architecture import ALEXNET, Widths
from train.config.recipe import Cosine, Plateau, ScheduleChange, recipe_fields
from train.config.recipes import CAFFE, MODERN, PAPER, RECIPES, RELEASED, SHORT
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import PaperSGD, make_optimizer
from train.optim.schedule import Schedule

SMALL = replace(ALEXNET, widths=Widths(4, 4, 4, 4, 4, 6, 6))


def run(optimizer: torch.optim.Optimizer, w: torch.nn.Parameter, rates: list[float], grads: np.ndarray) -> np.ndarray:
    for lr, grad in zip(rates, grads, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        w.grad = torch.tensor(grad)
        optimizer.step()
    return w.detach().numpy()


@pytest.fixture
def grads() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(12, 5, 3))


RATES = [0.01] * 6 + [0.001] * 6


def test_update_is_the_papers_rule_over_a_drop_of_the_rate(grads: np.ndarray) -> None:
    w = torch.nn.Parameter(torch.linspace(-1, 1, 15, dtype=torch.float64).reshape(5, 3))
    expected, v = w.detach().numpy().copy(), np.zeros((5, 3))
    for lr, grad in zip(RATES, grads, strict=True):
        v = 0.9 * v - 0.0005 * lr * expected - lr * grad
        expected = expected + v
    found = run(PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9), w, RATES, grads)
    assert np.allclose(found, expected, rtol=1e-13)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "gradients of another layout"])
def test_lists_of_one_device_are_updated_by_the_rule(
    momentum: float, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without native.c, as on a GPU: two parameters by one call, or one operator after the other."""
    monkeypatch.setattr("train.model.kernels.native", None)
    layout = torch.channels_last if last else torch.contiguous_format
    start = np.random.default_rng(1).normal(size=(2, 4, 3, 2, 2)).astype(np.float32)
    ours = [torch.nn.Parameter(torch.tensor(w).contiguous(memory_format=torch.channels_last)) for w in start]
    optimizer = PaperSGD([{"params": ours, "weight_decay": 0.05}], momentum)
    expected, v = start.astype(np.float64), np.zeros(start.shape)
    for lr, seed in zip([0.1] * 3 + [0.01] * 3, range(6), strict=True):
        grad = np.random.default_rng(seed).normal(size=start.shape).astype(np.float32)
        v = momentum * v - 0.05 * lr * expected - lr * grad
        expected = expected + v
        optimizer.param_groups[0]["lr"] = lr
        for w, g in zip(ours, grad, strict=True):
            w.grad = torch.tensor(g).contiguous(memory_format=layout)
        optimizer.step()
    assert np.allclose([w.detach().numpy() for w in ours], expected, rtol=1e-5, atol=1e-6)
    assert np.allclose([optimizer.velocity(w).numpy() for w in ours], v, rtol=1e-5, atol=1e-6)


def test_torch_sgd_is_the_same_at_one_rate_and_differs_after_a_drop(grads: np.ndarray) -> None:
    def both(rates: list[float]) -> tuple[np.ndarray, np.ndarray]:
        ours, theirs = (torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64)) for _ in range(2))
        sgd = torch.optim.SGD([theirs], lr=1.0, momentum=0.9, weight_decay=0.0005)
        paper = PaperSGD([{"params": [ours], "weight_decay": 0.0005}], 0.9)
        return run(paper, ours, rates, grads), run(sgd, theirs, rates, grads)

    ours, theirs = both([0.01] * 12)
    assert np.allclose(ours, theirs, rtol=1e-12)
    ours, theirs = both(RATES)
    assert np.abs(ours - theirs).max() > 1e-3


def test_rate_zero_freezes_weights_and_velocity(grads: np.ndarray) -> None:
    w = torch.nn.Parameter(torch.ones(5, 3, dtype=torch.float64))
    optimizer = PaperSGD([{"params": [w], "weight_decay": 0.0005}], 0.9)
    run(optimizer, w, [0.01] * 3, grads[:3])
    weights, velocity = w.detach().clone(), optimizer.velocity(w).clone()
    run(optimizer, w, [0.0] * 4, grads[:4])
    assert torch.equal(w, weights) and torch.equal(optimizer.velocity(w), velocity)


def decays(recipe) -> dict[str, float]:
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
    by_parameter = {
        parameter: group["weight_decay"]
        for group in make_optimizer(model, recipe).param_groups
        for parameter in group["params"]
    }
    assert len(by_parameter) == len(list(model.parameters()))
    return {name: by_parameter[parameters[0]] for name, parameters in model.parameters_by_joined_name().items()}


def test_the_paper_decays_everything_the_code_only_weights() -> None:
    assert set(decays(PAPER).values()) == {0.0005}
    assert all(decay == (0.0 if name.endswith(".bias") else 0.0005) for name, decay in decays(RELEASED).items())


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
def test_released_schedule_is_the_table_of_net_145(epochs_done: int, lr: float, lr_conv1: float, colour: str) -> None:
    schedule = Schedule(RELEASED)
    assert schedule.learning_rates(epochs_done) == (lr, lr_conv1, 0.02)
    assert schedule.colour(epochs_done) == colour


def test_a_frozen_conv1_gets_no_gradient_and_the_rest_does() -> None:
    torch.manual_seed(0)
    recipe = replace(SHORT, schedule=(ScheduleChange(1, lr_conv1=0.0),), dropout=0.0)
    model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
    optimizer, schedule = make_optimizer(model, recipe), Schedule(recipe)
    schedule.apply(optimizer, 1)
    model(torch.randn(2, 3, 224, 224)).square().sum().backward()
    first = list(model.columns[0].conv1.parameters())  # the biases too, whose rate is their own
    assert all(p.grad is None for p in first) and model.columns[1].conv2.weight.grad is not None
    before = [p.detach().clone() for p in first]
    optimizer.step()
    assert all(map(torch.equal, first, before))


def test_plateau_drops_three_times_and_then_ends() -> None:
    schedule = Schedule(replace(PAPER, schedule=Plateau(0.1, patience_epochs=2, drops=3)))
    rates = []
    for error in [0.9, 0.8, 0.8, 0.85, 0.7, 0.7, 0.7, 0.7, 0.71, 0.7, 0.7]:
        schedule.record_validation(error)
        rates.append(schedule.learning_rates(0)[0])
        if schedule.finished:
            break
    assert np.allclose(rates, [1e-2, 1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5])
    assert schedule.finished
    other = Schedule(schedule.recipe)
    other.load_state_dict(schedule.state_dict())
    assert other == schedule and other.finished


def test_every_number_of_every_recipe_has_a_source() -> None:
    for recipe in RECIPES.values():
        assert set(recipe.sources) == set(recipe_fields()), recipe.name
        assert all(recipe.sources.values()), recipe.name


def test_the_papers_numbers() -> None:
    assert (PAPER.batch_size, PAPER.lr, PAPER.momentum, PAPER.weight_decay, PAPER.dropout) == (
        128,
        0.01,
        0.9,
        0.0005,
        0.5,
    )
    assert (PAPER.lrn.k, PAPER.lrn.size, PAPER.lrn.alpha, PAPER.lrn.beta) == (2, 5, 1e-4, 0.75)
    assert set(PAPER.init_std.values()) == {0.01} and not PAPER.norm_before_relu and PAPER.within_map is None
    assert isinstance(PAPER.schedule, Plateau) and (PAPER.schedule.factor, PAPER.schedule.drops) == (0.1, 3)
    assert RELEASED.lrn.alpha == pytest.approx(2e-5) and RELEASED.augmentation.divisor == 1.1
    assert set(RECIPES) == {"paper", "released", "caffe", "modern", "short"}


@pytest.mark.parametrize(
    ("batches", "lr"), [(0, 1e-2), (99_000, 1e-2), (101_000, 1e-3), (201_000, 1e-4), (301_000, 1e-5), (449_000, 1e-6)]
)
def test_caffes_rate_by_its_iterations_and_biases_at_twice_it(batches: int, lr: float) -> None:
    epochs_done = batches * CAFFE.batch_size / 1_281_167
    assert Schedule(CAFFE).learning_rates(epochs_done) == pytest.approx((lr, lr, 2 * lr))
    assert abs(450_000 * CAFFE.batch_size / 1_281_167 - CAFFE.epochs) < 0.1


def test_caffes_numbers() -> None:
    """models/bvlc_alexnet, as reported in its train_val.prototxt and solver.prototxt."""
    assert (CAFFE.batch_size, CAFFE.momentum, CAFFE.weight_decay, CAFFE.dropout) == (256, 0.9, 0.0005, 0.5)
    assert {layer for layer, std in CAFFE.init_std.items() if std == 0.005} == {"fc6", "fc7"}
    assert CAFFE.init_bias == {**dict.fromkeys(PAPER.init_bias, 0.1)}
    assert (CAFFE.lrn.k, CAFFE.lrn.alpha) == (1, pytest.approx(2e-5)) and CAFFE.augmentation.colour == "off"
    assert CAFFE.dropout_scales_training and not CAFFE.decay_biases and CAFFE.augmentation.mean == "aligned"


def test_biases_follow_the_rate_where_the_recipe_says_so() -> None:
    """A multiple of lr over every drop (Caffe), and a constant through all of them (the released code)."""
    for recipe, wanted in ((CAFFE, lambda lr: 2 * lr), (PAPER, lambda lr: lr), (RELEASED, lambda lr: 0.02)):
        model = AlexNet(3, recipe, ("cpu", "cpu"), SMALL)
        optimizer, schedule = make_optimizer(model, recipe), Schedule(recipe)
        for epochs_done in (0, 30, 60):
            lr = schedule.apply(optimizer, epochs_done)
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            assert rates["weights"] == rates["conv1"] == lr
            assert rates["biases"] == rates["conv1 biases"] == pytest.approx(wanted(lr))


def test_cosine_with_warm_up_is_the_formula() -> None:
    recipe = replace(MODERN, lr=0.2, epochs=50, schedule=Cosine(warmup_epochs=5, start=0.1, end=0.01))
    schedule, epochs = Schedule(recipe), np.linspace(0, 60, 241)
    found = [schedule.learning_rates(epoch)[0] for epoch in epochs]
    rise = 0.02 + (0.2 - 0.02) * epochs / 5
    fall = 0.002 + 0.5 * (0.2 - 0.002) * (1 + np.cos(np.pi * (epochs - 5) / 45))
    assert np.allclose(found, np.where(epochs < 5, rise, np.where(epochs < 50, fall, 0.002)), rtol=1e-12)
    assert max(found) == found[20] == 0.2
    assert Schedule(replace(recipe, schedule=Cosine(0, 1.0, 0.01))).learning_rates(0)[0] == 0.2
    schedule.record_validation(0.5)
    assert not schedule.finished and schedule == Schedule(recipe, best_error=schedule.best_error)


def test_every_recipe_has_a_rate_at_each_of_its_epochs() -> None:
    """None of them freezes the whole network, which a rate of 0 would."""
    for recipe in RECIPES.values():
        schedule = Schedule(recipe)
        assert all(schedule.learning_rates(epoch / 2)[0] > 0 for epoch in range(2 * recipe.epochs + 2)), recipe.name

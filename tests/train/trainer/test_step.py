"""The step against the same lines written out, and that nothing in it waits for a device."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.small_training import SMALL_ALEXNET
from train.config.architecture import ALEXNET
from train.config.recipe import Recipe
from train.config.recipes import PAPER, RELEASED, SHORT
from train.model.alexnet import AlexNet
from train.monitor.interval_metrics import IntervalMetrics
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.trainer.step import TrainingStep
from train.trainer.watchdog import Watchdog

READS_VALUES = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim"}


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for a GPU: values read, and copies to the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in READS_VALUES, f"{name} reads a value"
        to_cpu = name == "_to_copy" and str(kwargs.get("device")) == "cpu"
        assert not (to_cpu and args[0].device.type != "cpu"), "a copy to the CPU"
        return func(*args, **kwargs)


def made(recipe: Recipe, device: str = "cpu", **how: Any) -> tuple[AlexNet, TrainingStep]:
    torch.manual_seed(0)
    model = AlexNet(5, recipe, (device, device), SMALL_ALEXNET if device == "cpu" else ALEXNET)
    optimizer = make_optimizer(model, recipe)
    Schedule(recipe).apply(optimizer, 0)
    return model, TrainingStep(model, optimizer, **how)


def batch(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return 60 * torch.randn(n, 3, 224, 224, generator=torch.Generator().manual_seed(1)), torch.arange(n) % 5


def test_a_step_is_forward_loss_backward_and_update() -> None:
    recipe = replace(SHORT, dropout=0.0)
    (ours, step), (theirs, _) = made(recipe), made(recipe)
    images, labels = batch()
    velocity = {name: torch.zeros_like(p) for name, p in theirs.named_parameters()}
    for _ in range(3):
        stepped = step(images, labels)
        logits = theirs(images)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(theirs.parameters()))
        for (name, p), g in zip(theirs.named_parameters(), gradients, strict=True):
            decay = 0.0 if name.endswith("bias") else recipe.weight_decay
            velocity[name] = recipe.momentum * velocity[name] - recipe.lr * (g + decay * p.detach())
            p.data += velocity[name]
        assert torch.allclose(stepped.loss, loss) and torch.allclose(stepped.logits, logits, atol=1e-5)
        assert torch.equal(stepped.labels, labels)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(mine, other, atol=1e-6), name


def test_what_is_returned_holds_no_graph() -> None:
    _, step = made(SHORT)
    stepped = step(*batch())
    assert not stepped.loss.requires_grad and not stepped.logits.requires_grad
    assert stepped.loss.shape == () and stepped.logits.shape == (4, 5)


def test_gradients_do_not_pile_up() -> None:
    model, step = made(SHORT)
    images, labels = batch()
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    step(images, labels)
    once = [p.grad.clone() for p in model.parameters()]
    step(images, labels)
    for first, p in zip(once, model.parameters(), strict=True):
        assert torch.allclose(first, p.grad)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_is_the_same_update(parts: int) -> None:
    """The paper's network but for dropout, whose draws are others; three steps, so that momentum counts."""
    recipe = replace(PAPER, dropout=0.0, label_smoothing=0.1, lr=1e-3)
    (whole, step), (divided, step_in_parts) = made(recipe), made(recipe, parts=parts)
    images, labels = batch(8)
    for _ in range(3):
        one, other = step(images, labels), step_in_parts(images, labels)
        assert torch.allclose(one.loss, other.loss, rtol=1e-5) and torch.equal(other.labels, labels)
        assert torch.allclose(one.logits, other.logits, rtol=1e-4, atol=1e-5)
    start = dict(made(recipe)[0].named_parameters())
    for (name, mine), theirs in zip(whole.named_parameters(), divided.parameters(), strict=True):
        moved = (mine - start[name]).norm()
        assert moved > 0 and (mine - theirs).norm() <= 1e-4 * moved, name
    with pytest.raises(ValueError, match="a batch of 7 cannot be divided into"):
        step_in_parts(*batch(7))


def test_a_batch_in_parts_holds_the_activations_of_one_part() -> None:
    """Bytes that are kept for backward at any time, parameters aside."""
    peaks = []
    for parts in (1, 4):
        model, step = made(PAPER, parts=parts)
        ours = {p.data_ptr() for p in model.parameters()}
        held: dict[int, int] = {}
        peak = 0

        class Kept:
            def __init__(self, tensor: torch.Tensor, held: dict[int, int] = held) -> None:
                self.tensor, self.held = tensor, held
                held[id(self)] = tensor.nbytes

            def __del__(self) -> None:
                del self.held[id(self)]

        def keep(tensor: torch.Tensor, ours: set[int] = ours, held: dict[int, int] = held, kind: Any = Kept) -> Any:
            nonlocal peak
            kept = tensor if tensor.data_ptr() in ours else kind(tensor)
            peak = max(peak, sum(held.values()))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: getattr(kept, "tensor", kept)):
            step(*batch(8))
        peaks.append(peak)
    assert peaks[1] < 0.3 * peaks[0]


@pytest.mark.parametrize("recipe", [PAPER, RELEASED], ids=lambda recipe: recipe.name)
def test_no_value_is_read_by_the_step_or_the_sums_of_the_loop(recipe: Recipe) -> None:
    """Tensors on the device `meta` have shapes and no values: reading one raises. The whole network, batch of 128."""
    model, step = made(recipe, "meta")
    interval, watch = IntervalMetrics(SimpleNamespace(wait_times=lambda: None), model), Watchdog.__new__(Watchdog)
    watch._begin()
    images = torch.empty(128, 3, 224, 224, device="meta")
    labels = torch.empty(128, dtype=torch.int64, device="meta")
    for _ in range(2):
        stepped = step(images, labels)
        interval.add(*stepped)
        watch.add(*stepped)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        float(interval.loss)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_operation_of_the_step_waits(precision: str) -> None:
    model, step = made(PAPER, precision=precision)
    images, labels = batch()
    interval, watch = IntervalMetrics(SimpleNamespace(wait_times=lambda: None), model), Watchdog.__new__(Watchdog)
    watch._begin()
    with NoWaiting():
        for _ in range(2):
            stepped = step(images, labels)
            interval.add(*stepped)
            watch.add(*stepped)
    with NoWaiting(), pytest.raises(AssertionError, match="reads a value"):
        float(interval.loss)

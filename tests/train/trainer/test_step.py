"""Tests of the training step: formulas, batches in several parts, and that the host does not wait for the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.small_training import SMALL_ALEXNET
from train.config.architecture import ALEXNET
from train.config.recipe import Recipe
from train.config.recipes import LARGE, PAPER, RELEASED, SHORT
from train.model.alexnet import AlexNet
from train.monitor.step_counters import StepCounters
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.trainer.step import TrainingStep

READS_VALUES = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique_dim"}


class RefuseWaiting(TorchDispatchMode):
    """Raises an exception for operations that make the host wait for a GPU: reading a value, and copying to the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        assert name not in READS_VALUES, f"{name} reads a value"
        to_cpu = name == "_to_copy" and str(kwargs.get("device")) == "cpu"
        assert not (to_cpu and args[0].device.type != "cpu"), "a copy to the CPU"
        return func(*args, **kwargs)


def make_step(recipe: Recipe, device: str = "cpu", **options: Any) -> tuple[AlexNet, TrainingStep]:
    torch.manual_seed(0)
    model = AlexNet(5, recipe, (device, device), SMALL_ALEXNET if device == "cpu" else ALEXNET)
    optimizer = make_optimizer(model, recipe)
    Schedule(recipe).apply(optimizer, 0)
    return model, TrainingStep(model, optimizer, **options)


def random_batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return 60 * torch.randn(size, 3, 224, 224, generator=torch.Generator().manual_seed(1)), torch.arange(size) % 5


def test_a_step_is_forward_cross_entropy_backward_and_the_papers_update() -> None:
    recipe = replace(SHORT, dropout=0.0)
    (model, step), (reference, _) = make_step(recipe), make_step(recipe)
    images, labels = random_batch()
    velocity = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for _ in range(3):
        result = step(images, labels)
        logits = reference(images)
        loss = F.cross_entropy(logits, labels)
        gradients = torch.autograd.grad(loss, list(reference.parameters()))
        for (name, p), g in zip(reference.named_parameters(), gradients, strict=True):
            decay = 0.0 if name.endswith("bias") else recipe.weight_decay
            velocity[name] = recipe.momentum * velocity[name] - recipe.lr * (g + decay * p.detach())
            p.data += velocity[name]
        assert torch.allclose(result.loss, loss) and torch.allclose(result.logits, logits, atol=1e-5)
        assert torch.equal(result.labels, labels)
    for (name, actual), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.allclose(actual, expected, atol=1e-6), name


def test_the_result_of_a_step_is_detached_from_the_graph() -> None:
    _, step = make_step(SHORT)
    result = step(*random_batch())
    assert not result.loss.requires_grad and not result.logits.requires_grad
    assert result.loss.shape == () and result.logits.shape == (4, 5)


def test_gradients_of_two_steps_are_not_added_up() -> None:
    model, step = make_step(SHORT)
    images, labels = random_batch()
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    step(images, labels)
    first_gradients = [p.grad.clone() for p in model.parameters()]
    step(images, labels)
    for gradient, p in zip(first_gradients, model.parameters(), strict=True):
        assert torch.allclose(gradient, p.grad)


@pytest.mark.parametrize("parts", [2, 4])
def test_a_batch_in_parts_gives_the_same_update(parts: int) -> None:
    """The test makes three steps, so that momentum has an effect.

    Dropout is off, because a batch in parts gets other masks than the same batch as a whole.
    """
    recipe = replace(PAPER, dropout=0.0, label_smoothing=0.1, lr=1e-3)
    (model, step), (model_of_parts, step_in_parts) = make_step(recipe), make_step(recipe, parts=parts)
    images, labels = random_batch(8)
    for _ in range(3):
        expected, actual = step(images, labels), step_in_parts(images, labels)
        assert torch.allclose(expected.loss, actual.loss, rtol=1e-5) and torch.equal(actual.labels, labels)
        assert torch.allclose(expected.logits, actual.logits, rtol=1e-4, atol=1e-5)
    start = dict(make_step(recipe)[0].named_parameters())
    for (name, p), p_of_parts in zip(model.named_parameters(), model_of_parts.parameters(), strict=True):
        update_norm = (p - start[name]).norm()
        assert update_norm > 0 and (p - p_of_parts).norm() <= 1e-4 * update_norm, name
    with pytest.raises(ValueError, match="a batch of 7 cannot be divided into"):
        step_in_parts(*random_batch(7))


def test_a_batch_in_parts_keeps_only_the_activations_of_one_part() -> None:
    """For 1 and 4 parts, the test measures the most bytes that autograd saves at a time. Parameters are not counted."""
    peaks_bytes = []
    for parts in (1, 4):
        model, step = make_step(PAPER, parts=parts)
        parameter_pointers = {p.data_ptr() for p in model.parameters()}
        saved_bytes: dict[int, int] = {}
        peak_bytes = 0

        class Saved:
            def __init__(self, tensor: torch.Tensor, saved_bytes: dict[int, int] = saved_bytes) -> None:
                self.tensor, self.saved_bytes = tensor, saved_bytes
                saved_bytes[id(self)] = tensor.nbytes

            def __del__(self) -> None:
                del self.saved_bytes[id(self)]

        def save(
            tensor: torch.Tensor,
            parameter_pointers: set[int] = parameter_pointers,
            saved_bytes: dict[int, int] = saved_bytes,
            saved_class: Any = Saved,
        ) -> Any:
            nonlocal peak_bytes
            saved = tensor if tensor.data_ptr() in parameter_pointers else saved_class(tensor)
            peak_bytes = max(peak_bytes, sum(saved_bytes.values()))
            return saved

        with torch.autograd.graph.saved_tensors_hooks(save, lambda saved: getattr(saved, "tensor", saved)):
            step(*random_batch(8))
        peaks_bytes.append(peak_bytes)
    assert peaks_bytes[1] < 0.3 * peaks_bytes[0]


@pytest.mark.parametrize("recipe", [PAPER, RELEASED, LARGE], ids=lambda recipe: recipe.name)
def test_step_and_counters_read_no_value_of_a_tensor(recipe: Recipe) -> None:
    """A full-size network makes two steps of 128 images on the device `meta`, on which reading a value is an error."""
    model, step = make_step(recipe, "meta")
    counters = StepCounters(model.devices[0], max_steps=2)
    images = torch.empty(128, 3, 224, 224, device="meta")
    labels = torch.empty(128, dtype=torch.int64, device="meta")
    for _ in range(2):
        counters.add(*step(images, labels))
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises((RuntimeError, NotImplementedError)):
        counters.read()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_operation_of_step_and_counters_waits_for_a_device(precision: str) -> None:
    model, step = make_step(PAPER, precision=precision)
    images, labels = random_batch()
    counters = StepCounters(model.devices[0], max_steps=2)
    with RefuseWaiting():
        for _ in range(2):
            counters.add(*step(images, labels))
    with RefuseWaiting(), pytest.raises(AssertionError, match="reads a value"):
        float(counters._loss_sum)

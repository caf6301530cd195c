"""Tests of recorded steps on a CPU. RecordedGraph repeats PyTorch operators, as a CUDA graph repeats kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.helpers.small_training import SMALL_ALEXNET
from train.config.recipe import Recipe
from train.config.recipes import PAPER
from train.model import kernels
from train.model.alexnet import AlexNet
from train.monitor.step_counters import Counts, StepCounters
from train.optim.paper_sgd import make_optimizer
from train.trainer.step import TrainingStep
from train.trainer.step_graph import CountedStep, graph_for

STEPS = 7
RECIPE = replace(PAPER, init_std=dict.fromkeys(PAPER.init_std, 0.05))


class Recorder(TorchDispatchMode):
    """Records each operator with its tensors and Python numbers.

    The recorder also copies the values of tensors that existed before the recording.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []
        self._known: set[int] = set()
        self._before: list[tuple[torch.UntypedStorage, torch.UntypedStorage]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._remember(tensor, keep=True)
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            self._remember(tensor, keep=False)
        self.operations.append((func, args, kwargs or {}, output))
        return output

    def undo(self) -> None:
        """Restore the earlier values of all tensors that existed before the recording."""
        for storage, value in self._before:
            storage.copy_(value)

    def _remember(self, tensor: object, keep: bool) -> None:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
            storage = tensor.untyped_storage()
            self._known.add(storage.data_ptr())
            if keep:
                self._before.append((storage, storage.clone()))


class RecordedGraph:
    """A graph that repeats the recorded operators on the recorded memory, with the recorded Python numbers."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0
        self._operations: list[tuple[Any, Sequence[Any], dict[str, Any], Any]] = []

    def run_unrecorded(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None]) -> None:
        random = torch.get_rng_state()
        with Recorder() as recorder:
            work()
        recorder.undo()
        torch.set_rng_state(random)
        self._operations = recorder.operations
        self.recordings += 1

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, recorded in self._operations:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture(autouse=True)
def _operators_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch off the compiled kernels. They are not PyTorch operators, so the recorder would not see them."""
    monkeypatch.setattr(kernels, "native", None)


def batches(sizes: Sequence[int] = (4,) * STEPS) -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(8)
    return [(torch.randn(n, 3, 224, 224, generator=rng) * 30, torch.randint(0, 5, (n,), generator=rng)) for n in sizes]


def train(
    graph: RecordedGraph | None,
    steps: Sequence[tuple[Tensor, Tensor]],
    change: Callable[[int, AlexNet, Any], None] = lambda index, network, optimizer: None,
    recipe: Recipe = RECIPE,
) -> tuple[dict[str, Tensor], list[Counts]]:
    """Train a small network. Returns its parameters, and the counts of each step."""
    torch.manual_seed(0)
    network = AlexNet(5, recipe, architecture=SMALL_ALEXNET)
    optimizer = make_optimizer(network, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    counters = StepCounters(torch.device("cpu"), 1)
    counted_step = CountedStep(TrainingStep(network, optimizer), counters, graph)
    counts = []
    for index, (images, labels) in enumerate(steps):
        change(index, network, optimizer)
        counted_step(images.clone(), labels.clone())  # new tensors in each step, like those of a loader
        counts.append(counters.read())
    return dict(network.named_parameters()), counts


def assert_equal_training(
    actual: tuple[dict[str, Tensor], list[Counts]], expected: tuple[dict[str, Tensor], list[Counts]]
) -> None:
    """Assert that two trainings are equal apart from rounding.

    The update with learning rates in a tensor adds its terms in another order.
    """
    for name, parameter in expected[0].items():
        assert torch.allclose(actual[0][name], parameter, rtol=1e-4, atol=1e-6), name
    for a, b in zip(actual[1], expected[1], strict=True):
        assert a[2:] == b[2:] and a.loss_sum == pytest.approx(b.loss_sum, rel=1e-4)


def test_replayed_steps_train_like_steps_without_a_graph() -> None:
    """With dropout, a replay draws the random numbers that a step without a graph would draw."""
    graph = RecordedGraph()
    assert_equal_training(train(graph, batches()), train(None, batches()))
    assert (graph.recordings, graph.replays) == (1, STEPS - 3)


@pytest.mark.parametrize("lars_trust", [None, 0.05])
def test_a_replayed_step_uses_the_learning_rates_of_its_time(lars_trust: float | None) -> None:
    """With LARS, the local rates also change from step to step."""

    def change(index: int, network: AlexNet, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 if index < 5 else 0.002

    recipe = replace(RECIPE, lars_trust=lars_trust)
    actual = train(RecordedGraph(), batches(), change, recipe)
    assert_equal_training(actual, train(None, batches(), change, recipe))


def test_a_frozen_layer_is_recorded_anew_and_stays_unchanged() -> None:
    def change(index: int, network: AlexNet, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            if index == 4 and group["name"].startswith("conv1"):
                group["lr"] = 0.0
                for parameter in group["params"]:
                    parameter.requires_grad_(False)
        conv1.append(network.columns[0].conv1.weight.detach().clone())

    conv1: list[Tensor] = []
    graph = RecordedGraph()
    actual = train(graph, batches((4,) * 9), change)
    assert_equal_training(actual, train(None, batches((4,) * 9), change))
    assert graph.recordings == 2
    assert torch.equal(conv1[4], actual[0]["columns.0.conv1.weight"]) and not torch.equal(conv1[3], conv1[4])


def test_another_batch_size_is_recorded_anew() -> None:
    """Steps of another batch size replace the recorded gradients, so the first size is later recorded again."""
    sizes = (4, 4, 4, 4, 4, 2, 2, 2, 2, 4, 4, 4, 4)
    graph = RecordedGraph()
    assert_equal_training(train(graph, batches(sizes)), train(None, batches(sizes)))
    assert graph.recordings == 3 and graph.replays == 4


def test_training_continues_without_a_graph_if_a_step_cannot_be_recorded(capsys: pytest.CaptureFixture[str]) -> None:
    """During the failed recording, no kernel runs. After the failure, the learning rate can still change."""

    class FailingGraph(RecordedGraph):
        def record(self, work: Callable[[], None]) -> None:
            super().record(work)
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def change(index: int, network: AlexNet, optimizer: Any) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.02 if index < 5 else 0.002

    graph = FailingGraph()
    assert_equal_training(train(graph, batches(), change), train(None, batches(), change))
    assert (graph.recordings, graph.replays) == (1, 0)
    assert capsys.readouterr().err.count("could not be recorded as a CUDA graph (operation not permitted when") == 1


def test_memory_that_runs_out_in_a_recording_is_not_hidden() -> None:
    class FailingGraph(RecordedGraph):
        def record(self, work: Callable[[], None]) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        train(FailingGraph(), batches())


def test_two_devices_and_a_cpu_have_no_graph() -> None:
    assert graph_for([torch.device("cpu")]) is None
    assert graph_for([torch.device("cuda:0"), torch.device("cuda:1")]) is None

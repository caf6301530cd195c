"""Tests of the sums of gradients over replicas, in shared memory and over TCP, for every layout of parameters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import nn

from tests.train.replicas.ranks import run_ranks
from train.config.recipes import PAPER, RELEASED
from train.model.layers import drop
from train.replicas.gradients import GradientSum, Nccl, SharedMemory
from train.replicas.group import ReplicaGroup

SHAPES = [(3, 5), (7,), (4, 3, 3, 3), (2000,), (1,)]


def parameters_of(rank: int) -> list[nn.Parameter]:
    """Return parameters with random gradients that differ between ranks. The last parameter has no gradient."""
    generator = torch.Generator().manual_seed(rank)
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    parameters[2] = nn.Parameter(parameters[2].detach().contiguous(memory_format=torch.channels_last))
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return parameters


@pytest.mark.parametrize("over_tcp", [False, True])
def test_gradients_are_summed_and_keep_the_layout_of_the_parameters(
    monkeypatch: pytest.MonkeyPatch, over_tcp: bool
) -> None:
    """The gradients are summed twice. The second sum must not overwrite the first, which a rank may still read."""

    def work(group: ReplicaGroup) -> list[list[torch.Tensor | None]]:
        parameters = parameters_of(group.rank)
        assert group.link is not None
        gradient_sum = GradientSum(parameters, group.link, over_tcp)
        assert isinstance(gradient_sum._exchanges[0]._exchange, SharedMemory) is not over_tcp
        results = []
        for _ in range(2):
            gradient_sum.run()
            results.append([None if p.grad is None else p.grad.clone() for p in parameters])
            assert all(p.grad is None or p.grad.stride() == p.stride() for p in parameters)
            for parameter, new in zip(parameters, parameters_of(group.rank + 10), strict=True):
                parameter.grad = new.grad
        return results

    for outcome in run_ranks(monkeypatch, 3, work):
        for seed, gradients in zip((0, 10), outcome, strict=True):
            expected = zip(*([p.grad for p in parameters_of(rank + seed)] for rank in range(3)), strict=True)
            for gradient, summands in zip(gradients[:-1], list(expected)[:-1], strict=True):
                exact = sum(summand.double() for summand in summands)
                torch.testing.assert_close(gradient.double(), exact, rtol=1e-6, atol=1e-6)
            assert gradients[-1] is None
    first, *others = run_ranks(monkeypatch, 3, work)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first[1][:-1], other[1][:-1], strict=True))


def test_connections_of_gpus_for_later_trainings_read_no_entry_of_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`alextrain ablate` trains several networks over one link between the ranks. FakeNccl stands in for NCCL."""

    class FakeNccl:
        Options = allreduce = abort = MagicMock()

        def __init__(self, store: Any, rank: int, *_: object) -> None:
            assert not store.check([f"id/{rank}"]), "the entry of an earlier connection"
            store.set(f"id/{rank}", "new")
            store.wait([f"id/{1 - rank}"])  # each rank waits for the entry of the other rank

    monkeypatch.setattr("torch.distributed.ProcessGroupNCCL", FakeNccl, raising=False)
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())
    monkeypatch.setattr("torch.cuda.synchronize", lambda device: None)

    def work(group: ReplicaGroup) -> list[int]:
        assert group.link is not None
        return [len(Nccl(torch.device("cpu"), size, group.link).own) for size in (2, 3, 4)]

    assert run_ranks(monkeypatch, 2, work) == [[2, 3, 4], [2, 3, 4]]


def test_replicas_without_common_memory_exchange_over_tcp(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machines = iter(["a", "a", "b", "b", "b", "b"])
    monkeypatch.setattr("train.replicas.shared_memory._machine", lambda: next(machines))

    def work(group: ReplicaGroup) -> float:
        assert group.link is not None
        parameter = nn.Parameter(torch.zeros(1))
        parameter.grad = torch.ones(1)
        GradientSum([parameter], group.link).run()
        return float(parameter.grad)

    assert run_ranks(monkeypatch, 2, work) == [2.0, 2.0]
    assert "Gradients are exchanged over TCP, because" in capsys.readouterr().err


@pytest.mark.parametrize("recipe", [PAPER, RELEASED], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("shape", [(6, 40), (6, 8, 5, 5)])
def test_each_replica_gets_the_dropout_of_its_rows_in_one_process(recipe: object, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.manual_seed(1)
    whole, after = drop(x, recipe, True), torch.get_rng_state()
    assert 0.3 < (whole == 0).float().mean() < 0.7
    for rank, rows in enumerate(x.chunk(3)):
        torch.manual_seed(1)
        assert torch.equal(drop(rows, recipe, True, ReplicaGroup(rank, 3)), whole[2 * rank : 2 * rank + 2])
        assert torch.equal(torch.get_rng_state(), after)
        assert torch.equal(drop(rows, recipe, False, ReplicaGroup(rank, 3)), drop(rows, recipe, False))

"""Pooling with ReLU and normalization against PyTorch's operators, one after the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from train.config.recipe import Lrn
from train.config.recipes import PAPER
from train.model import kernels
from train.model.pooling import max_pool

SHAPES = [(2, 48, 15, 15), (3, 5, 8, 9), (1, 1, 3, 3), (2, 33, 4, 7), (2, 12, 13, 6)]
MODES = [(None, False, False), (None, True, False), (None, False, True), (PAPER.lrn, True, False)]
MODES += [(Lrn(3, 1e-2, 0.75, 1.0), False, True), (PAPER.lrn, False, False), (Lrn(5, 1e-3, 0.6, 2.0), True, False)]


def one_after_the_other(x: Tensor, norm: Lrn | None, relu_before: bool, relu_after: bool) -> Tensor:
    x = F.relu(x) if relu_before else x
    if norm is not None:  # torch's alpha is divided by the size
        x = F.local_response_norm(x, norm.size, norm.alpha * norm.size, norm.beta, norm.k)
    x = F.max_pool2d(x, 3, 2)
    return F.relu(x) if relu_after else x


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "plain":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("no C compiler was there at installation")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_equals_one_after_the_other(shape: tuple[int, ...], mode: tuple[Lrn | None, bool, bool], way: None) -> None:
    draw = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=draw) * 20).requires_grad_()
    exact = x.detach().double().requires_grad_()
    found, wanted = max_pool(x, *mode), one_after_the_other(exact, *mode)
    assert found.shape == wanted.shape and torch.allclose(found.double(), wanted, rtol=1e-6)
    grad = torch.randn(found.shape, generator=draw)
    (ours,) = torch.autograd.grad(found, x, grad)
    (theirs,) = torch.autograd.grad(wanted, exact, grad.double())
    assert torch.allclose(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_numbers_and_nan_as_torch_has_it(layout: torch.memory_format, way: None) -> None:
    """Of equal numbers the first has the gradient; a NaN is the greatest, and of two the last."""
    x = torch.randint(-2, 3, (4, 10, 9, 9), generator=torch.Generator().manual_seed(1)).float()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.05] = float("nan")
    x[0, 0] = -float("inf")
    x = x.contiguous(memory_format=layout).requires_grad_()
    for relu in (False, True):
        found, wanted = max_pool(x, relu_after=relu), one_after_the_other(x, None, False, relu)
        assert torch.equal(found.nan_to_num(77), wanted.nan_to_num(77))
        grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(3))
        ours, theirs = (torch.autograd.grad(output, x, grad)[0] for output in (found, wanted))
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled: the maps where they were normalized, and a byte for each pooled number."""
    if kernels.native is None:
        pytest.skip("no C compiler was there at installation")
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    for norm, wanted in ((PAPER.lrn, {x.numel() * 4, 2 * 8 * 4 * 4}), (None, {2 * 8 * 4 * 4})):
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            max_pool(x, norm, relu_after=True)
        assert set(kept) == wanted


def test_an_empty_batch_and_other_numbers(way: None) -> None:
    assert max_pool(torch.zeros(0, 4, 9, 9), PAPER.lrn, relu_before=True).shape == (0, 4, 4, 4)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool(x, Lrn(3, 0.1, 0.75, 2.0), relu_after=True), x)


def test_what_does_not_fit_is_refused(way: None) -> None:
    with pytest.raises(ValueError, match="odd"):
        max_pool(torch.zeros(1, 4, 5, 5), Lrn(4, 0.1, 0.75, 2.0))
    with pytest.raises(RuntimeError):
        max_pool(torch.zeros(1, 4, 2, 5))

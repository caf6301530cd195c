"""Max-pooling that is fused with ReLU and normalization is compared with separate PyTorch operators."""

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


def unfused(x: Tensor, norm: Lrn | None, relu_before: bool, relu_after: bool) -> Tensor:
    x = F.relu(x) if relu_before else x
    if norm is not None:  # torch divides alpha by the window size
        x = F.local_response_norm(x, norm.size, norm.alpha * norm.size, norm.beta, norm.k)
    x = F.max_pool2d(x, 3, 2)
    return F.relu(x) if relu_after else x


@pytest.fixture(params=["kernels", "operators"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "operators":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the kernels were not compiled")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_fused_pooling_equals_separate_operators(
    shape: tuple[int, ...], mode: tuple[Lrn | None, bool, bool], implementation: None
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 20).requires_grad_()
    exact = x.detach().double().requires_grad_()
    actual, expected = max_pool(x, *mode), unfused(exact, *mode)
    assert actual.shape == expected.shape and torch.allclose(actual.double(), expected, rtol=1e-6)
    grad = torch.randn(actual.shape, generator=generator)
    (ours,) = torch.autograd.grad(actual, x, grad)
    (torchs,) = torch.autograd.grad(expected, exact, grad.double())
    assert torch.allclose(ours.double(), torchs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_values_and_nan_are_treated_as_by_torch(layout: torch.memory_format, implementation: None) -> None:
    """If several values of a window equal its maximum, the first of these values gets the gradient.

    A NaN counts as the maximum. If a window has several NaNs, the last NaN gets the gradient.
    """
    x = torch.randint(-2, 3, (4, 10, 9, 9), generator=torch.Generator().manual_seed(1)).float()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.05] = float("nan")
    x[0, 0] = -float("inf")
    x = x.contiguous(memory_format=layout).requires_grad_()
    for relu in (False, True):
        actual, expected = max_pool(x, relu_after=relu), unfused(x, None, False, relu)
        assert torch.equal(actual.nan_to_num(77), expected.nan_to_num(77))
        grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(3))
        ours, torchs = (torch.autograd.grad(output, x, grad)[0] for output in (actual, expected))
        assert torch.allclose(ours, torchs, atol=1e-6)


def test_the_kernels_save_the_normalized_maps_and_one_byte_for_each_pooled_value() -> None:
    if kernels.native is None:
        pytest.skip("the kernels were not compiled")
    x = torch.randn(2, 8, 9, 9).contiguous(memory_format=torch.channels_last).requires_grad_()
    for norm, expected in ((PAPER.lrn, {x.numel() * 4, 2 * 8 * 4 * 4}), (None, {2 * 8 * 4 * 4})):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):  # noqa: B023
            max_pool(x, norm, relu_after=True)
        assert set(saved) == expected


def test_empty_batches_and_float64_use_operators(implementation: None) -> None:
    assert max_pool(torch.zeros(0, 4, 9, 9), PAPER.lrn, relu_before=True).shape == (0, 4, 4, 4)
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: max_pool(x, Lrn(3, 0.1, 0.75, 2.0), relu_after=True), x)


def test_even_windows_and_maps_smaller_than_a_window_are_refused(implementation: None) -> None:
    with pytest.raises(ValueError, match="odd"):
        max_pool(torch.zeros(1, 4, 5, 5), Lrn(4, 0.1, 0.75, 2.0))
    with pytest.raises(RuntimeError):
        max_pool(torch.zeros(1, 4, 2, 5))

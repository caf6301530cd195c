"""Local response normalisation against the paper's formula in float64 NumPy, and against torch.nn.LocalResponseNorm."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.lrn import local_response_norm, within_map_norm


def by_formula(a: np.ndarray, n: int, alpha: float, beta: float, k: float) -> np.ndarray:
    """Section 3.3, map by map."""
    b = np.empty_like(a)
    maps = a.shape[1]
    for i in range(maps):
        window = a[:, max(0, i - n // 2) : min(maps - 1, i + n // 2) + 1]
        b[:, i] = a[:, i] / (k + alpha * (window**2).sum(1)) ** beta
    return b


@pytest.mark.parametrize(("maps", "size"), [(48, 5), (128, 5), (7, 3), (3, 5), (1, 5), (12, 9)])
@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_equals_the_formula_of_the_paper(maps: int, size: int, beta: float) -> None:
    x = torch.randn(2, maps, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(maps)) * 30
    found = local_response_norm(x, size, 1e-2, beta, 2.0)
    assert np.allclose(found.numpy(), by_formula(x.numpy(), size, 1e-2, beta, 2.0), rtol=1e-12)


def test_torch_divides_alpha_by_the_window() -> None:
    x = torch.randn(2, 48, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    theirs = torch.nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2)(x)
    assert torch.allclose(local_response_norm(x, 5, 1e-4, 0.75, 2.0), theirs, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_gradient(beta: float) -> None:
    x = torch.randn(2, 7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 5, 0.1, beta, 2.0), x)
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 3, 0.1, beta, 2.0), x)


def test_gradient_in_float32_equals_torchs() -> None:
    x = torch.randn(4, 48, 9, 9, generator=torch.Generator().manual_seed(2)).mul_(50).requires_grad_()
    upstream = torch.randn(4, 48, 9, 9, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad(local_response_norm(x, 5, 1e-4, 0.75, 2.0), x, upstream)
    (theirs,) = torch.autograd.grad(torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)(x), x, upstream)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_input_is_left_as_it_was() -> None:
    x = torch.randn(1, 6, 3, 3, generator=torch.Generator().manual_seed(4))
    before = x.clone()
    local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    within_map_norm(x, 5, 1e-4, 0.75, 1.0)
    assert torch.equal(x, before)


def test_an_even_window_is_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        local_response_norm(torch.zeros(1, 4, 2, 2), 4, 1e-4, 0.75, 2.0)


def test_within_map_norm_equals_the_formula() -> None:
    a = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 10
    padded = np.pad(a.numpy() ** 2, ((0, 0), (0, 0), (2, 2), (2, 2)))
    squares = sum(padded[:, :, y : y + 7, x : x + 6] for y in range(5) for x in range(5))
    wanted = a.numpy() / (1 + 4e-5 * squares) ** 0.75
    assert np.allclose(within_map_norm(a, 5, 4e-5, 0.75, 1.0).numpy(), wanted, rtol=1e-12)

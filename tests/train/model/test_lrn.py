"""Local response normalization is compared with the paper's formula in float64, and with torch's layer."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from train.model import kernels, lrn
from train.model.lrn import local_response_norm, within_map_norm

Numbers = npt.NDArray[np.float64]
SHAPES = [(48, 5), (128, 5), (96, 5), (7, 3), (3, 5), (1, 5), (12, 9), (2, 101), (33, 1)]


def lrn_reference(a: Numbers, n: int, alpha: float, beta: float, k: float) -> Numbers:
    """Compute the formula of section 3.3, one map at a time."""
    b = np.empty_like(a)
    maps = a.shape[1]
    for i in range(maps):
        window = a[:, max(0, i - n // 2) : min(maps - 1, i + n // 2) + 1]
        b[:, i] = a[:, i] / (k + alpha * (window**2).sum(1)) ** beta
    return b


def gradient_reference(a: Numbers, grad: Numbers, n: int, alpha: float, beta: float, k: float) -> Numbers:
    """Return the gradient of the input: for each input map, a sum over the output maps whose window has this map."""
    maps = a.shape[1]
    gradient = np.zeros_like(a)
    for i in range(maps):
        low, high = max(0, i - n // 2), min(maps - 1, i + n // 2)
        s = k + alpha * (a[:, low : high + 1] ** 2).sum(1)
        gradient[:, i] += grad[:, i] * s**-beta
        for j in range(low, high + 1):
            gradient[:, j] -= grad[:, i] * a[:, i] * beta * s ** (-beta - 1) * 2 * alpha * a[:, j]
    return gradient


def random_maps(count: int, *, last: bool = True, seed: int = 0) -> Tensor:
    """Return float32 (2, count, 4, 5) with positive and negative values. `last` chooses the channels-last layout."""
    x = torch.randn(2, count, 4, 5, generator=torch.Generator().manual_seed(count + seed)) * 30
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.fixture(params=["kernels", "operators"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "operators":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("the kernels were not compiled")
    return str(request.param)


@pytest.mark.parametrize(("maps", "size"), SHAPES)
@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_float64_equals_the_formula_of_the_paper(maps: int, size: int, beta: float) -> None:
    x = random_maps(maps).double()
    actual = local_response_norm(x, size, 1e-2, beta, 2.0)
    assert np.allclose(actual.numpy(), lrn_reference(x.numpy(), size, 1e-2, beta, 2.0), rtol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("maps", "size"), SHAPES)
def test_float32_is_within_a_few_ulp_of_the_formula(maps: int, size: int, relu: bool, implementation: str) -> None:
    x = random_maps(maps)
    a = (x.relu() if relu else x).double().numpy()
    expected = lrn_reference(a, size, 1e-2, 0.75, 2.0)
    actual = local_response_norm(x, size, 1e-2, 0.75, 2.0, relu).numpy()
    assert (np.abs(actual - expected) <= 6 * np.spacing(np.abs(expected).astype(np.float32))).all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("maps", "size"), SHAPES)
def test_gradient_in_float32_equals_the_formula(maps: int, size: int, relu: bool, implementation: str) -> None:
    x, grad = random_maps(maps).requires_grad_(), random_maps(maps, last=False, seed=1)
    a = (x.relu() if relu else x).detach().double().numpy()
    expected = gradient_reference(a, grad.double().numpy(), size, 1e-2, 0.75, 2.0)
    if relu:
        expected[x.detach().numpy() <= 0] = 0
    (actual,) = torch.autograd.grad(local_response_norm(x, size, 1e-2, 0.75, 2.0, relu), x, grad)
    assert np.allclose(actual.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(grad.numpy()).max())


def test_alpha_of_torchs_layer_is_the_papers_alpha_times_the_window_size() -> None:
    x = torch.randn(2, 48, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    torchs = torch.nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2)(x)
    assert torch.allclose(local_response_norm(x, 5, 1e-4, 0.75, 2.0), torchs, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.75, 0.5])
@pytest.mark.parametrize("relu", [False, True])
def test_gradient_passes_gradcheck(beta: float, relu: bool) -> None:
    x = torch.randn(2, 7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 5, 0.1, beta, 2.0, relu), x)
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 3, 0.1, beta, 2.0, relu), x)


def test_gradient_in_float32_equals_torchs(implementation: str) -> None:
    x = torch.randn(4, 48, 9, 9, generator=torch.Generator().manual_seed(2)).mul_(50).requires_grad_()
    upstream = torch.randn(4, 48, 9, 9, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad(local_response_norm(x, 5, 1e-4, 0.75, 2.0), x, upstream)
    (torchs,) = torch.autograd.grad(torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)(x), x, upstream)
    assert torch.allclose(ours, torchs, atol=1e-5)


def test_any_memory_layout_gives_the_formula(implementation: str) -> None:
    """The test compares outputs and gradients of channels-first, strided, transposed, expanded and flipped tensors."""
    base = torch.randn(4, 14, 10, 12, generator=torch.Generator().manual_seed(6)) * 20
    base = base.contiguous(memory_format=torch.channels_last)
    views = [base.contiguous(), base[::2, 3:11, 1:, ::3], base.transpose(2, 3), base.permute(0, 2, 1, 3)]
    views += [base[:, :1].expand(4, 6, 10, 12), base.flip(1)]
    for view in views:
        x = view.detach().requires_grad_()
        actual = local_response_norm(x, 5, 1e-2, 0.75, 2.0, relu=True)
        (gradient,) = torch.autograd.grad(actual, x, torch.ones(()).expand(x.shape))
        a = x.detach().relu().double().numpy()
        assert np.allclose(actual.detach().numpy(), lrn_reference(a, 5, 1e-2, 0.75, 2.0), rtol=1e-6)
        expected = gradient_reference(a, np.ones_like(a), 5, 1e-2, 0.75, 2.0) * (x.detach().numpy() > 0)
        assert np.allclose(gradient.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_floats_are_computed_in_float32(dtype: torch.dtype) -> None:
    """The sum of five squares of 200 overflows float16, but the normalized result does not."""
    x = (random_maps(12) * 7).to(dtype).requires_grad_()
    actual = local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    expected = local_response_norm(x.double(), 5, 1e-4, 0.75, 2.0)
    assert actual.dtype == dtype and torch.equal(actual, expected.to(dtype))
    (gradient,) = torch.autograd.grad(actual.float().sum(), x)
    (exact,) = torch.autograd.grad(expected.sum(), x)
    assert gradient.dtype == dtype and torch.allclose(gradient.double(), exact.double(), rtol=1e-2, atol=1e-4)


def test_nan_and_infinity_reach_only_the_maps_of_their_window(implementation: str) -> None:
    for bad in (float("nan"), float("inf")):
        x = random_maps(11).abs()
        x[1, 5, 2, 3] = bad
        x.requires_grad_()
        actual = local_response_norm(x, 5, 1e-2, 0.75, 2.0, relu=True)
        (gradient,) = torch.autograd.grad(actual.sum(), x)
        assert actual[1, 5, 2, 3].isnan() and actual.isnan().sum() == (5 if bad != bad else 1)
        if bad == float("inf"):
            assert (actual[1, 3:8, 2, 3].nan_to_num() == 0).all()
        assert gradient[1, 5, 2, 3].isnan()
        assert not gradient[0].isnan().any() and not gradient[1, :1].isnan().any()


def test_huge_and_tiny_inputs_give_the_values_of_the_formula(implementation: str) -> None:
    for scale in (1e15, 1e-30):
        x = random_maps(9) * scale
        actual = local_response_norm(x, 5, 1e-4, 0.75, 2.0)
        assert np.allclose(actual.numpy(), lrn_reference(x.double().numpy(), 5, 1e-4, 0.75, 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 48, 5, 5), (2, 8, 0, 3), (2, 0, 3, 3)])
def test_empty_tensors_give_empty_results(shape: tuple[int, ...], implementation: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    actual = local_response_norm(x, 5, 1e-4, 0.75, 2.0, relu=True)
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    assert actual.shape == gradient.shape == shape


def test_the_input_is_not_changed_and_is_the_only_tensor_saved_for_backward(implementation: str) -> None:
    x = random_maps(6).requires_grad_()
    before, saved = x.detach().clone(), []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = local_response_norm(x, 5, 1e-4, 0.75, 2.0, relu=True), within_map_norm(x, 5, 1e-4, 0.75, 1.0)
    sum(output.sum() for output in outputs).backward()
    assert torch.equal(x, before) and saved == [x.data_ptr()] * 2


def test_a_second_derivative_is_refused(implementation: str) -> None:
    x = random_maps(6).requires_grad_()
    (gradient,) = torch.autograd.grad(local_response_norm(x, 5, 1e-2, 0.75, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_even_windows_and_other_ranks_are_refused() -> None:
    for size in (4, 0, -1):
        with pytest.raises(ValueError, match="odd"):
            local_response_norm(torch.zeros(1, 4, 2, 2), size, 1e-4, 0.75, 2.0)
    with pytest.raises(ValueError, match="odd"):
        within_map_norm(torch.zeros(1, 4, 2, 2), 4, 1e-4, 0.75, 2.0)
    with pytest.raises(ValueError, match="expected"):
        local_response_norm(torch.zeros(1, 4), 5, 1e-4, 0.75, 2.0)


def test_kernels_are_used_for_float32_on_a_cpu_with_the_papers_exponent_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_maps(4)
    assert lrn.can_use_kernels(x, 0.75) == (kernels.native is not None)
    for other in (x.double(), x.half(), x.to("meta"), x[:0]):
        assert not lrn.can_use_kernels(other, 0.75)
    assert not lrn.can_use_kernels(x, 0.5)
    monkeypatch.setattr(kernels, "native", None)
    assert not lrn.can_use_kernels(x, 0.75)


def test_within_map_norm_equals_the_formula() -> None:
    a = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 10
    padded = np.pad(a.numpy() ** 2, ((0, 0), (0, 0), (2, 2), (2, 2)))
    squares = sum(padded[:, :, y : y + 7, x : x + 6] for y in range(5) for x in range(5))
    expected = a.numpy() / (1 + 4e-5 * squares) ** 0.75
    assert np.allclose(within_map_norm(a, 5, 4e-5, 0.75, 1.0).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_within_map_gradient_passes_gradcheck(beta: float) -> None:
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) * 5
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: within_map_norm(x, 3, 0.1, beta, 1.0), x)
    assert torch.autograd.gradcheck(lambda x: within_map_norm(x, 5, 0.1, beta, 1.0), x)

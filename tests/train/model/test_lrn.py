"""Local response normalization against the paper's formula in float64 NumPy, and against torch.nn.LocalResponseNorm."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from train.model import kernels, lrn
from train.model.lrn import local_response_norm, within_map_norm

Numbers = npt.NDArray[np.float64]
SHAPES = [(48, 5), (128, 5), (96, 5), (7, 3), (3, 5), (1, 5), (12, 9), (2, 101), (33, 1)]


def by_formula(a: Numbers, n: int, alpha: float, beta: float, k: float) -> Numbers:
    """Section 3.3, map by map."""
    b = np.empty_like(a)
    maps = a.shape[1]
    for i in range(maps):
        window = a[:, max(0, i - n // 2) : min(maps - 1, i + n // 2) + 1]
        b[:, i] = a[:, i] / (k + alpha * (window**2).sum(1)) ** beta
    return b


def gradient_by_formula(a: Numbers, grad: Numbers, n: int, alpha: float, beta: float, k: float) -> Numbers:
    """Each output's derivative by each map that it sees."""
    maps = a.shape[1]
    found = np.zeros_like(a)
    for i in range(maps):
        low, high = max(0, i - n // 2), min(maps - 1, i + n // 2)
        s = k + alpha * (a[:, low : high + 1] ** 2).sum(1)
        found[:, i] += grad[:, i] * s**-beta
        for j in range(low, high + 1):
            found[:, j] -= grad[:, i] * a[:, i] * beta * s ** (-beta - 1) * 2 * alpha * a[:, j]
    return found


def maps_of(count: int, *, last: bool = True, seed: int = 0) -> Tensor:
    """float32 (2, count, 4, 5), of both signs."""
    x = torch.randn(2, count, 4, 5, generator=torch.Generator().manual_seed(count + seed)) * 30
    return x.contiguous(memory_format=torch.channels_last) if last else x


@pytest.fixture(params=["compiled", "plain"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(kernels, "native", None)
    elif kernels.native is None:
        pytest.skip("no C compiler was there at installation")
    return str(request.param)


@pytest.mark.parametrize(("maps", "size"), SHAPES)
@pytest.mark.parametrize("beta", [0.75, 0.6])
def test_equals_the_formula_of_the_paper(maps: int, size: int, beta: float) -> None:
    x = maps_of(maps).double()
    found = local_response_norm(x, size, 1e-2, beta, 2.0)
    assert np.allclose(found.numpy(), by_formula(x.numpy(), size, 1e-2, beta, 2.0), rtol=1e-12)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("maps", "size"), SHAPES)
def test_float32_is_within_a_few_ulp_of_the_formula(maps: int, size: int, relu: bool, way: str) -> None:
    x = maps_of(maps)
    a = (x.relu() if relu else x).double().numpy()
    wanted = by_formula(a, size, 1e-2, 0.75, 2.0)
    found = local_response_norm(x, size, 1e-2, 0.75, 2.0, relu).numpy()
    assert (np.abs(found - wanted) <= 6 * np.spacing(np.abs(wanted).astype(np.float32))).all()


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("maps", "size"), SHAPES)
def test_gradient_in_float32_equals_the_formula(maps: int, size: int, relu: bool, way: str) -> None:
    x, grad = maps_of(maps).requires_grad_(), maps_of(maps, last=False, seed=1)
    a = (x.relu() if relu else x).detach().double().numpy()
    wanted = gradient_by_formula(a, grad.double().numpy(), size, 1e-2, 0.75, 2.0)
    if relu:
        wanted[x.detach().numpy() <= 0] = 0
    (found,) = torch.autograd.grad(local_response_norm(x, size, 1e-2, 0.75, 2.0, relu), x, grad)
    assert np.allclose(found.numpy(), wanted, rtol=1e-5, atol=1e-6 * np.abs(grad.numpy()).max())


def test_torch_divides_alpha_by_the_window() -> None:
    x = torch.randn(2, 48, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    theirs = torch.nn.LocalResponseNorm(5, alpha=5 * 1e-4, beta=0.75, k=2)(x)
    assert torch.allclose(local_response_norm(x, 5, 1e-4, 0.75, 2.0), theirs, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.75, 0.5])
@pytest.mark.parametrize("relu", [False, True])
def test_gradient(beta: float, relu: bool) -> None:
    x = torch.randn(2, 7, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 5, 0.1, beta, 2.0, relu), x)
    assert torch.autograd.gradcheck(lambda x: local_response_norm(x, 3, 0.1, beta, 2.0, relu), x)


def test_gradient_in_float32_equals_torchs(way: str) -> None:
    x = torch.randn(4, 48, 9, 9, generator=torch.Generator().manual_seed(2)).mul_(50).requires_grad_()
    upstream = torch.randn(4, 48, 9, 9, generator=torch.Generator().manual_seed(3))
    (ours,) = torch.autograd.grad(local_response_norm(x, 5, 1e-4, 0.75, 2.0), x, upstream)
    (theirs,) = torch.autograd.grad(torch.nn.LocalResponseNorm(5, 5e-4, 0.75, 2)(x), x, upstream)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_any_layout(way: str) -> None:
    """Channels first, strided, transposed, expanded; the gradient too."""
    whole = torch.randn(4, 14, 10, 12, generator=torch.Generator().manual_seed(6)) * 20
    whole = whole.contiguous(memory_format=torch.channels_last)
    views = [whole.contiguous(), whole[::2, 3:11, 1:, ::3], whole.transpose(2, 3), whole.permute(0, 2, 1, 3)]
    views += [whole[:, :1].expand(4, 6, 10, 12), whole.flip(1)]
    for view in views:
        x = view.detach().requires_grad_()
        found = local_response_norm(x, 5, 1e-2, 0.75, 2.0, relu=True)
        (gradient,) = torch.autograd.grad(found, x, torch.ones(()).expand(x.shape))
        a = x.detach().relu().double().numpy()
        assert np.allclose(found.detach().numpy(), by_formula(a, 5, 1e-2, 0.75, 2.0), rtol=1e-6)
        wanted = gradient_by_formula(a, np.ones_like(a), 5, 1e-2, 0.75, 2.0) * (x.detach().numpy() > 0)
        assert np.allclose(gradient.numpy(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_of_16_bits_are_computed_in_32(dtype: torch.dtype) -> None:
    """200² times five is beyond float16, whose result is not."""
    x = (maps_of(12) * 7).to(dtype).requires_grad_()
    found = local_response_norm(x, 5, 1e-4, 0.75, 2.0)
    wanted = local_response_norm(x.double(), 5, 1e-4, 0.75, 2.0)
    assert found.dtype == dtype and torch.equal(found, wanted.to(dtype))
    (gradient,) = torch.autograd.grad(found.float().sum(), x)
    (exact,) = torch.autograd.grad(wanted.sum(), x)
    assert gradient.dtype == dtype and torch.allclose(gradient.double(), exact.double(), rtol=1e-2, atol=1e-4)


def test_nan_and_infinity_reach_the_maps_that_see_them(way: str) -> None:
    for bad in (float("nan"), float("inf")):
        x = maps_of(11).abs()
        x[1, 5, 2, 3] = bad
        x.requires_grad_()
        found = local_response_norm(x, 5, 1e-2, 0.75, 2.0, relu=True)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        assert found[1, 5, 2, 3].isnan() and found.isnan().sum() == (5 if bad != bad else 1)
        if bad == float("inf"):
            assert (found[1, 3:8, 2, 3].nan_to_num() == 0).all()
        assert gradient[1, 5, 2, 3].isnan()
        assert not gradient[0].isnan().any() and not gradient[1, :1].isnan().any()


def test_huge_and_tiny_numbers(way: str) -> None:
    for scale in (1e15, 1e-30):
        x = maps_of(9) * scale
        found = local_response_norm(x, 5, 1e-4, 0.75, 2.0)
        assert np.allclose(found.numpy(), by_formula(x.double().numpy(), 5, 1e-4, 0.75, 2.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(0, 48, 5, 5), (2, 8, 0, 3), (2, 0, 3, 3)])
def test_an_empty_batch(shape: tuple[int, ...], way: str) -> None:
    x = torch.zeros(shape, requires_grad=True)
    found = local_response_norm(x, 5, 1e-4, 0.75, 2.0, relu=True)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert found.shape == gradient.shape == shape


def test_the_input_is_left_as_it_was_and_is_all_that_is_kept(way: str) -> None:
    x = maps_of(6).requires_grad_()
    before, kept = x.detach().clone(), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = local_response_norm(x, 5, 1e-4, 0.75, 2.0, relu=True), within_map_norm(x, 5, 1e-4, 0.75, 1.0)
    sum(output.sum() for output in outputs).backward()
    assert torch.equal(x, before) and kept == [x.data_ptr()] * 2


def test_differentiable_once(way: str) -> None:
    """A second derivative is refused, not wrong."""
    x = maps_of(6).requires_grad_()
    (gradient,) = torch.autograd.grad(local_response_norm(x, 5, 1e-2, 0.75, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_does_not_fit_is_refused() -> None:
    for size in (4, 0, -1):
        with pytest.raises(ValueError, match="odd"):
            local_response_norm(torch.zeros(1, 4, 2, 2), size, 1e-4, 0.75, 2.0)
    with pytest.raises(ValueError, match="odd"):
        within_map_norm(torch.zeros(1, 4, 2, 2), 4, 1e-4, 0.75, 2.0)
    with pytest.raises(ValueError, match="expected"):
        local_response_norm(torch.zeros(1, 4), 5, 1e-4, 0.75, 2.0)


def test_which_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on a CPU with the paper's exponent is compiled, and nothing else."""
    x = maps_of(4)
    assert lrn.fits_kernel(x, 0.75) == (kernels.native is not None)
    for other in (x.double(), x.half(), x.to("meta"), x[:0]):
        assert not lrn.fits_kernel(other, 0.75)
    assert not lrn.fits_kernel(x, 0.5)
    monkeypatch.setattr(kernels, "native", None)
    assert not lrn.fits_kernel(x, 0.75)


def test_within_map_norm_equals_the_formula() -> None:
    a = torch.randn(2, 3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 10
    padded = np.pad(a.numpy() ** 2, ((0, 0), (0, 0), (2, 2), (2, 2)))
    squares = sum(padded[:, :, y : y + 7, x : x + 6] for y in range(5) for x in range(5))
    wanted = a.numpy() / (1 + 4e-5 * squares) ** 0.75
    assert np.allclose(within_map_norm(a, 5, 4e-5, 0.75, 1.0).numpy(), wanted, rtol=1e-12)


@pytest.mark.parametrize("beta", [0.75, 0.5])
def test_within_map_gradient(beta: float) -> None:
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) * 5
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: within_map_norm(x, 3, 0.1, beta, 1.0), x)
    assert torch.autograd.gradcheck(lambda x: within_map_norm(x, 5, 0.1, beta, 1.0), x)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
TRITON_CASES = [
    (12, 5, 0.75, True, torch.float32, True),
    (7, 3, 0.6, False, torch.float32, False),
    (130, 1, 0.75, True, torch.float16, True),
    (3, 9, 0.6, False, torch.bfloat16, False),
]


def check_triton(
    maps: int, size: int, beta: float, relu: bool, dtype: torch.dtype, last: bool, device: str = "cpu"
) -> None:
    """The Triton kernel and its gradient beside the plain form, on `device`."""
    from train.model import lrn_triton

    x, grad = (torch.randn(2, maps, 3, 2, generator=torch.Generator().manual_seed(seed)) * 20 for seed in (0, 1))
    x = x.to(device, dtype, memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
    found = lrn_triton.local_response_norm(x, size, 1e-2, beta, 2.0, relu)
    wanted = lrn._Plain.apply(x, size, 1e-2, beta, 2.0, relu)
    pairs = [(found, wanted)]
    pairs += [tuple(torch.autograd.grad(output, x, grad.to(x))[0] for output in (found, wanted))]
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for ours, plain in pairs:
        assert ours.dtype == dtype and torch.allclose(ours, plain, rtol=tolerance, atol=tolerance)


@needs_triton
def test_triton_by_its_interpreter() -> None:
    """Reads by what torch calls a CPU; the interpreter must be chosen before Triton is imported."""
    program = "import sys; sys.path.insert(0, 'tests')\nimport test_lrn\n"
    program += "for case in test_lrn.TRITON_CASES:\n    test_lrn.check_triton(*case)\n"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


class SaidToBeOnAGpu(Tensor):
    """What the choice between the ways is tried with where there is no GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.mark.parametrize("wrong", [False, True], ids=["it raises", "it is wrong"])
def test_triton_that_cannot_compile_is_done_without(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image without a C compiler has Triton and cannot use it: training stopped at the first normalization. It is
    tried once, here first by an evaluation.
    """

    def kernel(x: Tensor, size: int, alpha: float, beta: float, k: float, relu: bool) -> Tensor:
        tried.append(x)
        if wrong:
            return x * alpha
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    tried: list[Tensor] = []
    monkeypatch.setattr(kernels, "native", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "train.model.lrn_triton", SimpleNamespace(local_response_norm=kernel))
    monkeypatch.setattr("train.model.lrn_triton", sys.modules["train.model.lrn_triton"], raising=False)
    lrn.triton_fault.cache_clear()
    x = maps_of(7)
    try:
        with torch.no_grad():
            found = [local_response_norm(x.as_subclass(SaidToBeOnAGpu), 5, 1e-2, 0.75, 2.0) for _ in range(2)]
        assert all(torch.equal(b, local_response_norm(x, 5, 1e-2, 0.75, 2.0)) for b in found)
        said = capsys.readouterr().err
        assert len(tried) == 1 and said.count("\n") == 1 and "PyTorch's operators" in said
        assert ("something else" if wrong else "RuntimeError: Failed to find C compiler") in said
    finally:
        lrn.triton_fault.cache_clear()


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("case", [*TRITON_CASES, (128, 5, 0.75, True, torch.float32, True)], ids=str)
def test_triton_on_a_gpu(case: tuple[int, int, float, bool, torch.dtype, bool]) -> None:
    check_triton(*case, "cuda")
    maps, size, beta, relu, dtype, _ = case
    x = (maps_of(maps) / 10).to("cuda", dtype)
    wanted = local_response_norm(x.double(), size, 1e-2, beta, 2.0, relu).to(dtype)  # float64 goes by PyTorch
    assert torch.allclose(local_response_norm(x, size, 1e-2, beta, 2.0, relu), wanted, rtol=1e-2, atol=1e-5)

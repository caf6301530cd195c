"""Tests of the C kernels of a training step: threads, memory bounds, agreement with PyTorch, refused libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prep import compiled
from tests.conftest import compile_changed
from tools import compile_native as compiling
from tools.compile_native import compile_native
from train.config.recipes import PAPER
from train.model import kernels
from train.model.lrn import local_response_norm
from train.model.pooling import max_pool
from train.optim.paper_sgd import PaperSGD

needs_kernel = pytest.mark.skipif(kernels.native is None, reason="the kernels were not compiled")

FAST_TO_COMPILE = ["-std=gnu11", "-O1", "-fPIC", "-shared"]  # compiles ten times as fast as compiling.FLAGS


def load(path: Path) -> kernels.NativeKernels | None:
    return compiled.load(path, kernels.NativeKernels, kernels.is_correct)


def outputs_and_gradients() -> list[Tensor]:
    """Return outputs and gradients of the normalization and pooling kernels.

    No number of maps is a multiple of the vector length, and no number of pixels is a multiple of the block size.
    """
    results = []
    for shape in ((3, 44, 9, 8), (1, 9, 31, 20), (5, 3, 3, 3)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(30).requires_grad_()
        for output in (
            local_response_norm(x, **vars(PAPER.lrn), relu=True),
            max_pool(x, PAPER.lrn, relu_before=True),
            max_pool(x, relu_after=True),
        ):
            results += [output.detach(), *torch.autograd.grad(output.square().sum(), x)]
    return results


@needs_kernel
def test_the_number_of_threads_does_not_change_a_bit() -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 64):
            torch.set_num_threads(threads)
            results.append(outputs_and_gradients())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(("items", "threads"), [(1, 4), (4, 4), (10, 3), (7, 1)])
def test_run_in_threads_covers_every_item_once(items: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done: list[int] = []
    kernels.run_in_threads(items, lambda first, end: done.extend(range(first, end)))
    assert sorted(done) == list(range(items))


@needs_kernel
def test_kernels_read_and_write_only_inside_their_tensors() -> None:
    """An access to a protected page of memory kills the process.

    In the first pass, each tensor ends just before a protected page. In the second pass, each tensor begins just after
    a protected page.
    """
    program = """
import ctypes, mmap, os
import torch
from train.model import kernels
libc = ctypes.CDLL(None, use_errno=True)
page, kept, at_end = mmap.PAGESIZE, [], True
empty = torch.empty
def fenced(*size, dtype=torch.float32, memory_format=None):
    size = size[0] if isinstance(size[0], (tuple, torch.Size)) else size
    count = 1
    for n in size:
        count *= n
    size_bytes = count * dtype.itemsize
    pages = -(-size_bytes // page)
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    for fence in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(fence), page, 0) == 0
    at = (pages + 1) * page - size_bytes if at_end else page
    flat = torch.frombuffer(area, dtype=dtype, count=count, offset=at)
    kept.append(area)
    if memory_format is None:
        return flat.view(size)
    n, c, h, w = size
    return flat.view(n, h, w, c).permute(0, 3, 1, 2)
def filled(shape):
    return fenced(shape, memory_format=1).copy_(torch.randn(shape))
torch.empty, torch.empty_like = fenced, lambda x: fenced(x.shape, memory_format=1)
for at_end in (True, False):
    shapes = (2, 44, 9, 8), (1, 9, 31, 20), (3, 1, 3, 3), (1, 128, 5, 5), (2, 3, 4, 4)
    for shape, size in zip(shapes, (5, 7, 5, 5, 1)):
        norm, x = kernels.NormParams(shape[1], size, 0.1, 2.0, True), filled(shape)
        kernels.native.norm(x, norm)
        kernels.native.norm_backward(x, filled(shape), norm)
        for normalize in (True, False):
            pool = kernels.PoolParams(*shape[2:], normalize, True)
            out, argmax = kernels.native.pool(x, pool, norm)
            kernels.native.pool_backward(x if normalize else None, filled(out.shape), argmax, pool, norm)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)


@needs_kernel
@pytest.mark.parametrize("layouts", ["alike", "different", "strided"])
def test_an_update_with_and_without_the_kernel_is_the_same(layouts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors are the weight of a convolution, a weight of more than one block, biases, and an empty tensor.

    layouts  alike      the convolution's weight and its gradient are channels last
             different  the convolution's weight is channels last, but its gradient is channels first
             strided    the tensors have gaps in memory
    """
    results = []
    for native in (kernels.native, None):
        monkeypatch.setattr(kernels, "native", native)
        generator = torch.Generator().manual_seed(0)
        parameters, before = [], []
        for shape in ((6, 5, 3, 3), (300, 701), (17,), (3, 0)):
            w, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
            if layouts == "strided":
                w, g = (t.repeat_interleave(2, 0)[::2] for t in (w, g))
            elif len(shape) == 4:
                w = w.contiguous(memory_format=torch.channels_last)
                g = g if layouts == "different" else g.to(memory_format=torch.channels_last)
            parameters.append(torch.nn.Parameter(w))
            parameters[-1].grad = g
            before.append(parameters[-1]._version)
        optimizer = PaperSGD([{"params": parameters, "lr": 0.1, "weight_decay": 0.2}], 0.9)
        optimizer.step()
        optimizer.step()
        assert all(p._version > old for p, old in zip(parameters, before, strict=True))
        results.append([*parameters, *(optimizer.velocity(p) for p in parameters)])
    for actual, expected in zip(*results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6)


def test_kernels_are_not_loaded_if_switched_off_or_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(tmp_path / "absent.so") is None
    monkeypatch.setenv("ALEXNET_NATIVE", "0")
    assert load(compiled.library_path(kernels.SOURCE)) is None


def test_kernels_agree_with_pytorch_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    results = outputs_and_gradients()
    monkeypatch.setattr(kernels, "native", None)
    for result, expected in zip(results, outputs_and_gradients(), strict=True):
        assert torch.allclose(result, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("c_compiler")
@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("padded[3] + padded[4]", "padded[3] + padded[3]"),
        ("t <= 2 * reach", "t < 2 * reach"),
        ("factor = 1.5f", "factor = 1.0f"),
        ("norm.relu && x[i] <= 0 ? 0 : gradient", "gradient"),
        ("relu && maximum <= 0 ? NO_GRADIENT : index", "index"),
        ("a.first_index + right)", "a.first_index + left)"),
        ("b = {grad + above, argmax + above, 6}", "b = {grad + above, argmax + above, 3}"),
        ("- pull * w[i]", "- decay * w[i]"),
        ("sum += lanes[lane]", "sum = lanes[lane]"),
        ("void norm_backward", "void norm_back"),
    ],
)
def test_a_library_with_a_wrong_result_or_a_missing_function_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str
) -> None:
    monkeypatch.setattr(compiling, "FLAGS", FAST_TO_COMPILE)
    assert load(compile_changed(kernels.SOURCE, tmp_path, right, wrong)) is None


@pytest.mark.usefixtures("c_compiler")
def test_kernels_without_vectors_or_fused_multiply_adds_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results may differ in their last bits. If the terms of a sum cancel, the relative difference is larger."""
    monkeypatch.setattr(compiling, "FLAGS", [*FAST_TO_COMPILE, "-ffp-contract=off"])
    expected, source = outputs_and_gradients(), tmp_path / "kernels.c"
    source.write_bytes(kernels.SOURCE.read_bytes())
    library = compile_native(source)
    assert library
    monkeypatch.setattr(kernels, "native", load(library))
    assert kernels.native
    for result, other in zip(outputs_and_gradients(), expected, strict=True):
        assert torch.allclose(result, other, rtol=1e-5, atol=1e-4)

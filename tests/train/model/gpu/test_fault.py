"""Tests of the trial that shows whether the Triton kernels work on a device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from train.model import kernels
from train.model.gpu import epilogue, fault
from train.model.lrn import local_response_norm


class PretendsToBeOnAGpu(Tensor):
    """A CPU tensor with is_cuda = True. With this tensor, the tests can choose the GPU's kernels without a GPU."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _fresh_cache() -> Iterator[None]:
    cached = (fault.triton_fault, fault.normalization_fault)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def test_the_kernels_work_in_tritons_interpreter() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    assert fault.triton_fault(torch.device("cpu")) is None


@pytest.mark.parametrize("pool_px", [0, 3])
def test_the_trial_uses_no_operator_that_deterministic_algorithms_refuse(pool_px: int) -> None:
    """With deterministic algorithms, PyTorch refuses the gradient of average pooling over three axes on a GPU.

    F.local_response_norm uses this pooling, so the trial must not use F.local_response_norm.
    """

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    pytest.importorskip("triton", reason="Triton is not installed")
    names: list[str] = []
    with Names():
        assert fault._agrees(pool_px, torch.device("cpu"))
    assert any("relu" in name or "threshold" in name for name in names)
    assert not [name for name in names if "pool3d" in name]


def test_without_triton_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fault.triton_fault(torch.device("cpu")) == "Triton is not installed"


@pytest.mark.parametrize("wrong", [False, True], ids=["raises", "gives wrong results"])
def test_operators_replace_a_triton_kernel_that_fails(
    wrong: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel raises an exception, as without a C compiler, or gives wrong results.

    Only the first normalization tries the kernels. This normalization and all later normalizations then use PyTorch
    operators. The test disables gradients, because the trial must also work if gradients are disabled.
    """

    class Apply:
        @staticmethod
        def apply(*arguments: Any) -> tuple[Tensor, ...]:
            tried.append(arguments)
            if wrong:
                return (arguments[4] * 2 + arguments[5][:, None, None],)
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nmore")

    tried: list[Any] = []
    monkeypatch.setattr(kernels, "native", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "train.model.gpu.epilogue_triton", SimpleNamespace())
    monkeypatch.setattr(epilogue, "_Apply", Apply)
    x = torch.randn(2, 7, 3, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual = [local_response_norm(x.as_subclass(PretendsToBeOnAGpu), 5, 1e-2, 0.75, 2.0) for _ in range(2)]
    assert all(torch.equal(b, local_response_norm(x, 5, 1e-2, 0.75, 2.0)) for b in actual)
    message = capsys.readouterr().err
    assert len(tried) == 1 and message.count("\n") == 1 and "uses PyTorch operators instead" in message
    assert ("wrong results" if wrong else "RuntimeError: Failed to find C compiler") in message


@pytest.mark.parametrize(("maps", "shared_kib", "fits"), [(128, 99, True), (256, 99, False), (256, 227, True)])
def test_many_normalized_maps_need_much_shared_memory(
    maps: int, shared_kib: int, fits: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--model joined` has 256 maps in layer 2. For this layer, a GPU with 99 KiB of shared memory uses operators."""
    monkeypatch.setattr(fault, "triton_fault", lambda device: None)
    monkeypatch.setattr(epilogue, "shared_bytes_of", lambda device: shared_kib << 10)
    assert (fault.normalization_fault(torch.device("cuda:0"), maps) is None) == fits
    assert ("99 KiB of shared memory" in capsys.readouterr().err) != fits

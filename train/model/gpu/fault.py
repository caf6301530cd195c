"""Tests once for each process whether the Triton kernels work on a GPU. Some machines cannot compile the kernels."""

from __future__ import annotations

import functools
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from prep.console import say
from train.config.recipe import Lrn

_NORM = Lrn(size=5, alpha=0.1, beta=0.75, k=2.0)
# Largest number of normalized maps in a column for which the shared memory of the GPU is not checked. For more maps,
# the kernels need at least 99 KiB.
_MAX_MAPS = 128
_SHARED_BYTES = 150 << 10  # shared memory in bytes that the kernels need for 256 normalized maps


@functools.cache
def normalization_fault(device: torch.device, maps: int) -> str | None:
    """Return why the Triton kernels cannot normalize `maps` maps of a column on a GPU; None if the kernels can."""
    fault = triton_fault(device)
    if fault is not None or maps <= _MAX_MAPS:
        return fault
    from train.model.gpu.epilogue import shared_bytes_of

    if shared_bytes_of(device) >= _SHARED_BYTES:
        return None
    fault = (
        f"the GPU has {shared_bytes_of(device) >> 10} KiB of shared memory, but for {maps} maps the Triton kernels "
        f"need {_SHARED_BYTES >> 10} KiB"
    )
    say(f"{device}: {fault}. The network uses PyTorch operators instead, which take longer.")
    return fault


@functools.cache
def triton_fault(device: torch.device) -> str | None:
    """Return the reason why the Triton kernels cannot be used on a GPU, or None if the kernels work.

    Once for each process, two kernels are compiled, run and compared with PyTorch operators. To launch a kernel, Triton
    compiles C code, for which it needs a C compiler, Python's headers and a writable folder. A container image without
    development tools may lack the compiler, the headers or the folder. The network then uses PyTorch operators.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        # _agrees needs gradients, and the first caller may be an evaluation, in which gradients are disabled.
        with torch.inference_mode(False), torch.enable_grad():
            agree = all(_agrees(pool_px, device) for pool_px in (0, 3))
        fault = None if agree else "a Triton kernel gives wrong results"
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # failures of the compiler, the driver and the disk raise different types of exceptions
        fault = f"a Triton kernel fails: {type(error).__name__}: {error}".splitlines()[0][:300]
    if fault is not None:
        say(f"{device}: {fault}. The network uses PyTorch operators instead, which take longer.")
    return fault


def _agrees(pool_px: int, device: torch.device) -> bool:
    """Return whether kernels and PyTorch operators give the same result and gradients for a small input."""
    from train.model.gpu import epilogue

    x = torch.arange(-40.0, 110.0, device=device).sin().view(1, 6, 5, 5).requires_grad_()
    bias = torch.arange(-3.0, 3.0, device=device).div(10).requires_grad_()
    (actual,) = epilogue.apply_epilogue([x], [bias], epilogue.Epilogue("relu", _NORM, pool_px))
    expected = F.relu(x + bias[:, None, None])
    # F.local_response_norm calls avg_pool3d, whose gradient PyTorch refuses on a GPU under --deterministic. This
    # function therefore computes the normalization with other operators.
    reach, maps = _NORM.size // 2, expected.shape[1]
    squares = F.pad(expected.square(), (0, 0, 0, 0, reach, reach))
    window_sum = torch.stack([squares[:, shift : shift + maps] for shift in range(_NORM.size)]).sum(0)
    expected = expected * (_NORM.k + _NORM.alpha * window_sum).pow(-_NORM.beta)
    if pool_px:
        expected = F.max_pool2d(expected, pool_px, 2)
    results: list[tuple[Tensor, ...]] = [
        (output, *torch.autograd.grad(output.square().sum(), (x, bias))) for output in (actual, expected)
    ]
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))

"""Floating-point precision of training and evaluation: the values of `--precision`.

    fp32    float32 throughout
    tf32    float32, but convolutions and matrix products on a GPU round their inputs to 10 bits of mantissa (TF32) and
            accumulate in float32
    bf16    inputs and outputs of convolutions and matrix products are bfloat16 (torch.autocast); parameters, their
            gradients, velocities, sums of the local response normalization, softmax and loss are float32

PyTorch has two switches for TF32 on a GPU: one for convolutions, on by default, and one for matrix products, off by
default. Neither fp32 nor tf32 corresponds to PyTorch's defaults for TF32. If a GPU is used, set_precision
therefore sets both switches. The switches apply to the whole process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from prep.console import WrongArgument
from train.config.choices import PRECISIONS

_BF16_CAPABILITY = (8, 0)  # the lowest compute capability of a GPU that multiplies bfloat16


def set_precision(precision: str, devices: Sequence[str | torch.device]) -> None:
    """Check a precision, and set torch's TF32 switches for it if a device is a GPU.

    Raises UserError for an unknown precision, or if a device does not support the precision.
    """
    if precision not in PRECISIONS:
        raise WrongArgument(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}.")
    for device in map(torch.device, devices):
        if precision == "tf32" and device.type == "cpu":
            raise WrongArgument(
                "--precision tf32: the device is cpu, and only GPUs have TF32. Pass --precision fp32 or bf16."
            )
        if (
            precision == "bf16"
            and device.type == "cuda"
            and torch.cuda.get_device_capability(device) < _BF16_CAPABILITY
        ):
            raise WrongArgument(
                f"--precision bf16: {torch.cuda.get_device_name(device)} has compute capability "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}; bfloat16 needs 8.0 or higher. "
                "Pass --precision fp32."
            )
    # The switches are not set without a GPU, because torch.export fails after `fp32_precision` has been set.
    if any(torch.device(device).type == "cuda" for device in devices):
        _set_tf32(precision == "tf32")


def default_precision(recipe_name: str, devices: Sequence[str | torch.device]) -> str:
    """Return the default of --precision: bf16 for the recipe `modern` on GPUs with bf16, else fp32."""
    gpus = [device for device in map(torch.device, devices) if device.type == "cuda"]
    fits = len(gpus) == len(devices) and all(torch.cuda.get_device_capability(gpu) >= _BF16_CAPABILITY for gpu in gpus)
    return "bf16" if recipe_name == "modern" and fits else "fp32"


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context manager for the forward pass and the loss.

    Run the backward pass outside of the context. Autograd then uses the same dtypes as in the forward pass.
    """
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _set_tf32(on: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # torch 2.9 and later warn if `allow_tf32` is used
        matmul.fp32_precision = mode = "tf32" if on else "ieee"
        cudnn.conv.fp32_precision = mode  # type: ignore[attr-defined]  # torch's type stubs lack `conv`
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = on

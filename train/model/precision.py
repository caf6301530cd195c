"""The arithmetic of a training or an evaluation: the words of `--precision`.

    fp32    float32 throughout.
    tf32    float32, but a GPU's convolutions and matrix products round their factors to 10 bits after the point (TF32)
            and add up in float32.
    bf16    convolutions and matrix products take and give bfloat16 (torch.autocast); parameters, gradients of
            parameters, velocities, sums of the local response normalization, softmax and loss are float32.

Left alone, PyTorch rounds on a GPU in convolutions and not in matrix products, which is neither of the first two: for a
GPU the switches are always set. They are global to the process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from prep.console import UserError
from train.config.choices import PRECISIONS


def set_precision(precision: str, devices: Sequence[str | torch.device]) -> None:
    """Set what is global of a precision. Raises UserError for one that the devices do not have."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: expected one of {', '.join(PRECISIONS)}.")
    for device in map(torch.device, devices):
        if precision == "tf32" and device.type == "cpu":
            raise UserError("--precision tf32: cpu has no TF32, which is a GPU's. Pass --precision fp32 or bf16.")
        if precision == "bf16" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            raise UserError(
                f"--precision bf16: {torch.cuda.get_device_name(device)} computes no bfloat16, which began with "
                "compute capability 8.0. Pass --precision fp32."
            )
    if any(torch.device(device).type == "cuda" for device in devices):  # torch.export cannot bear the newer switches
        _set_tf32(precision == "tf32")


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """What forward and loss run in; backward outside of it takes each operation's own type."""
    if precision != "bf16":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _set_tf32(on: bool) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):  # since torch 2.9, where the older switches warn
        matmul.fp32_precision = word = "tf32" if on else "ieee"
        cudnn.conv.fp32_precision = word  # type: ignore[attr-defined]  # torch's stubs lack it
    else:
        matmul.allow_tf32 = cudnn.allow_tf32 = on

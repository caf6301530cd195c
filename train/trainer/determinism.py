"""`alextrain run --deterministic`: a GPU computes the same bits in every run of the same command."""

from __future__ import annotations

import os

import torch


def use_deterministic_algorithms() -> None:
    """Let PyTorch use, in this process, only algorithms whose results repeat bit for bit.

    Call this function before any training. Without this setting, cuDNN may choose algorithms that add the terms of a
    sum in an order that varies from run to run. The project's own kernels always use a fixed order. On a CPU, results
    repeat without this setting if the number of threads is the same. PyTorch raises RuntimeError if an operator has no
    deterministic algorithm.
    """
    # cuBLAS reads this variable at its first use. Without the variable, PyTorch's deterministic mode refuses matrix
    # products on a GPU.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    # By default, PyTorch's deterministic mode also fills new memory with NaN. That takes time, and changes no result of
    # a correct program.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)

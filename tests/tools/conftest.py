"""Fixtures for the tests that run the GPU check on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tools.gpu.settings import GpuCheckSettings
from tools.gpu_check import parse_settings


@pytest.fixture
def global_switches() -> Iterator[None]:
    """Restore torch's precision switches after a test, because the GPU check sets them.

    During the test, torch uses one thread, because the tensors are small.
    """
    matmul, cudnn, threads = torch.backends.cuda.matmul, torch.backends.cudnn, torch.get_num_threads()
    before = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = before


@pytest.fixture
def settings(stores: dict[str, Path], global_switches: None) -> GpuCheckSettings:
    """Settings of `--device cpu --quick --batch 2` with a store of JPEG records and a store of PPM records."""
    return parse_settings(stores["jpeg"], stores["ppm"], "cpu", None, 2, True)

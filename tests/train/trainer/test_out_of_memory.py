"""Tests of out-of-memory errors of the CPU, a GPU, the driver and cuBLAS.

The message names the options with which a run needs less memory.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prep.console import UserError
from tests.helpers.small_training import small_config
from train.config.run_config import check_parts
from train.runs.run import Run
from train.trainer.loop import fit
from train.trainer.out_of_memory import out_of_memory


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def raise_untyped(message: str) -> None:
    raise RuntimeError(message)


RUN_OUT_OF_MEMORY = {
    "CPU": lambda: torch.empty(1 << 48),  # torch's allocator itself raises this error
    "GPU": raise_out_of_memory,
    "driver": lambda: raise_untyped("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cuBLAS": lambda: raise_untyped("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("fail", RUN_OUT_OF_MEMORY.values(), ids=RUN_OUT_OF_MEMORY)
@pytest.mark.parametrize(("parts", "advice"), [(1, "--accumulate 2"), (2, "--accumulate 4"), (8, "Pass --batch 4")])
def test_an_out_of_memory_error_advises_more_parts_or_a_smaller_batch(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: Any, parts: int, advice: str
) -> None:
    monkeypatch.setattr("train.trainer.step.TrainingStep.__call__", lambda *args: fail())
    with pytest.raises(UserError) as raised:
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run", accumulate=parts)))
    message = str(raised.value)
    assert "out of memory on cpu (" in message and "\n" not in message
    assert advice in message and "--batch 4" in message
    assert "--fork" not in message


def test_the_advice_to_replicas_is_a_number_that_their_parts_allow(tmp_path: Path) -> None:
    """Each of two replicas takes three of six images. Three images cannot be divided into two equal parts."""
    config = small_config(tmp_path, tmp_path / "run", batch_size=6, replicas=2)
    with pytest.raises(UserError, match=r"Pass --accumulate 3 .* or --batch 2\.$"), out_of_memory(config):
        raise_out_of_memory()
    for changes in ({"accumulate": 3}, {"batch_size": 2}):
        check_parts(replace(config, **changes))


def test_other_runtime_errors_pass_through(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("train.trainer.step.TrainingStep.__call__", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run")))

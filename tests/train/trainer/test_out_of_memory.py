"""Out-of-memory errors, and what they advise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prep.console import UserError
from tests.helpers.small_training import small_config
from train.runs.run import Run
from train.trainer.loop import fit


def raise_out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")


def raise_untyped(words: str) -> None:
    raise RuntimeError(words)


RUN_OUT = {
    "CPU": lambda: torch.empty(1 << 48),
    "GPU": raise_out_of_memory,
    "driver": lambda: raise_untyped("CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    "cuBLAS": lambda: raise_untyped("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


@pytest.mark.parametrize("run_out", RUN_OUT.values(), ids=RUN_OUT)
@pytest.mark.parametrize(("parts", "named"), [(1, "--accumulate 2"), (2, "--accumulate 4"), (8, "Give --batch 4")])
def test_a_lack_of_memory_is_said_with_what_fits(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_out: Any, parts: int, named: str
) -> None:
    """The CPU's by its allocator itself."""
    monkeypatch.setattr("train.trainer.loop.TrainingStep.__call__", lambda *of: run_out())
    with pytest.raises(UserError) as told:
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run", accumulate=parts)))
    said = str(told.value)
    assert "out of memory on cpu (" in said and named in said and "--batch 4" in said and "\n" not in said
    assert "--fork" not in said


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*of: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("train.trainer.loop.TrainingStep.__call__", fail)
    with pytest.raises(RuntimeError, match="mat1"):
        fit(Run.open(small_config(stores["ppm"], tmp_path / "run")))

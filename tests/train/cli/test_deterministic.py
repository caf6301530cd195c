"""Tests of `alextrain run --deterministic` on a CPU, and of the default precision."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.alextrain import alextrain
from tests.helpers.small_training import SMALL_ALEXNET, assert_same_result
from train.config.architecture import ARCHITECTURES
from train.model.precision import default_precision


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Replace the paper's network by a small network. After the test, allow nondeterministic algorithms again."""
    monkeypatch.setitem(ARCHITECTURES, "alexnet", SMALL_ALEXNET)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.parametrize("recipe", ["short", "released"])
def test_every_operator_of_a_training_has_a_deterministic_algorithm(
    stores: dict[str, Path], tmp_path: Path, recipe: str
) -> None:
    """With --deterministic, PyTorch raises RuntimeError for a nondeterministic operator.

    On a CPU, the option must not change a bit of the result.
    """
    words = ["run", "--store", stores["jpeg"], "--gpus", "cpu", "--recipe", recipe, "--batch", "8", "--steps", "3"]
    for name, options in (("plain", []), ("deterministic", ["--deterministic"])):
        result = alextrain(*words, "--run-dir", tmp_path / name, *options)
        assert result.exit_code == 0, result.output
        assert torch.are_deterministic_algorithms_enabled() is bool(options)
    assert_same_result(tmp_path / "plain", tmp_path / "deterministic")
    assert json.loads((tmp_path / "deterministic" / "run.json").read_text())["settings"]["deterministic"] is True


def test_a_run_may_be_resumed_with_the_option(stores: dict[str, Path], tmp_path: Path) -> None:
    words = ["run", "--store", stores["jpeg"], "--gpus", "cpu", "--recipe", "short", "--batch", "8"]
    words += ["--run-dir", tmp_path / "run"]
    assert alextrain(*words, "--steps", "1").exit_code == 0
    result = alextrain(*words, "--steps", "2", "--deterministic")
    assert result.exit_code == 0 and "resumes after step 1" in result.output


@pytest.mark.parametrize(
    ("recipe", "devices", "capability", "expected"),
    [
        ("modern", ("cuda:0", "cuda:0"), (9, 0), "bf16"),
        ("modern", ("cuda:0", "cuda:1"), (7, 5), "fp32"),
        ("modern", ("cpu", "cpu"), (9, 0), "fp32"),
        ("paper", ("cuda:0", "cuda:0"), (9, 0), "fp32"),
    ],
)
def test_modern_trains_in_bfloat16_on_gpus_that_have_it(
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    devices: tuple[str, str],
    capability: tuple[int, int],
    expected: str,
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert default_precision(recipe, devices) == expected

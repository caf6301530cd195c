"""Tests of the runs of `alextrain run` for the GPU check: rate from metrics.jsonl, kill and resume, comparison."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tools.gpu.runs as runs
from prep.console import UserError
from tools.gpu.settings import GpuCheckSettings

# `alextrain` with eight maps in each convolutional layer of the network `half`, so that a run takes only seconds.
SMALL_PROGRAM = (
    sys.executable,
    "-c",
    "from dataclasses import replace; from train.config import architecture as a; "
    "a.ARCHITECTURES['half'] = replace(a.ARCHITECTURES['half'], widths=a.Widths(8, 8, 8, 8, 8, 16, 16)); "
    "from train.cli import main; main(prog_name='alextrain')",
)


def line(step: int, rate: float, unix_time_s: float, waiting: float = 0.0, kind: str = "train") -> dict[str, Any]:
    return {
        "kind": kind,
        "step": step,
        "images_per_s": rate,
        "waiting_share": waiting,
        "unix_time_s": unix_time_s,
    }


def test_the_rate_leaves_out_intervals_that_begin_a_run_or_an_epoch() -> None:
    """The metrics have a line for every 20 steps of 100 images. An epoch has 40 steps.

    Between two epochs, a checkpoint takes 3 s.
    """
    lines = [
        line(20, 100, 0.0, 0.9),
        line(40, 1000, 2.0, 0.1),  # counted: 2,000 images in 2 s
        line(40, 0, 4.0, kind="val"),
        line(60, 4000, 5.5),
        line(80, 500, 9.5, 0.4),  # counted: 2,000 images in 4 s
    ]
    assert runs.rate_of_run(lines, 100, 40) == runs.RunRate(
        images_per_s=666.7, least=500, most=1000, intervals=2, waiting_share=0.3, outside_s=3.0
    )


def test_a_run_without_an_interval_to_count_has_no_rate() -> None:
    with pytest.raises(UserError, match="2 lines of metrics, and no interval"):
        runs.rate_of_run([line(4, 100, 0.0), line(8, 100, 1.0)], 2, 4)


def test_the_command_names_devices_batch_and_precision(settings: GpuCheckSettings, tmp_path: Path) -> None:
    command = runs.run_command(settings, tmp_path, tmp_path / "run", 2, log_every=5, deterministic=True)
    assert command[:4] == [*runs.PROGRAM, "run"] and command[1:3] == ["-m", "train"]
    assert command[4:] == [
        *("--store", str(tmp_path), "--run-dir", str(tmp_path / "run"), "--gpus", "cpu", "--precision", "fp32"),
        *("--batch", "2", "--quiet", "--model", "half", "--log-every", "5", "--deterministic"),
    ]
    gpus = SimpleNamespace(devices=("cuda:0", "cuda:1"), precisions=("fp32", "tf32", "bf16"), is_cpu_trial=False)
    command = runs.run_command(gpus, tmp_path, tmp_path / "run", 512)
    assert command[-7:] == ["--gpus", "0,1", "--precision", "bf16", "--batch", "512", "--quiet"]
    assert "--model" not in command


@pytest.mark.soak
def test_runs_from_each_store_are_measured_and_a_failure_is_a_row(
    settings: GpuCheckSettings, stores: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PROGRAM", SMALL_PROGRAM)
    (row,) = runs.run_rates(replace(settings, ppm_store=None), 60.0)
    assert (row["format"], row["batch"], row["precision"]) == ("jpeg", 2, "fp32")
    assert row["least"] <= row["images_per_s"] <= row["most"] and row["intervals"] == 7
    monkeypatch.setattr(runs, "PROGRAM", (sys.executable, "-c", "raise SystemExit('out of memory')"))
    failed, late = (runs.run_rates(settings, budget_s)[0] for budget_s in (60.0, 0.0))
    assert failed["error"] == "alextrain run: exit code 1. out of memory" and "images_per_s" not in failed
    assert late["error"] == "not measured: the time of 0 s was used up"


def test_a_run_that_does_not_end_is_killed(tmp_path: Path) -> None:
    process = runs.start([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "errors.txt")
    with pytest.raises(UserError, match="not finished after 0 s"):
        runs.finish(process, tmp_path / "errors.txt", timeout_s=0.2)
    assert process.returncode == -9


# ---- kill and resume


@pytest.mark.soak
def test_a_killed_run_is_resumed_and_equals_the_other_run(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "PROGRAM", SMALL_PROGRAM)
    monkeypatch.setattr(runs, "has_option", lambda option: False)
    (check,) = runs.resume_checks(settings)
    assert check.ok, check
    assert check.found.startswith("killed after step ") and "parameters and velocities are bit-identical" in check.found


def test_without_the_option_the_check_is_left_out_on_a_gpu(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "has_option", lambda option: False)
    gpu = GpuCheckSettings(settings.store, None, ("cuda:0", "cuda:0"), 2, True)
    (check,) = runs.resume_checks(gpu)
    assert check.ok and check.found == "left out: alextrain run has no option --deterministic"


def test_a_run_that_differs_from_the_other_run_fails(
    settings: GpuCheckSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "has_option", lambda option: True)
    monkeypatch.setattr(runs, "kill_and_resume", lambda *_: 3)
    monkeypatch.setattr(runs, "compare_runs", lambda *_: (["conv1.weight", "velocity of fc8.bias"], 32))
    (check,) = runs.resume_checks(settings)
    assert not check.ok and check.name == "run with --deterministic killed and resumed on cpu"
    assert check.found == (
        "killed after step 3 of 8; 2 of 32 parameters and velocities differ: conv1.weight, velocity of fc8.bias"
    )


def test_a_run_that_ends_before_the_kill_is_an_error(tmp_path: Path) -> None:
    finished = [sys.executable, "-c", "print('trained')"]
    with pytest.raises(UserError, match=r"ended before it was killed. trained"):
        runs.kill_and_resume(finished, finished, tmp_path / "a", tmp_path / "b", 4)


def test_checkpoints_are_compared_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(step: int, weight: float) -> SimpleNamespace:
        tensors = {"conv1.weight": torch.tensor([weight]), "conv1.bias": torch.zeros(1)}
        return SimpleNamespace(step=step, parameters=tensors, velocity=tensors)

    states = {"a": state(8, 1.0), "b": state(8, 1.0), "c": state(8, 1.0000001), "d": state(6, 1.0)}
    monkeypatch.setattr(runs.checkpoint, "load_latest", lambda folder: states[folder.name])
    assert runs.compare_runs(tmp_path / "a", tmp_path / "b", 8) == ([], 4)
    differing = ["conv1.weight", "velocity of conv1.weight"]
    assert runs.compare_runs(tmp_path / "a", tmp_path / "c", 8) == (differing, 4)
    with pytest.raises(UserError, match="newest checkpoint of step 6, expected 8"):
        runs.compare_runs(tmp_path / "a", tmp_path / "d", 8)

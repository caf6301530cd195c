"""Tests that a run that is killed and resumed has the same result, bit for bit, as a run that is not killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.project import ROOT
from tests.helpers.small_training import assert_same_result, small_config
from train.runs import checkpoint
from train.runs.ensemble_dir import member_dirs
from train.runs.run import Run
from train.trainer.loop import fit


def kill_and_resume(store: Path, run_dir: Path, seed: int, when: str, members: int | None = None) -> dict[str, Any]:
    """Kill a run up to ten times, resume the run, and compare the result with the result of an uninterrupted run.

    members  number of members of an ensemble that is trained instead of a single run; None: a single run

    Returns the JSON object that tests/helpers/kill_and_resume.py prints.
    """
    command = [sys.executable, str(ROOT / "tests/helpers/kill_and_resume.py")]
    result = subprocess.run(
        [*command, str(store), str(run_dir), str(seed), when, *([] if members is None else [str(members)])],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,  # the program forks twelve processes one after another; each may run for 120 s
        check=False,
    )
    assert result.returncode == 0, result.stderr
    uninterrupted = run_dir.with_name("uninterrupted")
    if members is None:
        assert_same_run(run_dir, uninterrupted)
    else:
        for folder, expected in zip(*(member_dirs(path, members) for path in (run_dir, uninterrupted)), strict=True):
            assert_same_run(folder, expected)
        assert sorted(os.listdir(run_dir)) == sorted(os.listdir(uninterrupted))
    return json.loads(result.stdout)


def assert_same_run(run_dir: Path, uninterrupted: Path) -> None:
    """Assert that a run that was killed has the files, metrics and state of a run that was not killed."""
    assert_same_result(run_dir, uninterrupted)
    state, expected = (checkpoint.load(folder) for folder in (run_dir, uninterrupted))
    assert torch.equal(state.random, expected.random)
    for part in ("schedule", "stream", "best", "identity"):
        assert getattr(state, part) == getattr(expected, part), part
    assert sorted(os.listdir(run_dir)) == sorted(os.listdir(uninterrupted))
    assert not list(run_dir.glob(".*.tmp"))


def test_a_run_killed_ten_times_has_the_same_result_and_leaves_no_temporary_file(
    stores: dict[str, Path], tmp_path: Path
) -> None:
    kills = kill_and_resume(stores["ppm"], tmp_path / "run", 1, "operation")
    assert kills["kills"] == 10 and len(kills["at"]) >= 3


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("when", ["operation", "time"])
def test_runs_killed_a_hundred_times_in_all_have_the_same_result(
    stores: dict[str, Path], tmp_path: Path, when: str, seed: int
) -> None:
    """Ten processes train the run one after another. If `when` is "operation", all of these processes are killed.

    If `when` is "time", a process may finish the run before the time of its kill.
    """
    kills = kill_and_resume(stores["ppm"], tmp_path / "run", seed, when)
    assert kills["kills"] == 10 if when == "operation" else 1 <= kills["kills"] <= 10


@pytest.mark.soak
@pytest.mark.parametrize(("when", "seed"), [("operation", 1), ("operation", 2), ("time", 1)])
def test_an_ensemble_killed_ten_times_has_the_same_result(
    stores: dict[str, Path], tmp_path: Path, when: str, seed: int
) -> None:
    kills = kill_and_resume(stores["ppm"], tmp_path / "ensemble", seed, when, members=2)
    assert kills["kills"] == 10 if when == "operation" else 1 <= kills["kills"] <= 10


def test_a_resumed_run_removes_a_line_of_metrics_jsonl_that_a_power_cut_has_torn(
    stores: dict[str, Path],
    uninterrupted_run: Path,
    tmp_path: Path,
) -> None:
    run_dir = fit(Run.open(small_config(stores["jpeg"], tmp_path / "run", steps=4)))
    with open(run_dir / "metrics.jsonl", "ab") as file:
        file.write(b'{"kind": "train", "ep\0\0\xc3\n\xff\xfe')
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)

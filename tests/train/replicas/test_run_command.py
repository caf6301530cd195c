"""Tests of `alextrain run` under torchrun: options, errors, stops, and processes that hang."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prep.files import hold_lock
from tests.helpers.small_training import assert_same_result
from tests.helpers.torchrun.job import Job, TorchrunServer
from tests.train.replicas.small_runs import SMALL_ALEXTRAIN
from train.runs import checkpoint
from train.runs.run_dir import newest_checkpoint

Start = Callable[..., Job]


@pytest.fixture
def start(torchrun: TorchrunServer, stores: dict[str, Path]) -> Start:
    """start(replicas, run_dir, *options) starts a run of a small network on the CPU under torchrun."""

    def run(replicas: int, run_dir: Path, *options: object) -> Job:
        words = ["run", "--gpus", "cpu", "--store", stores["ppm"], "--run-dir", run_dir, "--recipe", "short"]
        return torchrun("--nproc-per-node", replicas, SMALL_ALEXTRAIN, *words, "--batch", 8, "--log-every", 1, *options)

    return run


@pytest.mark.soak
def test_sigterm_to_one_rank_stops_all_after_one_step_with_a_checkpoint_that_resumes_to_the_same_bits(
    start: Start, tmp_path: Path
) -> None:
    job = start(2, tmp_path / "a", "--epochs", 400, "--steps", 200)
    job.wait_until(lambda: "step 3 " in job.stderr)
    os.kill(job.ranks()[1], signal.SIGTERM)
    assert job.wait() == 1 and "exitcode  : 143" in job.stderr
    newest = newest_checkpoint(tmp_path / "a")
    assert newest is not None and 3 <= newest[0] < 200
    assert [line for line in job.messages if "nterrupted" in line] == [
        "Interrupted. Run the same command again to continue from here."
    ]
    assert json.loads((tmp_path / "a" / "status.json").read_text())["state"] == "stopped"
    steps = newest[0] + 3
    assert start(2, tmp_path / "a", "--epochs", 400, "--steps", steps).wait() == 0
    assert start(2, tmp_path / "b", "--epochs", 400, "--steps", steps).wait() == 0
    assert_same_result(tmp_path / "a", tmp_path / "b")


def test_a_second_group_in_the_same_folder_is_refused_by_one_message(start: Start, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with hold_lock(tmp_path / "run", "training"):
        job = start(2, tmp_path / "run", "--steps", 2)
        assert job.wait() == 1
    assert job.messages[-1].startswith(f"Error: {tmp_path / 'run'}: another training is at work in this folder.")
    assert sum("Error" in line for line in job.messages) == 1


@pytest.mark.soak
def test_a_process_that_hangs_is_named_after_the_time_out(start: Start, tmp_path: Path) -> None:
    job = start(2, tmp_path / "run", "--epochs", 400, "--replica-timeout", 2)
    job.wait_until(lambda: "step 3 " in job.stderr)
    hanging = job.ranks()[1]
    os.kill(hanging, signal.SIGSTOP)
    job.wait_until(lambda: "Error" in job.stderr)
    os.kill(hanging, signal.SIGKILL)
    job.wait()
    (error,) = (line for line in job.messages if "Error" in line)
    assert f"Error: rank 1 of 2 (host {os.uname().nodename}, process {hanging}) did not take part" in error
    assert "in an exchange within 2 s" in error
    assert "Traceback" not in job.stderr.partition("ChildFailedError")[0].rpartition("Traceback")[0]


def test_a_nan_of_one_rank_stops_all_and_the_batch_of_the_whole_step_is_set_aside_once(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "runs.json").write_text(json.dumps([["run", {"recipe": "short", "set": ["lr=1e30"], "steps": 9}]]))
    program = Path(__file__).with_name("train_program.py")
    job = torchrun("--nproc-per-node", 2, program, stores["ppm"], tmp_path / "runs.json")
    assert job.wait() == 1
    (folder,) = (tmp_path / "run").glob("offending-step-*")
    content = json.loads((folder / "batch.json").read_text())
    assert len(content["records"]) == 8 and len({record["number"] for record in content["records"]}) == 8
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"


@pytest.mark.soak
def test_a_run_goes_on_with_another_number_of_replicas(start: Start, tmp_path: Path) -> None:
    for replicas, steps in ((2, 2), (4, 4), (1, 6)):
        job = start(replicas, tmp_path / "run", "--epochs", 5, "--steps", steps)
        assert job.wait() == 0, job.stderr
        settings = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
        assert settings["replicas"] == replicas
    assert start(2, tmp_path / "whole", "--epochs", 5, "--steps", 6).wait() == 0
    state, expected = (checkpoint.load(tmp_path / name) for name in ("run", "whole"))
    for name, tensor in expected.parameters.items():
        assert torch.allclose(state.parameters[name], tensor, atol=1e-5), name


def test_options_that_do_not_fit_the_replicas_are_refused_once(start: Start, tmp_path: Path) -> None:
    for options, expected in (
        (
            ("--batch", 9),
            "--batch 9: a step of 9 images cannot be divided equally among 2 replicas. Pass --batch 8 or",
        ),
        (("--accumulate", 3), "--accumulate 3: each of 2 replicas takes 4 images of a step, which cannot be divided"),
        (("--gpus", "0,1"), "--gpus 0,1: torchrun has started 2 processes on this machine"),
    ):
        job = start(2, tmp_path / "run", *options)
        assert job.wait() == 1 and "exitcode  : 2" in job.stderr
        assert len(job.messages) == 1 and job.messages[0].startswith(f"Error: {expected}"), job.messages

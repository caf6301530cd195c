"""Tests that kills change no bit of the result of a training in several processes.

After the kill of one process, torchrun restarts all processes.
"""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.small_training import assert_same_result
from tests.helpers.torchrun.job import Job, TorchrunServer
from tests.train.replicas.small_runs import start_training
from train.runs import checkpoint


def assert_same_run(run_dir: Path, undisturbed_pair: Path) -> None:
    """Assert that two runs have the same result and the same files, and that no temporary file is left."""
    assert_same_result(run_dir, undisturbed_pair)
    state, expected = (checkpoint.load(folder) for folder in (run_dir, undisturbed_pair))
    for part in ("schedule", "stream", "best", "identity"):
        assert getattr(state, part) == getattr(expected, part), part
    assert sorted(os.listdir(run_dir)) == sorted(os.listdir(undisturbed_pair))


def kill_at_operations(torchrun: TorchrunServer, store: Path, run_dir: Path, seed: int) -> list[str]:
    """Train with ten kills of random ranks, each before a file operation, an exchange or a step.

    Returns a line for each kill.
    """
    job = start_training(torchrun, 2, store, run_dir, fault=f"kill {seed}", max_restarts=10)
    assert job.wait(280) == 0, job.stderr
    return Path(f"{run_dir}.kills").read_text().splitlines()


def test_a_run_killed_ten_times_goes_on_and_has_the_same_result(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path
) -> None:
    kills = kill_at_operations(torchrun, stores["ppm"], tmp_path / "run", 1)
    attempts, ranks, operations = zip(*(kill.split() for kill in kills), strict=True)
    assert len(set(attempts)) == 10 and set(ranks) == {"0", "1"} and {"exchange", "step"} < set(operations)
    assert_same_run(tmp_path / "run", undisturbed_pair)


def kill_at_times(job: Job, generator: random.Random, run_s: float, kills: int) -> int:
    """Kill a random rank of the job `kills` times. Each kill follows the start of the processes after a random time.

    run_s  time that a run without kills takes, in seconds

    Returns the number of kills, which is smaller than `kills` if the run ends early.
    """
    killed: set[int] = set()
    for done in range(kills):
        while not (ranks := [pid for pid in job.ranks() if pid not in killed]):
            if job.exit_code is not None:
                return done
            time.sleep(0.002)
        time.sleep(generator.uniform(0, run_s / 2))
        with suppress(ProcessLookupError):
            os.kill(generator.choice(ranks), signal.SIGKILL)
        killed.update(ranks)
    return kills


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 7))
def test_runs_killed_fifty_times_at_operations_have_the_same_result(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path, seed: int
) -> None:
    assert len(kill_at_operations(torchrun, stores["ppm"], tmp_path / "run", seed)) == 10
    assert_same_run(tmp_path / "run", undisturbed_pair)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(5))
def test_runs_killed_fifty_times_at_any_time_have_the_same_result(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path, seed: int
) -> None:
    """The training is repeated until there were ten kills in all. After each kill, torchrun restarts the ranks."""
    generator, kills, attempts = random.Random(seed), 0, 0
    started = time.monotonic()
    assert start_training(torchrun, 2, stores["ppm"], tmp_path / "first").wait() == 0
    run_s = time.monotonic() - started
    while kills < 10:
        run_dir = tmp_path / f"run-{attempts}"
        job = start_training(torchrun, 2, stores["ppm"], run_dir, max_restarts=20)
        kills += kill_at_times(job, generator, run_s, 10 - kills)
        assert job.wait(280) == 0, job.stderr
        assert_same_run(run_dir, undisturbed_pair)
        attempts += 1

"""Tests of a training in several processes of torchrun. One of the processes fails, hangs or is stopped.

test_kills.py has the tests in which processes are killed.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from pipeline.sampling import epoch_permutation
from tests.helpers.damaged_stores import read_records, replace_records
from tests.helpers.small_training import assert_same_result
from tests.helpers.torchrun.job import TorchrunServer
from tests.train.replicas.small_runs import start_training, steps_logged
from train.runs.checkpoint import checkpoint_paths
from train.runs.run_dir import read_metrics


def checkpoint_steps(run_dir: Path) -> list[int]:
    return [int(path.stem[-8:]) for path in checkpoint_paths(run_dir)]


def resume(torchrun: TorchrunServer, store: Path, run_dir: Path, undisturbed_pair: Path) -> None:
    """Finish the run in two processes, and assert that the result is that of a run without a fault."""
    job = start_training(torchrun, 2, store, run_dir)
    assert job.wait() == 0, job.stderr
    assert_same_result(run_dir, undisturbed_pair)


def test_sigterm_to_torchrun_ends_all_ranks_after_one_step_with_one_checkpoint(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path
) -> None:
    """The test of SIGTERM to a single rank is in tests/train/replicas/test_run_command.py."""
    run_dir = tmp_path / "run"
    job = start_training(torchrun, 2, stores["ppm"], run_dir, "--checkpoint-every", 100, fault="stop-all 0 5")
    assert job.wait() == 1  # exit code of torchrun
    assert job.rank_exit_codes == {0: [143], 1: [143]}, job.stderr
    assert read_metrics(run_dir)[-1]["step"] == 5 and checkpoint_steps(run_dir) == [3, 5]
    stops = [line for line in job.messages if not line.startswith(("epoch", "alexnet, ", "recipe "))]
    assert stops == [
        "Stopping after this step, with a checkpoint.",
        "Interrupted. Run the same command again to continue from here.",
    ]
    resume(torchrun, stores["ppm"], run_dir, undisturbed_pair)


def test_torchrun_restarts_a_run_after_a_signal_to_one_rank(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path
) -> None:
    job = start_training(torchrun, 2, stores["ppm"], tmp_path / "run", fault="SIGTERM 1 5", max_restarts=1)
    assert job.wait() == 0 and job.rank_exit_codes == {0: [143, 0], 1: [143, 0]}, job.stderr
    assert_same_result(tmp_path / "run", undisturbed_pair)


@pytest.mark.soak
def test_rank_0_that_hangs_is_named_after_the_time_out(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path
) -> None:
    """The same test with rank 1 instead of rank 0 is in tests/train/replicas/test_run_command.py."""
    job = start_training(torchrun, 2, stores["ppm"], tmp_path / "run", "--replica-timeout", 3, fault="SIGSTOP 0 5")
    job.wait_until(lambda: "Error: " in job.stderr)
    job.wait_until(lambda: len(job.ranks()) == 1)
    (pid,) = job.ranks()
    os.kill(pid, signal.SIGKILL)  # without this kill, torchrun would kill the rank 30 s later
    assert job.wait() == 1
    (error,) = [line for line in job.messages if line.startswith("Error: ")]
    assert re.search(rf"rank 0 of 2 \(host .*, process {pid}\) did not take part in an exchange within 3 s", error)
    assert error in job.stderr.rpartition("Root Cause")[2]
    resume(torchrun, stores["ppm"], tmp_path / "run", undisturbed_pair)


def test_a_second_group_on_the_run_folder_is_refused_and_the_first_trains_on(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = start_training(torchrun, 2, stores["ppm"], run_dir, "--epochs", 1000)
    first.wait_until(lambda: steps_logged(run_dir) > 2)
    second = start_training(torchrun, 2, stores["ppm"], run_dir, "--epochs", 1000)
    assert second.wait() == 1 and second.rank_exit_codes == {0: [1], 1: [1]}
    errors = [line for line in second.messages if line.startswith("Error: ")]
    assert len(errors) == 1 and f"{run_dir}: another training is at work in this folder." in errors[0]
    steps = steps_logged(run_dir)
    first.wait_until(lambda: steps_logged(run_dir) > steps + 2)
    first.kill()


def test_the_full_disk_of_rank_0_ends_all_ranks_with_one_message(
    torchrun: TorchrunServer, stores: dict[str, Path], undisturbed_pair: Path, tmp_path: Path
) -> None:
    job = start_training(torchrun, 2, stores["ppm"], tmp_path / "run", fault="full-disk 0 3")
    assert job.wait() == 1 and job.rank_exit_codes == {0: [3], 1: [3]}, job.stderr
    others = [line for line in job.messages if not line.startswith(("epoch", "alexnet, ", "recipe "))]
    assert [line[:9] for line in others] == ["Warning: ", "Warning: ", "Error: /t"], others
    assert "cannot be written (File too large)" in others[2]
    assert checkpoint_steps(tmp_path / "run") == [2]
    resume(torchrun, stores["ppm"], tmp_path / "run", undisturbed_pair)


def test_a_damaged_record_in_the_part_of_one_rank_stops_all_with_the_error_of_the_record(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(stores["ppm"], tmp_path / "store"))
    (shard,) = (damaged / "train").glob("[0-9]*")
    # The damaged record is an image of the third step of epoch 0. In this step, rank 1 of 2 has images 4 to 7.
    number = int(epoch_permutation(30, 3, 0)[2 * 8 + 5])
    records = read_records(shard)
    records[number] = records[number][0], records[number][1][:300]
    replace_records(shard, records)
    job = start_training(torchrun, 2, damaged, tmp_path / "run")
    assert job.wait() == 1
    errors = [line for line in job.messages if line.startswith("Error: ")]
    assert len(errors) == 1 and errors[0].startswith("Error: rank 1 of 2: ") and f"key {number:08d}" in errors[0]
    assert "Interrupted" not in job.stderr


def test_a_fault_of_the_program_in_one_rank_prints_one_traceback(
    torchrun: TorchrunServer, stores: dict[str, Path], tmp_path: Path
) -> None:
    job = start_training(torchrun, 2, stores["ppm"], tmp_path / "run", fault="error 1 4")
    assert job.wait() == 1
    assert job.stderr.count("RuntimeError: a fault of the program") == 1
    assert "Interrupted" not in job.stderr and "Error: " not in "\n".join(job.messages)


def test_errors_of_all_ranks_are_printed_once(torchrun: TorchrunServer, store: Path, tmp_path: Path) -> None:
    for options, code, text in (
        (("--store", "/nowhere"), 1, "/nowhere"),
        (("--recipe", "shrot"), 2, "Did you mean short"),
        (("--set", "lr=fast"), 2, "fast"),
    ):
        job = start_training(torchrun, 2, store, tmp_path / "run", *options)
        assert job.wait() == 1 and job.rank_exit_codes[0] == [code], job.stderr
        (error,) = [line for line in job.messages if line.startswith("Error: ")]
        assert text in error and error in job.stderr.rpartition("Root Cause")[2]
    assert not (tmp_path / "run").exists()

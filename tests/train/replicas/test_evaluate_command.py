"""Tests of `alextrain evaluate` under torchrun, and of commands that refuse to run under torchrun."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import click
import numpy as np
import pytest

from prep.console import Terminated
from tests.helpers.alextrain import alextrain, json_lines
from tests.helpers.damaged_stores import read_records, replace_records
from tests.helpers.torchrun.job import TorchrunServer
from tests.train.replicas.ranks import run_ranks
from train.cli.evaluate import check_same_inputs
from train.cli.group import FOR_REPLICAS, main
from train.evaluation.predictions import load_predictions, read_evaluations
from train.replicas.errors import OtherReplicaFailed
from train.replicas.group import ReplicaGroup


@pytest.mark.parametrize("views", [pytest.param("10", marks=pytest.mark.soak), "dense"])
def test_three_processes_give_the_result_and_the_scores_of_one(
    torchrun: TorchrunServer, trained_run: Path, store: Path, tmp_path: Path, views: str
) -> None:
    words = ("evaluate", trained_run, "--store", store, "--views", views, "--gpus", "cpu")
    (alone,) = json_lines(*words, "--out", tmp_path / "alone.npz")
    job = torchrun("--nproc-per-node", 3, "-m", "train", *words, "--out", tmp_path / "three.npz", "--json")
    assert job.wait() == 0, job.stderr
    (together,) = [json.loads(line) for line in job.stdout.splitlines()]
    counts = ("images", "top1_misses", "top5_misses", "top1_error", "top5_error")
    assert [together[key] for key in counts] == [alone[key] for key in counts]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert job.messages == [f"Saved: {tmp_path / 'three.npz'}"]
    expected, scores = (load_predictions(tmp_path / f"{name}.npz") for name in ("alone", "three"))
    assert scores.about == expected.about
    np.testing.assert_array_equal(scores.keys, expected.keys)
    np.testing.assert_array_equal(scores.labels, expected.labels)
    np.testing.assert_allclose(scores.probabilities, expected.probabilities, rtol=1e-5)
    assert len((trained_run / "evaluations.jsonl").read_text().splitlines()) == 2
    assert len(read_evaluations(trained_run)) == 1


def test_an_error_of_every_process_is_printed_once(torchrun: TorchrunServer, trained_run: Path, store: Path) -> None:
    for words, code in (
        (("evaluate", trained_run, "--store", "/nowhere"), 1),
        (("evaluate", trained_run, "--store", store, "--out", "x.npy"), 2),
        (("evaluate", trained_run, "--views", "7"), 2),
    ):
        expected = alextrain(*words)
        assert expected.exit_code == code
        job = torchrun("--nproc-per-node", 2, "-m", "train", *words)
        assert job.wait() == 1  # exit code of torchrun
        assert job.messages == re.sub(r"\bmain evaluate", "alextrain evaluate", expected.stderr).splitlines()
        report = job.stderr.rpartition("Root Cause")[2]
        assert expected.stderr.splitlines()[-1] in report and f"exitcode  : {code}" in report


def test_a_damaged_record_in_the_part_of_one_process_stops_all_with_the_error_of_the_record(
    torchrun: TorchrunServer, trained_run: Path, store: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(store, tmp_path / "store"))
    (shard,) = (damaged / "val").glob("[0-9]*")
    records = read_records(shard)
    key, value = records[7]  # rank 1 of 2 evaluates the records 6 to 11
    records[7] = key, value[:300]
    replace_records(shard, records)
    words = ("evaluate", trained_run, "--store", damaged, "--gpus", "cpu")
    expected = alextrain(*words)
    assert expected.exit_code == 1 and "00000007" in expected.stderr
    job = torchrun("--nproc-per-node", 2, "-m", "train", *words, "--json")
    assert job.wait() == 1 and job.stdout == ""
    assert job.messages == [expected.stderr.strip().replace("Error: ", "Error: rank 1 of 2: ")]
    assert job.messages[0] in job.stderr.rpartition("Root Cause")[2]
    assert read_evaluations(trained_run) == []


def test_processes_with_different_checkpoints_or_splits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(group: ReplicaGroup) -> None:
        with group.together():
            check_same_inputs(group, {"checkpoint": "abc", "split val": "d" if group.rank < 2 else "e"})

    error, *others = run_ranks(monkeypatch, 3, work)
    assert "rank 2 of 3 has read another split val than rank 0 (digest e, rank 0: d)" in str(error)
    assert all(isinstance(other, OtherReplicaFailed) for other in others)


def test_other_commands_refuse_to_start_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def terminated_by_torchrun(seconds: float) -> None:
        raise Terminated

    monkeypatch.setattr("train.replicas.torchrun._has_joined", False)
    monkeypatch.setattr("train.replicas.torchrun.time.sleep", terminated_by_torchrun)
    refused = set(main.commands) - set(FOR_REPLICAS)
    assert {"predict", "features", "search", "export", "report", "status", "import"} <= refused
    for rank, command in itertools.product(range(2), refused):
        for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": "4"}.items():
            monkeypatch.setenv(name, value)
        result = alextrain(command, "x", "--unknown")
        assert result.exit_code == 2 and result.stdout == "", result.output
        expected = (
            f"Error: alextrain {command} runs in one process, but torchrun has started 4. Start this command without"
        )
        assert result.stderr.startswith(expected) if rank == 0 else result.stderr == ""
        assert result.stderr.count("\n") == (rank == 0)
        assert alextrain(command, "--help").exit_code == 0
    monkeypatch.setattr("train.replicas.torchrun.time.sleep", lambda seconds: None)
    assert "runs in one process" in alextrain("status", "x").stderr  # rank 0 has not failed, so rank 1 prints the error
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert "no such run" in alextrain("status", "/nowhere").stderr


def test_a_rank_that_ends_because_of_another_rank_does_not_say_that_it_was_interrupted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After the error of another rank, torchrun may send SIGTERM to rank 0 while rank 0 leaves the group."""
    context = click.Context(main, info_name="alextrain")
    for kind, expected in (("StoreError", ""), ("Terminated", "Interrupted.")):
        try:
            try:
                raise OtherReplicaFailed("the record is damaged", 1, kind)
            finally:
                raise Terminated
        except Terminated:
            main.say_interrupted(context)
        assert capsys.readouterr().err.startswith(expected) and bool(expected) == (kind == "Terminated")


def test_a_refused_command_prints_one_line(torchrun: TorchrunServer, trained_run: Path) -> None:
    job = torchrun("--nproc-per-node", 2, "-m", "train", "report", trained_run)
    assert job.wait() == 1 and len(job.messages) == 1 and "exitcode  : 2" in job.stderr
    assert job.messages[0].startswith("Error: alextrain report runs in one process, but torchrun has started 2.")

"""Tests of replicas that were started with different commands or stores, and of errors that all replicas have."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from prep.console import UserError, WrongArgument
from tests.helpers.small_training import small_config
from tests.train.replicas.ranks import run_ranks
from train.cli import main
from train.cli.replicas import check_same_run
from train.replicas.errors import OtherReplicaFailed
from train.replicas.group import ReplicaGroup
from train.runs.run import Run
from train.trainer.fork import fork


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e300", "0"])
def test_a_time_out_that_is_no_length_of_time_is_refused(seconds: str) -> None:
    result = CliRunner().invoke(main, ["run", "--replica-timeout", seconds])
    assert result.exit_code == 2 and "Invalid value for '--replica-timeout': " in result.stderr


@pytest.mark.parametrize(
    ("of_rank_0", "of_rank_1", "message"),
    [
        ({"stream_seed": 5}, {}, "stream_seed is 3 here, and 5 on rank 0"),
        ({}, {"stream_seed": 5}, "stream_seed is 5 here, and 3 on rank 0"),
        ({"epochs": 4}, {}, "epochs is 3 here, and 4 on rank 0"),
        ({"fork": True}, {}, "fork is False here, and True on rank 0"),
        ({}, {"dry_run": True}, "dry_run is True here, and False on rank 0"),
    ],
)
def test_settings_that_differ_between_replicas_are_named(
    stores: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_rank_0: dict[str, Any],
    of_rank_1: dict[str, Any],
    message: str,
) -> None:
    def work(group: ReplicaGroup) -> None:
        changes = {"fork": False, "dry_run": False, **(of_rank_1 if group.rank else of_rank_0)}
        flags = {name: changes.pop(name) for name in ("fork", "dry_run")}
        check_same_run(group, Run.open(small_config(stores["ppm"], tmp_path, **changes)), **flags)

    quiet, printed = run_ranks(monkeypatch, 2, work)
    assert isinstance(quiet, OtherReplicaFailed)
    assert isinstance(printed, UserError) and f"rank 1 of 2: {message}. Start all replicas" in str(printed)


def test_a_store_without_the_split_val_on_one_machine_is_refused(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the run began without this error, rank 0 would wait for the other rank in the first validation."""
    run = Run.open(small_config(stores["ppm"], tmp_path))
    splits = {name: split for name, split in run.store.splits.items() if name != "val"}
    runs = [run, replace(run, store=replace(run.store, splits=splits))]
    _, printed = run_ranks(monkeypatch, 2, lambda group: check_same_run(group, runs[group.rank]))
    assert isinstance(printed, UserError) and "split val is None here, and " in str(printed)
    assert run_ranks(monkeypatch, 2, lambda group: check_same_run(group, run)) == [None, None]


def test_a_fork_into_the_folder_of_the_run_is_refused_by_rank_0_only(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.open(small_config(stores["ppm"], tmp_path / "run"))
    printed, quiet = run_ranks(monkeypatch, 2, lambda group: fork(run, run.run_dir, group))
    assert isinstance(printed, WrongArgument) and "that is --run-dir itself" in str(printed)
    assert isinstance(quiet, OtherReplicaFailed) and quiet.code == 2

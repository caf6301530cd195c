"""Tests of checkpoint files: writing, verification, removal of old files, repair after a kill, and refused files."""

from __future__ import annotations

import hashlib
import os
import pickle
import random
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prep.console import DiskFull, UserError
from tests.helpers.small_training import (
    SMALL_ALEXNET,
    assert_same_result,
    metrics_without_clock,
    small_config,
    tiny_checkpoint,
)
from train.runs import checkpoint
from train.runs.checkpoint import BEST, Checkpoint, UnreadableCheckpoint, checkpoint_paths, read
from train.runs.loading import load_trained
from train.runs.run import Run
from train.trainer.loop import fit


def steps_of(run_dir: Path) -> list[int]:
    """Return the steps of the checkpoints in a run folder, from their file names."""
    return [int(path.stem.removeprefix("checkpoint-")) for path in checkpoint_paths(run_dir)]


# ---------------------------------------------------------------- format and verification


def test_a_checkpoint_is_a_zip_whose_comment_is_the_sha256_of_the_bytes_before_it(uninterrupted_run: Path) -> None:
    """The test checks the file with zipfile and hashlib, and then reads it with torch.load and weights_only."""
    path = checkpoint_paths(uninterrupted_run)[-1]
    with zipfile.ZipFile(path) as archive:
        comment = archive.comment
        assert archive.testzip() is None
    data = path.read_bytes()
    assert comment == b"sha256:" + hashlib.sha256(data[: -len(comment)]).hexdigest().encode()
    state = torch.load(path, weights_only=True)
    assert {"parameters", "velocity", "schedule", "random", "stream", "recipe", "model", "classes"} <= set(state)
    assert state["environment"]["torch"] == torch.__version__ and state["recipe"]["sources"]["lr"]
    assert state["identity"]["store_fingerprint"]


def test_every_flipped_bit_and_every_cut_is_detected(uninterrupted_run: Path, tmp_path: Path) -> None:
    """The test flips bits of the header, the tensors, the padding, the zip directory and the digest."""
    intact = checkpoint_paths(uninterrupted_run)[-1].read_bytes()
    path, rng = tmp_path / "checkpoint-00000001.pt", random.Random(0)
    offsets = [*range(40), *range(len(intact) - 160, len(intact)), *rng.sample(range(len(intact)), 300)]
    for offset in offsets:
        altered = bytearray(intact)
        altered[offset] ^= 1 << rng.randrange(8)
        path.write_bytes(altered)
        with pytest.raises(UnreadableCheckpoint, match=r"00000001\.pt: incomplete, altered"):
            read(path)
    for length in (0, 1, 70, 71, len(intact) // 2, len(intact) - 71, len(intact) - 1):
        path.write_bytes(intact[:length])
        with pytest.raises(UnreadableCheckpoint):
            read(path)
    path.write_bytes(intact)
    assert read(path).step == 9
    path.write_bytes(intact + b"\0")
    with pytest.raises(UnreadableCheckpoint):
        read(path)


def test_loading_a_checkpoint_executes_no_code(tmp_path: Path) -> None:
    """The pickle of the test creates a folder if it is executed. torch.load with weights_only refuses this pickle.

    A checkpoint with this pickle counts as unreadable.
    """

    class MakesFolder:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "checkpoint-00000001.pt").write_bytes(pickle.dumps(MakesFolder()))
    with pytest.raises(UserError, match="none of its 1 checkpoints"):
        checkpoint.load_latest(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_an_earlier_format_is_refused_by_its_format_number(tmp_path: Path) -> None:
    torch.save({"format": 1, "step": 1}, tmp_path / "checkpoint-00000001.pt")
    with pytest.raises(UserError, match="checkpoint format 1, this program reads 2"):
        checkpoint.load_latest(tmp_path)


# ---------------------------------------------------------------- incomplete and altered files in a run folder


def test_a_run_names_an_altered_newest_checkpoint_and_resumes_from_the_previous_one(
    stores: dict[str, Path],
    uninterrupted_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted_run, run_dir)
    newest = checkpoint_paths(run_dir)[-1]
    altered = bytearray(newest.read_bytes())
    altered[len(altered) // 2] ^= 1
    newest.write_bytes(altered)
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    messages = capsys.readouterr().err
    assert f"{newest}: incomplete, altered" in messages and "resumes after step 8" in messages
    assert_same_result(run_dir, uninterrupted_run)


def test_a_torn_newest_checkpoint_is_skipped_by_inference_and_by_training(
    stores: dict[str, Path], uninterrupted_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    before, newest = checkpoint_paths(run_dir)
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    _, state = load_trained(run_dir, ("cpu", "cpu"))
    assert f"{state.step:08d}" in before.name and "torn" in capsys.readouterr().err
    fit(Run.open(small_config(stores["jpeg"], run_dir)))
    assert_same_result(run_dir, uninterrupted_run)


def test_torn_checkpoints_are_not_counted_among_those_to_keep(stores: dict[str, Path], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    fit(Run.open(small_config(stores["jpeg"], run_dir, steps=2)))
    for step in (5, 6):
        (run_dir / f"checkpoint-{step:08d}.pt").write_bytes(b"torn")
    fit(Run.open(small_config(stores["jpeg"], run_dir, steps=4)))
    state = checkpoint.load_latest(run_dir)
    assert state is not None and state.step == 4
    assert steps_of(run_dir) == [3, 4]


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        ("digests", PermissionError(13, "Permission denied"), r"00000002\.pt: cannot be read \(Permission denied\)"),
        ("torch.load", RuntimeError("can't allocate memory"), "can't allocate memory"),
    ],
)
def test_an_intact_checkpoint_with_a_temporary_read_error_does_not_count_as_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, error: Exception, message: str
) -> None:
    """Runs remove unreadable checkpoints. After a temporary read error, a run must not remove an intact checkpoint."""

    def fail(*args: object, **options: object) -> None:
        raise error

    for step in (1, 2):
        checkpoint.write(tmp_path, tiny_checkpoint(step))
    monkeypatch.setattr(f"train.runs.checkpoint.{function}", fail)
    with pytest.raises((UserError, RuntimeError), match=message) as raised:
        checkpoint.load_latest(tmp_path)
    assert not isinstance(raised.value, UnreadableCheckpoint)


def test_a_checkpoint_removed_by_a_running_training_before_it_is_read_does_not_count_as_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keeper = checkpoint.CheckpointKeeper(tmp_path, 1, None)
    keeper.save(tiny_checkpoint(1), is_last=False)

    def read_late(path: Path) -> Checkpoint:
        if path.name.endswith("1.pt"):
            keeper.save(tiny_checkpoint(2), is_last=False)
        return read(path)

    monkeypatch.setattr(checkpoint, "read", read_late)
    assert checkpoint.load(tmp_path).step == 2 and capsys.readouterr().err == ""


def test_a_checkpoint_whose_step_differs_from_its_file_name_is_refused_and_other_files_stay(tmp_path: Path) -> None:
    paths = [checkpoint.write(tmp_path, tiny_checkpoint(step)) for step in (3, 4)]
    for name in ("checkpoint-mine.pt", "checkpoint-00000004 (copy).pt"):
        shutil.copy(paths[0], tmp_path / name)
    assert checkpoint_paths(tmp_path) == paths and checkpoint.load(tmp_path).step == 4
    (tmp_path / "checkpoint-00000005.pt").symlink_to("nowhere")
    assert checkpoint.load(tmp_path).step == 4
    shutil.copy(paths[0], tmp_path / "checkpoint-00000009.pt")
    with pytest.raises(
        UserError, match=r"00000009\.pt: holds step 3\. Rename the file to checkpoint-00000003\.pt, or move it away"
    ):
        checkpoint.load(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6


# ---------------------------------------------------------------- which checkpoints are kept


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_checkpoints_and_the_best_are_kept(stores: dict[str, Path], tmp_path: Path, keep: int) -> None:
    run_dir = fit(Run.open(small_config(stores["ppm"], tmp_path / "run", keep=keep, epochs=4)))
    assert steps_of(run_dir) == [9, 10, 12][-keep:]
    errors = {line["step"]: line["top1_error"] for line in metrics_without_clock(run_dir) if line["kind"] == "val"}
    best = min(errors, key=errors.__getitem__)  # of several checkpoints with equal errors, min returns the first
    for state in (checkpoint.load(run_dir, "best"), load_trained(run_dir, ("cpu", "cpu"), "best").checkpoint):
        assert state.step == best
    assert checkpoint.load(run_dir).best == {"step": best, "top1_error": errors[best]}
    assert checkpoint.load(run_dir, str(run_dir / BEST)).step == best
    assert checkpoint.load(run_dir, "checkpoint-00000012.pt").step == 12
    (run_dir / "run.json").unlink()
    network, state = load_trained(run_dir / BEST, ("cpu", "cpu"))  # best.pt can be loaded without any other file
    assert network.architecture == SMALL_ALEXNET and state.step == best and len(state.classes) == 3


def test_best_is_the_checkpoint_with_the_lowest_error_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    keeper = checkpoint.CheckpointKeeper(tmp_path, 1, None)
    with pytest.raises(UserError, match="no checkpoint of the run has been validated"):
        checkpoint.load(tmp_path, "best")
    for step, error in ((1, 0.5), (2, 0.7), (3, 0.4), (4, 0.4), (5, 0.9)):
        keeper.save(tiny_checkpoint(step), is_last=False)
        keeper.record_validation(step, error)
    assert checkpoint.load(tmp_path, "best").step == 3
    assert steps_of(tmp_path) == [5]
    keeper.record_validation(5, 0.1)
    keeper.save(tiny_checkpoint(5, steps_per_epoch=77), is_last=True)
    assert checkpoint.load(tmp_path, "best").steps_per_epoch == 77
    with pytest.raises(UserError, match=r"--checkpoint other: no such file"):
        checkpoint.load(tmp_path, "other")


def test_best_is_kept_on_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    keeper = checkpoint.CheckpointKeeper(tmp_path, 1, None)
    keeper.save(tiny_checkpoint(1), is_last=False)
    keeper.record_validation(1, 0.5)
    assert checkpoint.load(tmp_path, "best").step == 1


def test_the_next_start_finishes_the_updates_that_a_kill_after_the_last_checkpoint_prevented(tmp_path: Path) -> None:
    """The next start repairs best.pt and removes surplus checkpoints, even if the run saves no further checkpoint."""
    keeper = checkpoint.CheckpointKeeper(tmp_path, 3, None)
    for step in (1, 2, 3):
        keeper.save(tiny_checkpoint(step), is_last=False)
    (tmp_path / BEST).write_bytes(b"an older one")
    (tmp_path / ".run.json.77.tmp").write_text("{")
    last = tiny_checkpoint(3, best={"step": 3, "top1_error": 0.5})
    checkpoint.CheckpointKeeper(tmp_path, 2, last)
    assert steps_of(tmp_path) == [2, 3] and not list(tmp_path.glob(".*"))
    assert checkpoint.load(tmp_path, "best").step == 3
    checkpoint.CheckpointKeeper(tmp_path, 2, replace(last, best={"step": 2, "top1_error": 0.5}))
    assert checkpoint.load(tmp_path, "best").step == 3


# ---------------------------------------------------------------- order of writes, full disks


def test_metrics_are_synced_before_a_checkpoint_and_both_before_the_previous_checkpoint_is_removed(
    stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment, the disk has a checkpoint, and metrics.jsonl with all lines up to this checkpoint.

    A power cut can therefore never leave a run without a usable checkpoint.
    """
    operations: list[str] = []

    def recorded(function: str, real: Any) -> Any:
        def call(first: Any, *rest: Any) -> Any:
            target = os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else (rest or (first,))[-1]
            operations.append(f"{function} {os.path.basename(target)}")
            return real(first, *rest)

        return call

    for function in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, function, recorded(function, getattr(os, function)))
    run_dir = fit(Run.open(small_config(stores["ppm"], tmp_path / "run", steps=2, checkpoint_every=1, keep=1)))
    monkeypatch.undo()
    first, second = "checkpoint-00000001.pt", "checkpoint-00000002.pt"
    expected = [
        "fsync metrics.jsonl",
        f"fsync .{second}.tmp",
        f"replace {second}",
        f"fsync {run_dir.name}",
        f"unlink {first}",
    ]
    relevant = [operation for operation in operations if operation in expected]
    start = len(relevant) - 1 - relevant[::-1].index(expected[0])
    assert relevant[start : start + len(expected)] == expected


def test_three_failures_in_a_row_are_an_error_and_no_checkpoint_is_written_without_its_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise DiskFull("metrics.jsonl: cannot be written.")

    keeper = checkpoint.CheckpointKeeper(tmp_path, 2, None)
    for step in (1, 2, 4, 5):
        keeper.save(tiny_checkpoint(step), is_last=False, before=fail)
        if step == 2:
            keeper.save(tiny_checkpoint(3), is_last=False)
    assert steps_of(tmp_path) == [3]
    assert capsys.readouterr().err.count("Warning: metrics.jsonl") == 4
    with pytest.raises(DiskFull):
        keeper.save(tiny_checkpoint(6), is_last=False, before=fail)

"""`alextrain status` on folders in every state; one that is being written is in tests/train/monitor/test_metrics_log.py."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import train.cli
from prep.files import hold_lock, lock_is_held
from tests.train.monitor.test_metrics_log import line
from train.runs.run_dir import read_metrics
from train.runs.status import status_lines, status_of

RUN = {
    "identity": {"model": "alexnet", "recipe": "short"},
    "settings": {"batch_size": 8, "epochs": 10},
    "model": {"name": "alexnet"},
    "recipe": {"name": "short"},
    "length": {"steps_per_epoch": 10, "steps": 100},
    "store": {},
    "classes": ["a", "b"],
}


def validation(epoch: int, error: float) -> dict:
    read = {"top1_error": error, "top5_error": error / 2, "loss": 2.0, "images": 12}
    return {"kind": "val", "epoch": epoch, "step": 10 * epoch, **read, "unix_time_s": time.time() - 60}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was killed after step 34, in the middle of writing its line."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(RUN))
    lines = [validation(1, 0.75), validation(2, 0.5), validation(3, 0.625), line(33), {**line(34), "unix_time_s": 1e9}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(told) + "\n" for told in lines) + '{"kind": "tra')
    said = {"state": "training", "said": "", "step": 30, "process": 77, "host": "far", "unix_time_s": 1.0}
    (folder / "status.json").write_text(json.dumps(said))
    for step in (20, 30):
        (folder / f"checkpoint-{step:08d}.pt").write_bytes(b"")
    (folder / ".checkpoint-00000040.pt.tmp").write_bytes(b"")
    os.utime(folder / "checkpoint-00000030.pt", (time.time() - 90, time.time() - 90))
    return folder


def test_a_dead_run(run_dir: Path) -> None:
    status = status_of(run_dir)
    assert (status["state"], status["alive"], status["finished"]) == ("dead", False, False)
    assert (status["step"], status["steps"], status["epoch"], status["epochs"]) == (34, 100, 3.4, 10)
    assert status["seconds_left"] == pytest.approx(66 * 8 / 16)
    assert status["train"]["step"] == 34 and status["val"]["epoch"] == 3 and status["best"]["epoch"] == 2
    assert status["checkpoint"]["step"] == 30 and 90 <= status["checkpoint"]["seconds_since"] < 150
    assert status["seconds_since"] == pytest.approx(time.time() - 1e9, abs=60)
    text = "\n".join(status_lines(status))
    assert "run: crashed" in text and "step 34 of 100, epoch 3.40 of 10; 33 s left to train" in text
    assert "checkpoint of step 30, 1 min 3" in text and "The same alextrain run resumes after step 30." in text
    assert "best top-1 50.0% at epoch 2" in text and "(process" not in text


def test_a_run_that_another_process_trains(run_dir: Path) -> None:
    with hold_lock(run_dir, "training"):
        status = status_of(run_dir)
    assert (status["state"], status["alive"]) == ("training", True)
    first, _, where, *rest = status_lines(status)
    assert first.endswith("training (process 77 on far)") and where.endswith("33 s left")
    assert not any("The same alextrain" in text for text in rest)


@pytest.mark.parametrize(
    ("state", "said", "told"),
    [
        ("finished", "", "run: finished"),
        ("stopped", "by SIGTERM", "run: stopped by SIGTERM"),
        ("failed", "the loss is nan", "run: failed: the loss is nan"),
    ],
)
def test_a_run_that_ended(run_dir: Path, state: str, said: str, told: str) -> None:
    ended = {"state": state, "said": said, "step": 34, "process": 77, "host": "far", "unix_time_s": 1.0}
    (run_dir / "status.json").write_text(json.dumps(ended))
    status = status_of(run_dir)
    assert (status["state"], status["finished"], status["alive"]) == (state, state == "finished", False)
    lines = status_lines(status)
    assert lines[0].endswith(told) and lines[-1].startswith("The same alextrain run") == (state != "finished")
    assert (status["seconds_left"] == 0) == (state == "finished")


def test_a_run_that_an_import_or_a_fork_began(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "status.json"):
        (run_dir / name).unlink()
    status = status_of(run_dir)
    assert (status["state"], status["alive"], status["finished"], status["said"]) == ("new", False, False, "")
    lines = status_lines(status)
    assert lines[0].endswith("run: not trained in this folder yet")
    assert lines[-1] == "The same alextrain run resumes after step 30."


def test_a_run_that_was_killed_before_its_first_line(run_dir: Path) -> None:
    for path in run_dir.iterdir():
        if path.name != "run.json":
            path.unlink()
    status = status_of(run_dir)
    assert (status["state"], status["step"], status["train"], status["checkpoint"]) == ("dead", 0, None, None)
    assert status["seconds_left"] is None and status["seconds_since"] is None
    assert status_lines(status)[-2:] == ["no checkpoint yet", "The same alextrain run starts it again from step 0."]


def test_the_command_needs_no_torch_and_ends_well_for_a_dead_run(run_dir: Path) -> None:
    script = (
        "import sys\nfrom train.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    words = [sys.executable, "-c", script, "status", str(run_dir), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["state"] == "dead"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("nowhere", None, "no such run"),
        ("empty", None, "not a run, there is no run.json in it"),
        ("torn", "{", "cannot be read"),
        ("old", json.dumps({k: v for k, v in RUN.items() if k != "length"}), "has no length"),
        ("list", "[]", "has no identity"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path: Path, name: str, content: str | None, said: str) -> None:
    folder = tmp_path / name
    if name != "nowhere":
        folder.mkdir()
    if content is not None:
        (folder / "run.json").write_text(content)
    done = CliRunner().invoke(train.cli.main, ["status", str(folder)])
    assert done.exit_code == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert str(folder) in done.stderr and said in done.stderr


def test_a_lock_is_looked_at_without_being_taken(tmp_path: Path) -> None:
    assert not lock_is_held(tmp_path) and not (tmp_path / ".lock").exists()
    with hold_lock(tmp_path, "training"):
        assert lock_is_held(tmp_path) and lock_is_held(tmp_path)
    assert not lock_is_held(tmp_path)
    with open(tmp_path / ".lock") as other:  # someone else who looks at the same moment
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not lock_is_held(tmp_path)
    with hold_lock(tmp_path, "training"):
        pass


def test_who_looks_at_a_lock_keeps_no_one_from_taking_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hold_lock(tmp_path, "training"):
        pass
    with open(tmp_path / ".lock") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        monkeypatch.setattr("prep.files.time.sleep", lambda s: fcntl.flock(other, fcntl.LOCK_UN))
        with hold_lock(tmp_path, "training"):
            assert lock_is_held(tmp_path)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind": "trai')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]

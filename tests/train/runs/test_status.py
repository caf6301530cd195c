"""Tests of `alextrain status` on run folders in every state.

tests/train/monitor/test_metrics_log.py tests the status of a run in progress.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

import train.cli
from prep.files import hold_lock
from tests.helpers.metrics import training_line, validation_line
from tests.helpers.small_training import tiny_description
from train.runs.run_dir import STATUS
from train.runs.status import status_lines, status_of

DESCRIPTION = tiny_description()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that was killed after step 34, while it wrote a line of metrics.jsonl."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(DESCRIPTION))
    lines = [
        validation_line(1, 0.75),
        validation_line(2, 0.5),
        validation_line(3, 0.625),
        training_line(33),
        {**training_line(34), "unix_time_s": 1e9},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra')
    status = {"state": "training", "said": "", "step": 30, "process": 77, "host": "far", "unix_time_s": 1.0}
    (folder / "status.json").write_text(json.dumps(status))
    for step in (20, 30):
        (folder / f"checkpoint-{step:08d}.pt").write_bytes(b"")
    (folder / ".checkpoint-00000040.pt.tmp").write_bytes(b"")
    os.utime(folder / "checkpoint-00000030.pt", (time.time() - 90, time.time() - 90))
    return folder


def test_a_run_that_ended_without_a_status_is_reported_as_crashed(run_dir: Path) -> None:
    status = status_of(run_dir)
    assert (status["state"], status["alive"], status["finished"]) == ("dead", False, False)
    assert (status["step"], status["steps"], status["epoch"], status["epochs"]) == (34, 100, 3.4, 10)
    assert status["seconds_left"] == pytest.approx(66 * 8 / 16)
    assert status["train"]["step"] == 34 and status["val"]["epoch"] == 3 and status["best"]["epoch"] == 2
    assert status["checkpoint"]["step"] == 30 and 90 <= status["checkpoint"]["seconds_since"] < 150
    assert status["seconds_since"] == pytest.approx(time.time() - 1e9, abs=60)
    text = "\n".join(status_lines(status))
    assert "run: crashed" in text and "step 34 of 100, epoch 3.40 of 10; 33 s left to train" in text
    assert "checkpoint of step 30, 1 min 3" in text and "The same alextrain run command resumes after step 30." in text
    assert "best top-1 error 50.0% at epoch 2" in text and "(process" not in text


def test_a_run_in_progress_is_reported_with_its_process(run_dir: Path) -> None:
    with hold_lock(run_dir, "training"):
        status = status_of(run_dir)
    assert (status["state"], status["alive"]) == ("training", True)
    first, _, progress, *rest = status_lines(status)
    assert first.endswith("training (process 77 on far)") and progress.endswith("33 s left")
    assert not any("The same alextrain" in text for text in rest)


def test_without_locks_the_status_says_whether_the_process_lives(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.runs.status.lock_is_held", lambda folder: None)
    written = json.loads((run_dir / STATUS).read_text())
    for host, process, state in (
        (platform.node(), os.getpid(), "training"),
        (platform.node(), 2**30, "dead"),
        ("another-machine", 2**30, "training"),
    ):
        (run_dir / STATUS).write_text(json.dumps({**written, "state": "training", "host": host, "process": process}))
        assert status_of(run_dir)["state"] == state


@pytest.mark.parametrize(
    ("state", "reason", "first_line"),
    [
        ("finished", "", "run: finished"),
        ("stopped", "by SIGTERM", "run: stopped by SIGTERM"),
        ("failed", "the loss is nan", "run: failed: the loss is nan"),
    ],
)
def test_a_run_that_ended_is_reported_with_its_reason(run_dir: Path, state: str, reason: str, first_line: str) -> None:
    written = {"state": state, "said": reason, "step": 34, "process": 77, "host": "far", "unix_time_s": 1.0}
    (run_dir / "status.json").write_text(json.dumps(written))
    status = status_of(run_dir)
    assert (status["state"], status["finished"], status["alive"]) == (state, state == "finished", False)
    lines = status_lines(status)
    assert lines[0].endswith(first_line) and lines[-1].startswith("The same alextrain run") == (state != "finished")
    assert (status["seconds_left"] == 0) == (state == "finished")


def test_a_run_created_by_an_import_or_a_fork_is_reported_as_new(run_dir: Path) -> None:
    for name in ("metrics.jsonl", "status.json"):
        (run_dir / name).unlink()
    status = status_of(run_dir)
    assert (status["state"], status["alive"], status["finished"], status["said"]) == ("new", False, False, "")
    lines = status_lines(status)
    assert lines[0].endswith("run: not trained in this folder yet")
    assert lines[-1] == "The same alextrain run command resumes after step 30."


def test_a_run_that_was_killed_before_its_first_line_starts_again_from_step_0(run_dir: Path) -> None:
    for path in run_dir.iterdir():
        if path.name != "run.json":
            path.unlink()
    status = status_of(run_dir)
    assert (status["state"], status["step"], status["train"], status["checkpoint"]) == ("dead", 0, None, None)
    assert status["seconds_left"] is None and status["seconds_since"] is None
    assert status_lines(status)[-2:] == [
        "no checkpoint yet",
        "The same alextrain run command starts the run again from step 0.",
    ]


def test_the_command_loads_no_torch_and_exits_with_0_for_a_crashed_run(run_dir: Path) -> None:
    script = (
        "import sys\nfrom train.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "sys.exit('torch' in sys.modules)\n"
    )
    command = [sys.executable, "-c", script, "status", str(run_dir), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["state"] == "dead"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere", None, "no such run"),
        ("empty", None, "not a run, there is no run.json in it"),
        ("torn", "{", "cannot be read"),
        ("old", json.dumps({k: v for k, v in DESCRIPTION.items() if k != "length"}), "has no field length"),
        ("list", "[]", "the content is an array of 0 values, expected an object"),
    ],
)
def test_a_folder_that_is_not_a_run_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    folder = tmp_path / name
    if name != "nowhere":
        folder.mkdir()
    if content is not None:
        (folder / "run.json").write_text(content)
    result = CliRunner().invoke(train.cli.main, ["status", str(folder)])
    assert result.exit_code == 1 and result.stdout == "" and result.stderr.count("\n") == 1
    assert str(folder) in result.stderr and message in result.stderr

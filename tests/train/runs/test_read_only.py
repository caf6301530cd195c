"""Tests of stores and run folders that belong to another user and are read-only.

A command that can do its work without writing into these folders succeeds. Any other command fails, and its error names
the file that cannot be written. Root may write into every folder, so the child process of a test gives up this right.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.project import ROOT

# The child process runs all commands itself, so that it loads the libraries only once.
_SCRIPT = """
import contextlib, io, json, sys
import pipeline.cli, prep.cli, train.cli
groups = {"alexprep": prep.cli.main, "alexstream": pipeline.cli.main, "alextrain": train.cli.main}
results = []
for group, *args in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            groups[group](args)
        except SystemExit as end:
            results.append((end.code, out.getvalue(), err.getvalue()))
print(json.dumps(results))
"""


def give_up_rights_of_root() -> None:
    """Drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, with which root ignores permissions.

    Other users do not have these rights. For them, the calls fail without harm.
    """
    libc = ctypes.CDLL(None)
    for capability in (1, 2):
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


def run_commands(folder: Path, commands: list[str]) -> list[tuple[int, str, str]]:
    """Run commands in a child process. Returns exit code, standard output and standard error of each command."""
    process = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps([command.split() for command in commands])],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=give_up_rights_of_root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return [(code, out, err) for code, out, err in json.loads(process.stdout)]


@pytest.fixture
def read_only(store: Path, tmp_path: Path) -> Path:
    """A writable folder that contains a store into which nobody may write."""
    shutil.copytree(store, tmp_path / "store")
    for path in (tmp_path / "store", *(tmp_path / "store").rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return tmp_path


@pytest.mark.soak
def test_a_store_of_another_user_is_read(read_only: Path, photo_folder: Path) -> None:
    commands = [
        "alexprep verify --store store --jobs 1",
        "alexprep inspect --store store",
        "alexprep pca-stats --store store",
        "alexprep export-files files --store store --jobs 1",
        "alexstream preview sheet.png --store store --rows 1",
        f"alexprep build-lmdb {photo_folder} --store store --jobs 1",
        "alexprep export-files store/files --store store --jobs 1",
    ]
    verify, inspect, statistics, export, preview, build, inside = run_commands(read_only, commands)
    assert verify[0] == inspect[0] == export[0] == preview[0] == 0, (verify, inspect, export, preview)
    assert statistics[0] == 0 and "colour.json was not written: Permission denied." in statistics[2]
    assert build[0] == 1 and build[2].startswith("Error: --store store: no permission to write into store")
    assert inside[0] == 1 and "Error: store/files: Permission denied." in inside[2]


def test_a_run_of_another_user_is_read(read_only: Path, small_run: Path) -> None:
    run = Path(shutil.copytree(small_run, read_only / "run"))
    for path in (*run.rglob("*"), run):
        path.chmod(0o555 if path.is_dir() else 0o444)
    commands = [
        "alextrain status run",
        "alextrain evaluate run --store store --gpus cpu --views 1 --out scores.npz",
        "alextrain export run --to safetensors --out network.safetensors",
        "alextrain run --store store --run-dir run --gpus cpu --epochs 3",
    ]
    status, evaluate, export, train = run_commands(read_only, commands)
    assert status[0] == export[0] == 0 and "finished" in status[1], (status, export)
    assert evaluate[0] == 0 and "top-1 error" in evaluate[1] and (read_only / "scores.npz").exists()
    assert "run/evaluations.jsonl: cannot be written (Permission denied)" in evaluate[2]
    assert train[0] == 1 and "Error: run/.lock: Permission denied. Ask the owner" in train[2].splitlines()[-1]

"""Fuzzing of the files of a run folder: each reader returns a value or raises an error of one line.

The tests change the files of a small trained run. Changed checkpoints get a correct digest, so that readers do not stop
at the digest.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest

from tests.fuzzing import changed_bytes, changed_json, examples, reader_of, try_files
from tests.helpers.project import ROOT
from tools.edits.checkpoint_edits import sign
from train.config.architecture import ARCHITECTURES
from train.convert.import_torchvision import _read
from train.evaluation.predictions import load_predictions, read_evaluations
from train.report.compare import comparison_json, read_runs
from train.runs.checkpoint import read as read_checkpoint
from train.runs.ensemble_dir import read_ensemble
from train.runs.ensemble_status import ensemble_status, ensemble_status_lines
from train.runs.run_dir import read_metrics
from train.runs.saved_config import saved_config
from train.runs.status import status_lines, status_of


def read_run(run_dir: Path) -> None:
    """Read a run folder as `alextrain status`, `compare` and `run` do."""
    assert status_lines(status_of(run_dir))
    assert comparison_json(read_runs([run_dir]))
    saved_config(run_dir)


@examples(30, 5_000)
def test_description_of_a_run(count: int, trained_run: Path) -> None:
    path = trained_run / "run.json"
    try_files(changed_json(json.loads(path.read_bytes())), count, reader_of(path, lambda: read_run(trained_run)))


@examples(60, 5_000)
def test_status(count: int, trained_run: Path) -> None:
    path = trained_run / "status.json"
    read = reader_of(path, lambda: status_lines(status_of(trained_run)))
    try_files(changed_json(json.loads(path.read_bytes())), count, read)


@examples(30, 5_000)
def test_metrics(count: int, trained_run: Path) -> None:
    path = trained_run / "metrics.jsonl"
    lines = path.read_bytes().splitlines()

    def read(content: bytes) -> None:
        path.write_bytes(b"\n".join([lines[0], content, lines[-1], b""]))
        read_metrics(trained_run)
        read_run(trained_run)

    for line in (lines[0], lines[-1]):
        try_files(changed_json(json.loads(line)), count, read)


@examples(60, 5_000)
def test_evaluations(count: int, trained_run: Path) -> None:
    path = trained_run / "evaluations.jsonl"
    line = {"step": 6, "split": "val", "split_fingerprint": "0" * 64, "views": 10, "precision": "fp32", "images": 12}
    line |= {"top1_error": 0.5, "top5_error": 0.0, "loss": 1.1, "misses": [6, 0], "intervals": [[0.2, 0.7], [0, 0.2]]}
    try_files(changed_json(line), count, reader_of(path, lambda: read_evaluations(trained_run)))


@examples(60, 5_000)
def test_ensemble(count: int, tmp_path: Path) -> None:
    path = tmp_path / "ensemble.json"

    def read() -> None:
        ensemble = read_ensemble(tmp_path)
        assert ensemble is not None
        if ensemble.members < 100:
            ensemble_status_lines(ensemble_status(tmp_path, ensemble))

    try_files(changed_json({"members": 2, "seed": 7, "stream_seed": 7}), count, reader_of(path, read))


@pytest.fixture
def predictions(tmp_path: Path) -> Path:
    """A file of class probabilities, as `alextrain evaluate --out` writes it."""
    about = {"run": "run", "step": 6, "split": "val", "split_fingerprint": "0" * 64, "views": 10, "precision": "fp32"}
    about |= {"classes": ["a", "b", "c"], "checkpoint": "1" * 64}
    path = tmp_path / "run.npz"
    np.savez(
        path,
        probabilities=np.full((4, 3), 1 / 3, np.float32),
        labels=np.arange(4) % 3,
        keys=np.array([b"00000000"] * 4, "S8"),
        about=np.array(json.dumps(about)),
    )
    return path


@examples(80, 20_000)
def test_predictions(count: int, predictions: Path) -> None:
    content = predictions.read_bytes()
    read = reader_of(predictions, lambda: load_predictions(predictions))
    try_files(changed_bytes(content), count, read)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def read_member(name: str) -> None:
        def with_header(head: bytes) -> object:
            with zipfile.ZipFile(predictions, "w") as archive:
                for other, data in members.items():
                    archive.writestr(other, head + data[128:] if other == name else data)
            return load_predictions(predictions)

        try_files(changed_bytes(members[name][:128]), count // 4, with_header)

    for name in members:
        read_member(name)


@examples(60, 5_000)
def test_text_about_predictions(count: int, predictions: Path) -> None:
    with np.load(predictions, allow_pickle=False) as arrays:
        saved = {name: arrays[name] for name in arrays.files}

    def read(content: bytes) -> None:
        text = content.decode("utf-8", "replace")
        np.savez(predictions, **{**saved, "about": np.array(text)})
        load_predictions(predictions)

    try_files(changed_json(json.loads(str(saved["about"]))), count, read)


@examples(60, 20_000)
def test_checkpoint(count: int, trained_run: Path) -> None:
    """The test changes the pickle of a checkpoint, and computes the digest again."""
    path = max(trained_run.glob("checkpoint-*.pt"))
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    pickled = next(name for name in members if name.endswith("/data.pkl"))

    def read(content: bytes) -> None:
        path.unlink()
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, content if name == pickled else data)
        sign(path)
        read_checkpoint(path)

    try_files(changed_bytes(members[pickled]), count, read)


@examples(50, 20_000)
def test_archive_of_a_checkpoint(count: int, trained_run: Path) -> None:
    """The test changes the directory and the headers of the archive, with and without a correct digest."""
    path = max(trained_run.glob("checkpoint-*.pt"))
    content = path.read_bytes()[:-71]
    body = content[:-2] + b"\0\0"
    middle = body[300:-2000]

    def read(changed: bytes) -> None:
        path.unlink()
        path.write_bytes(changed[: len(changed) // 2] + middle + changed[len(changed) // 2 :])
        if path.read_bytes()[-2:] == b"\0\0":
            sign(path)
        read_checkpoint(path)

    try_files(changed_bytes(body[:300] + body[-2000:]), count, read)


@examples(60, 10_000)
def test_weights_to_import(count: int, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.zeros(2, 3), "features.0.bias": torch.zeros(2)}, path)
    try_files(
        changed_bytes(path.read_bytes()), count, reader_of(path, lambda: _read(path, ARCHITECTURES["torchvision"]))
    )


@pytest.mark.parametrize(
    "share", [pytest.param(0.005, id="sample"), pytest.param(1.0, id="all", marks=pytest.mark.soak)]
)
def test_edits_of_a_run_end_with_one_line(share: float, trained_run: Path, tmp_path: Path) -> None:
    """tools.edit_files edits fields of the files in the run folder, and runs `alextrain status`."""
    shutil.copytree(trained_run, tmp_path / "samples" / "run")
    program = [sys.executable, "-m", "tools.edit_files", "--samples", str(tmp_path / "samples"), "--no-preload"]
    words = ["--share", str(share), "--command", "alextrain status run"]
    ended = subprocess.run([*program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

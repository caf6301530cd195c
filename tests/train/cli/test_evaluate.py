"""Tests of the command `evaluate` on a store whose classes differ from the classes of the run."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.conftest import Build
from tests.helpers.alextrain import refusal


def test_evaluation_on_a_store_with_other_classes_is_refused(
    small_run: Path, photo_folder: Path, tmp_path: Path, build: Build
) -> None:
    shutil.copytree(photo_folder / "train", tmp_path / "other")
    (tmp_path / "other" / "n00000011").rename(tmp_path / "other" / "n00000044")
    other = build(tmp_path / "other")
    error = refusal("evaluate", small_run, "--store", other, "--split", "train")
    assert "not the same" in error and "n00000011" in error


def test_a_split_that_does_not_exist_is_refused_with_a_suggestion(small_run: Path, store: Path) -> None:
    for command in ("evaluate", "features"):
        error = refusal(command, small_run, "--store", store, "--split", "vla")
        assert "has no split vla (it has: train, val)" in error and "Did you mean val?" in error


def test_a_missing_folder_for_out_is_refused_before_the_work(small_run: Path, tmp_path: Path) -> None:
    photograph, out = tmp_path / "x.jpg", tmp_path / "nowhere"
    commands = {
        "report": (out / "x.html",),
        "features": (out / "x.npy",),
        "export": (out / "x.onnx", "--to", "onnx"),
        "search": (out / "x.png", photograph),
        "compare": (out / "x.png",),
    }
    for command, (file, *others) in commands.items():
        error = refusal(command, small_run, *others, "--out", file, code=2)
        assert error == f"Error: --out {file}: there is no folder {out}. Make this folder, or name another folder.\n"

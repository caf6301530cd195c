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

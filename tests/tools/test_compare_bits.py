"""Tests of tools.compare_bits: hashes of results, the files that are compared, the table and the exit code.

The comparison itself takes minutes, so no test runs it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from prep.console import UserError
from tests.helpers.project import ROOT
from tools import compare_bits, tree_bits

SAME = {"name": "weights", "there": "a" * 64, "here": "a" * 64, "same": True}
DIFFERENT = {"name": "velocity", "there": "a" * 64, "here": None, "same": False}


def test_a_hash_of_tensors_depends_on_bits_dtype_shape_and_name() -> None:
    zero = torch.zeros(2, 2)
    others: list[dict[str, torch.Tensor]] = [
        {"w": -zero},  # 0.0 and -0.0 are equal, but have different bits
        {"w": zero.int()},
        {"w": zero.reshape(4)},
        {"v": zero},
        {"w": zero, "v": zero},
    ]
    hashes = {tree_bits.tensors_hash(tensors) for tensors in ({"w": zero}, *others)}
    assert len(hashes) == 1 + len(others)
    assert tree_bits.tensors_hash({"w": zero, "v": -zero}) == tree_bits.tensors_hash({"v": -zero, "w": zero})


def test_a_worker_that_imports_the_packages_from_elsewhere_fails(tmp_path: Path) -> None:
    command = [sys.executable, "-P", str(compare_bits.WORKER), "run", "run"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"not from {tmp_path}" in done.stderr


def test_a_copy_of_a_tree_has_new_files_and_no_ignored_or_deleted_ones(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    for name in compare_bits.COMPARED:
        (tree / name).mkdir(parents=True)
        (tree / name / "kept.py").touch()
    (tree / ".gitignore").write_text("*.so\n")
    for command in (["init", "--quiet"], ["add", "."]):
        subprocess.run(["git", "-C", str(tree), *command], check=True, capture_output=True)
    (tree / "prep" / "kept.py").unlink()
    (tree / "prep" / "new.py").touch()
    (tree / "prep" / "kernels.so").touch()
    compare_bits.copy_tree(tree, out)
    assert [path.name for path in (out / "prep").iterdir()] == ["new.py"]
    assert [path.name for path in (out / "train").iterdir()] == ["kept.py"]


def test_kernels_that_were_compiled_must_be_used_and_those_switched_off_must_not(tmp_path: Path) -> None:
    tree = compare_bits.Tree("new", tmp_path, tmp_path)
    loaded = ["pipeline/engines/kernels-1.so", "train/model/kernels-2.so"]
    tree._check_kernels(loaded, ("pipeline", "train"))
    tree._check_kernels([], ())
    with pytest.raises(UserError, match="kernels of train were not loaded"):
        tree._check_kernels(loaded[:1], ("pipeline", "train"))
    with pytest.raises(UserError, match="kernels of pipeline were loaded although"):
        tree._check_kernels(loaded[:1], ())


@pytest.mark.parametrize(("rows", "exit_code"), [([SAME], 0), ([SAME, DIFFERENT], 1)])
def test_the_exit_code_says_whether_all_results_are_the_same(
    rows: list[dict[str, Any]], exit_code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_bits, "compare", lambda *_: rows)
    result = CliRunner().invoke(compare_bits.main, [])
    assert result.exit_code == exit_code
    assert ("DIFFERENT" in result.output) == ("missing" in result.output) == (exit_code == 1)


def test_a_revision_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no-such-revision: git archive failed"):
        compare_bits.export_revision("no-such-revision", tmp_path)

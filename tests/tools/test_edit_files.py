"""tools.edit_files finds faults that a test puts into a command. In the unchanged commands, the tool finds no fault."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prep.cli.check
from prep.console import UserError
from tests.helpers.project import ROOT
from tools.edit_files import BELIEVED, judged, table_lines
from tools.edits.json_edits import encode, value_edits
from tools.edits.processes import ACCEPTED, ONE_LINE, Outcome, check_edit
from tools.edits.record_edits import parse, serialized
from tools.edits.rules import reason_to_accept
from tools.edits.targets import TARGETS, Edit, Target

INSPECT = "alexprep inspect --store store"


def test_every_field_is_deleted_and_gets_values_of_other_types() -> None:
    value = {"a": [1, {"b": "text"}], "c": True, "d": None, "e": 0.5}
    by_field: dict[str, set[str]] = {}
    for edit in value_edits(value):
        by_field.setdefault(edit.field, set()).add(edit.kind)
    assert set(by_field) == {"", "a", "a.0", "a.1", "a.1.b", "c", "d", "e"}
    assert {"null", "text", "list", "object", "NaN", "400 digits", "nested", "negative", "true"} <= by_field["a.0"]
    assert {"delete", "twice", "escape code", "surrogate", "NUL", "bidi", "number"} <= by_field["a.1.b"]
    assert all("delete" in kinds for field, kinds in by_field.items() if field and field not in ("a.0", "a.1"))


def test_edited_values_are_written_as_json() -> None:
    texts = {(edit.field, edit.kind): encode(edit.value) for edit in value_edits({"a": 1, "b": ["x", "y"]})}
    assert json.loads(texts["a", "delete"]) == {"b": ["x", "y"]}
    assert texts["a", "twice"] == '{"a": 1, "a": 1, "b": ["x", "y"]}'
    assert json.loads(texts["a", "400 digits"])["a"] == 10**400
    assert json.loads(texts["b.0", "escape code"])["b"][0].startswith("x\x1b[31m")
    assert texts["b", "nested"].count("[") == 10_000
    assert json.loads(texts["b", "item removed"])["b"] == ["x"]


def test_records_are_taken_apart_and_put_together(records_of: Callable[..., Any], store: Path) -> None:
    """`parse` returns the same fields as a reader of protobuf, and `serialized` makes the same bytes from them."""
    import lmdb

    with lmdb.open(str(store / "train" / "00000"), readonly=True, lock=False) as env, env.begin() as txn:
        values = [bytes(value) for _, value in txn.cursor()]
    for value, (_, datum) in zip(values, records_of(store, "train"), strict=True):
        fields = parse(value)
        assert serialized(fields) == value
        assert (fields["height"], fields["label"], fields["data"]) == (datum.height, datum.label, datum.data)


@pytest.fixture
def samples(store: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the test store."""
    shutil.copytree(store, tmp_path / "samples" / "store")
    return tmp_path / "samples"


def outcome_with(
    command: Callable[[Any], object], samples: Path, patch: pytest.MonkeyPatch, limit_s: float = 60
) -> Outcome:
    """Return the outcome of `alexprep inspect`, in which `command` replaces Store.open."""
    patch.setattr(prep.cli.check.Store, "open", staticmethod(command))
    target = Target("store/manifest.json", "json", ("store",), (INSPECT,))
    return check_edit(target, Edit(target.file, "", "x", lambda path: None), target.commands, samples, limit_s)[0]


def fail_with_one_line(path: Path) -> None:
    raise UserError("store: wrong. Build it again.")


def fail_after_a_change(path: Path) -> None:
    Path("store/train/colour.json").write_text("{}")
    raise UserError("store: wrong. Build it again.")


def print_escape_code(path: Path) -> None:
    sys.stderr.write("\x1b[31m\n")
    raise UserError("store: wrong.")


def print_two_lines(path: Path) -> None:
    sys.stderr.write("Error: first\n")
    raise UserError("store: wrong.")


@pytest.mark.parametrize(
    ("command", "verdict"),
    [
        (fail_with_one_line, ONE_LINE),
        (fail_after_a_change, "changed files"),
        (print_escape_code, "control characters"),
        (print_two_lines, "several lines"),
        (lambda path: {}["key"], "traceback"),
        (lambda path: time.sleep(120), "hang"),
        (lambda path: bytearray(2_500_000_000), "memory"),
    ],
)
def test_faults_of_a_command_are_found(
    command: Callable[[Any], object], verdict: str, samples: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = outcome_with(command, samples, monkeypatch, 2 if verdict == "hang" else 60)
    assert outcome.verdict == verdict, outcome
    assert verdict != "hang" or outcome.seconds < 20


def test_accepted_edits_need_a_rule() -> None:
    edit = ("store/manifest.json", "splits.train.records", "text", INSPECT, ACCEPTED, 0, "", 0.1, 1)
    assert judged(Outcome(*edit)).verdict == BELIEVED
    assert reason_to_accept(Outcome(*edit)) is None
    allowed = Outcome("run/tensorboard/EVENTS", *edit[1:])
    assert judged(allowed) == allowed
    assert any(line.split()[-1] == "1" for line in table_lines([allowed, judged(Outcome(*edit))]))


def test_every_target_names_programs_and_copied_folders() -> None:
    """Every command line begins with a program of this project, and every file is in a folder that is copied."""
    for target in TARGETS:
        assert all(command.split()[0] in ("alexprep", "alexstream", "alextrain") for command in target.commands)
        assert target.file.split("/")[0] in target.folders


@pytest.mark.parametrize(
    "share", [pytest.param(0.02, id="sample"), pytest.param(1.0, id="all", marks=pytest.mark.soak)]
)
def test_edits_of_a_store_end_with_one_line(share: float, samples: Path) -> None:
    program = [sys.executable, "-m", "tools.edit_files", "--samples", str(samples), "--no-preload"]
    words = ["--share", str(share), "--command", "alexprep inspect"]
    ended = subprocess.run([*program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.soak
def test_edits_of_all_files_end_with_one_line() -> None:
    """The tool makes sample files, applies a tenth of all edits to them, and runs one command after each edit."""
    program = [sys.executable, "-m", "tools.edit_files", "--share", "0.1", "--jobs", "2", "--limit", "60"]
    ended = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

"""Tests of docs/examples.md: the programs accept the page's commands, and the page states the right file sizes."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from click import Context

from tests.helpers.project import ROOT

PAGE = (ROOT / "docs" / "examples.md").read_text("utf-8")
COMMANDS = re.findall(r"-m examples\.(\w+) (.*)$", PAGE, re.M)


def test_page_starts_and_names_every_program() -> None:
    programs = {path.stem for path in (ROOT / "examples").glob("*.py") if "__main__" in path.read_text()}
    assert {name for name, _ in COMMANDS} == programs and len(programs) == 4
    assert all(f"`examples/{path.name}`" in PAGE for path in (ROOT / "examples").glob("[!_]*.py"))


@pytest.mark.parametrize(("name", "arguments"), COMMANDS)
def test_command_of_the_page_is_accepted(
    name: str, arguments: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "store").mkdir()
    context: Context = import_module(f"examples.{name}").main.make_context(name, shlex.split(arguments))
    assert context.params["epochs"] == 2


def test_sizes_in_the_comparison_are_those_of_the_files() -> None:
    program, modules = (
        int(text.replace(",", "")) for text in re.findall(r"\| ([\d,]+) characters, and ([\d,]+) in two", PAGE)[0]
    )
    sizes = {path.stem: len(path.read_text("utf-8")) for path in (ROOT / "examples").glob("*.py")}
    assert abs(sizes["resnet"] - program) <= 100
    assert abs(sizes["networks"] + sizes["checkpoints"] - modules) <= 100
    assert (ROOT / "examples" / "resnet.py").read_text().count("\n") < 80

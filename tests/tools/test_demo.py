"""tools.demo: the last lines that the demo prints say how to make the commands of the virtual environment available."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import demo


def test_the_demo_ends_with_the_command_that_adds_the_commands_to_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "make_dataset", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(demo, "_run_command", lambda arguments: {"top1_error": 0.114, "images": 360})
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    demo.run_demo(Path("demo"))
    assert capsys.readouterr().out.endswith("in this shell, run:\n  . .venv/bin/activate\n")
    monkeypatch.setattr(sys, "prefix", "/opt/my env")
    assert demo.activation_script() == "'/opt/my env/bin/activate'"
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)  # without a virtual environment, the commands are on PATH
    demo.run_demo(Path("demo"))
    assert "activate" not in capsys.readouterr().out

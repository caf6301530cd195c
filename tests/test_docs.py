"""README and the commands say the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

import pipeline.cli
import prep.cli
import train.cli
from tools import draw_alexnet
from tools.readme_help import README, with_help

ROOT = README.parent


def test_help_block_of_the_readme_is_the_help() -> None:
    text = README.read_text()
    assert text == with_help(text), "python -m tools.readme_help brings it up to date"


def test_readme_lists_every_command_and_no_other() -> None:
    groups = {"alexprep": prep.cli.main, "alexstream": pipeline.cli.main, "alextrain": train.cli.main}
    table = {tuple(match.split()[:2]) for match in re.findall(r"^\| `(alex\w+ [\w-]+)", README.read_text(), re.M)}
    assert table == {(group, name) for group, main in groups.items() for name in main.commands}


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert links and all((ROOT / link).exists() for link in links)


def test_the_picture_of_the_network_is_that_of_the_network() -> None:
    drawn = (ROOT / "docs" / "alexnet.svg").read_text()
    assert drawn == draw_alexnet.picture(), "python -m tools.draw_alexnet docs/alexnet.svg brings it up to date"


def test_python_of_the_readme_runs(store: Path) -> None:
    """It trains: an epoch of three steps moves every parameter, and the next goes on."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "readme"}
    exec(compile(code.replace('"store"', repr(str(store))).replace("128", "10", 1), "README.md", "exec"), names)
    assert names["images"].shape == (10, 3, 224, 224)
    assert names["loss"].isfinite() and names["state"]["epoch"] == 1
    assert all(parameter.grad.abs().sum() > 0 for parameter in names["head"][2].parameters())


def test_no_path_of_one_machine_is_in_the_project() -> None:
    pattern = re.compile(r"/(?:root|tmp|home)/\w")
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/*.py"), ROOT / "Makefile"]:
        if ".venv" not in path.parts and path.parent.name != "demo":
            assert not pattern.search(path.read_text()), path

"""Names and texts of files reach the terminal only with escaped control characters."""

from __future__ import annotations

import ast

import pytest

from tests.helpers.project import ROOT

# Functions that print. Commands print with prep.console instead, which escapes control characters.
PRINTERS = {"print", "click.echo", "click.secho", "click.echo_via_pager", "click.confirm", "click.prompt", "rich.print"}
STREAMS = {"sys.stdout", "sys.stderr", "sys.__stdout__", "sys.__stderr__"}
# Modules that draw on a terminal, or that ask whether a stream is a terminal.
EXCEPTIONS = {
    "prep/console/output.py": {"click.echo", "sys.stdout"},
    "prep/console/progress_display.py": {"sys.stderr", "rich.console.Console"},
    "train/monitor/live_view.py": {"rich.console.Console"},
    "train/monitor/view.py": {"sys.stderr"},
}


def dotted_name(node: ast.expr) -> str:
    """Return `sys.stdout` for the expression sys.stdout; "" for an expression that is not a dotted name."""
    if isinstance(node, ast.Attribute) and (parent := dotted_name(node.value)):
        return f"{parent}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def printing_names(source: str) -> set[str]:
    """Return the functions and streams in a Python source with which a module can print."""
    tree, names = ast.parse(source), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            first, _, rest = dotted_name(node).partition(".")
            name = f"{names.get(first, first)}.{rest}".rstrip(".")
            if name in PRINTERS | STREAMS or name == "rich.console.Console":
                found.add(name)
    return found


def test_only_prep_console_prints() -> None:
    for package in ("prep", "pipeline", "train"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = str(path.relative_to(ROOT))
            others = printing_names(path.read_text()) - EXCEPTIONS.get(name, set())
            assert not others, f"{name} uses {others}: print with print_line, print_json or say of prep.console"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("print(1)", "print"),
        ("import click\ndef f():\n    click.echo(1)", "click.echo"),
        ("from click import echo as say\nsay(1)", "click.echo"),
        ("import sys as s\ns.stderr.write('a')", "sys.stderr"),
        ("def f():\n    from rich.console import Console\n    Console(stderr=True)", "rich.console.Console"),
    ],
)
def test_each_way_to_print_is_found(source: str, name: str) -> None:
    assert printing_names(source) == {name}

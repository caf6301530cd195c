"""Functions that run `alextrain` commands in the process of the test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from train.cli import main


def alextrain(*args: object) -> Result:
    """Run a command and return its result. If the command raises an exception other than SystemExit, raise it again."""
    result = CliRunner().invoke(main, [*map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def json_lines(*args: object) -> list[Any]:
    """Run a command with --json, and return the JSON objects that it prints. The command must succeed."""
    result = alextrain(*args, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refusal(*args: object, code: int = 1) -> str:
    """Run a command that must fail with exit code `code` and one line on standard error. Returns this line."""
    result = alextrain(*args)
    assert result.exit_code == code and result.stderr.count("\n") == 1, result.output
    return result.stderr


def lose_store(run_dir: Path) -> None:
    """Change the paths of the training store in run.json to folders that do not exist."""
    description = json.loads((run_dir / "run.json").read_text())
    description["settings"] |= {"store": "nowhere", "store_absolute": "/nowhere/store"}
    (run_dir / "run.json").write_text(json.dumps(description))

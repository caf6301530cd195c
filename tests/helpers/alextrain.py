"""`alextrain` called in the test's process with the words of a command line."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner, Result

from train.cli import main


def alextrain(*args: object) -> Result:
    """Run a command. An exception that is not an exit is raised again."""
    result = CliRunner().invoke(main, [*map(str, args)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def json_lines(*args: object) -> list[Any]:
    """The JSON objects that a command prints with --json; it must succeed."""
    result = alextrain(*args, "--json")
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def refusal(*args: object) -> str:
    """The error of a command, which must be one line on standard error, with exit code 1."""
    result = alextrain(*args)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1, result.output
    return result.stderr

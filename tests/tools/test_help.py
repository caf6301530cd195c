"""Test that every tool and each of its options has a help text."""

from __future__ import annotations

from importlib import import_module

import click
import pytest
from click.testing import CliRunner

TOOLS = (
    *("compare_bits", "demo", "edit_files", "gpu_check", "photo_digits", "service_demo"),
    *("bench.build", "bench.host_time", "bench.stream", "bench.train"),
    *("docs.check_site", "docs.cli_reference", "docs.draw_alexnet", "docs.recipe_reference"),
    *("docs.schema_reference",),
)


@pytest.mark.parametrize("name", TOOLS)
def test_every_option_of_a_tool_has_help(name: str) -> None:
    command = import_module(f"tools.{name}").main
    result = CliRunner().invoke(command, ["--help"])
    assert result.exit_code == 0 and command.help
    summary = command.help.strip().splitlines()[0]
    assert summary in " ".join(result.output.split())
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{name} {option.name}"

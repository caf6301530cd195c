"""Write docs/cli.md: the --help of every command.

python -m tools.docs.cli_reference            # tests/test_docs.py fails if the page is not up to date
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

import pipeline.cli
import prep.cli
import train.cli
from prep.console import CONTEXT_SETTINGS

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"
GROUPS: dict[str, click.Group] = {
    "alexprep": prep.cli.main,
    "alexstream": pipeline.cli.main,
    "alextrain": train.cli.main,
}
WIDTH = 80  # number of characters that fit into a line of a code block of the site, at desktop width

INTRODUCTION = """\
# Commands

<!-- Written by `python -m tools.docs.cli_reference`; tests/test_docs.py compares it with the commands. -->

The project has three commands, one for each stage. Every subcommand has `--help` with an example; `-h` is short for
`--help`. The environment variable `ALEXNET_STORE` gives the default of `--store`. Every command that prints numbers
also has `--json`, to print JSON instead.

| exit code | meaning |
| --- | --- |
| 0 | done |
| 1 | an error that the user can correct; the message names the error and the next command to type |
| 2 | the command line is wrong: an unknown command or option, or a value that the command cannot take |
| 3 | the disk is full |
| 74 | a `data.mdb` was cut or became unreadable while a command read it; the message names the shard |
| 129, 130, 143 | interrupted by a closed terminal (129), by Ctrl-C (130) or by SIGTERM (143) |

After you have corrected an error, or after an interruption, run the same command again. Seven commands then continue
the interrupted work: `alexprep build-lmdb`, `alexprep import-caffe`, `alexprep merge`, `alexprep export-files`,
`alexprep copy`, `alextrain run` and `alextrain ablate`. Every other command starts from the beginning.
"""


def page() -> str:
    """Return the text of docs/cli.md: for each command group a section, followed by the sections of its commands."""
    parts = [INTRODUCTION]
    for name, group in GROUPS.items():
        parts.append(f"## {name}\n\n{_block(group, name)}")
        for command in sorted(group.commands):
            full_name = f"{name} {command}"
            parts.append(f"### {full_name}\n\n{_block(group.commands[command], full_name)}")
    return "\n".join(parts)


def _block(command: click.Command, name: str) -> str:
    settings: dict[str, Any] = {"terminal_width": WIDTH, **CONTEXT_SETTINGS}
    context = click.Context(command, info_name=name, **settings)
    return f"```text\n$ {name} --help\n{command.get_help(context)}\n```\n"


@click.command()
def main() -> None:
    """Write docs/cli.md."""
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()

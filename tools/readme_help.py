"""Write the commands' own --help into README.md, so that the two cannot differ.

python -m tools.readme_help            # tests/test_docs.py fails where this would change something
"""

from __future__ import annotations

from pathlib import Path

import click

import pipeline.cli
import prep.cli
import train.cli
from prep.console import CONTEXT

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- help: written by `python -m tools.readme_help`, held by tests/test_docs.py -->\n"
END = "<!-- /help -->\n"
WIDTH = 110


def help_block() -> str:
    """The help of the three groups and of the commands that the flow consists of, as indented text."""
    groups = {"alexprep": prep.cli.main, "alexstream": pipeline.cli.main, "alextrain": train.cli.main}
    pages = [_help(main, name) for name, main in groups.items()]
    pages.append(_help(prep.cli.main.commands["build-lmdb"], "alexprep build-lmdb"))
    pages.append(_help(train.cli.main.commands["run"], "alextrain run"))
    return "\n```\n" + "\n\n".join(pages) + "\n```\n\n"


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, **CONTEXT)
    return f"$ {name} --help\n" + command.get_help(context)


def with_help(readme: str) -> str:
    """The text of README.md with the block as it should be."""
    before, rest = readme.split(BEGIN)
    return before + BEGIN + help_block() + END + rest.split(END)[1]


@click.command()
def main() -> None:
    """Bring README.md's help block up to date."""
    README.write_text(with_help(README.read_text()))


if __name__ == "__main__":
    main()

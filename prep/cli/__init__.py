"""The command `alexprep` and its subcommands."""

from prep.cli.group import main

__all__ = ["main"]

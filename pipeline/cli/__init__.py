"""The command `alexstream` and its subcommands. The stream itself is in pipeline.loader."""

from pipeline.cli.group import main

__all__ = ["main"]

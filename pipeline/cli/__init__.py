"""The command `alexstream` and its subcommands. The code of the stream is in pipeline.loader."""

from pipeline.cli.group import main

__all__ = ["main"]

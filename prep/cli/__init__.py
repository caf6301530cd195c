"""The command `alexprep`."""

from prep.cli.group import main

__all__ = ["main"]

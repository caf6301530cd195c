"""The command `alextrain`."""

from train.cli.group import main

__all__ = ["main"]

"""The command line `alextrain`: options and output of each command; the work is in the other rooms."""

from train.cli.group import main

__all__ = ["main"]

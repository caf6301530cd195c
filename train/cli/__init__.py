"""The command line `alextrain`: options and output of each command. The other subpackages of train/ do the work."""

from train.cli.group import main

__all__ = ["main"]

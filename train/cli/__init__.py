"""The command line `alextrain`: options and output of the commands. The other packages in train/ do the work."""

from train.cli.group import main

__all__ = ["main"]

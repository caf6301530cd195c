"""The command line `alextrain`: options and output of each command, which other subpackages of train/ implement."""

from train.cli.group import main

__all__ = ["main"]

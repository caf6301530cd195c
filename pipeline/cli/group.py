"""The command group `alexstream`."""

from __future__ import annotations

import click

from pipeline.cli.service import serve, status, stop
from pipeline.cli.stream import bench, inspect, preview
from prep.console import CONTEXT_SETTINGS, Group
from prep.version import version_option


@click.group(cls=Group, context_settings=CONTEXT_SETTINGS)
@version_option
def main() -> None:
    """Preview, inspect and benchmark the training stream of a store: random crops, flips and colour noise.

    In Python: from pipeline import train_loader, eval_loader.

    \b
    Example:
      alexstream preview preview.png --store store
      alexstream inspect --store store
      alexstream bench --store store

    Exit codes: 0: done; 1: an error to correct; 2: wrong usage; 3: the disk is full; 74: a shard
    became unreadable during reading; 129, 130, 143: interrupted.
    """


for command in (preview, inspect, bench, serve, status, stop):
    main.add_command(command)

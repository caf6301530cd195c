"""The command group `alexprep`."""

from __future__ import annotations

import click

from prep.cli.build import build_lmdb, import_caffe
from prep.cli.check import export_files, inspect, pca_stats, verify
from prep.cli.copy import copy
from prep.cli.join import join
from prep.cli.merge import merge
from prep.console import CONTEXT_SETTINGS, Group
from prep.version import version_option


@click.group(
    cls=Group,
    context_settings=CONTEXT_SETTINGS,
    resumable=("build-lmdb", "import-caffe", "export-files", "copy", "merge"),
)
@version_option
def main() -> None:
    """Prepare images for training: build a store of rescaled, checksummed records in a seeded order.

    \b
    Example:
      alexprep build-lmdb /data/ilsvrc --store store
      alexprep verify --store store
      alexprep pca-stats --store store

    Exit codes: 0: done; 1: an error to correct; 2: wrong usage; 3: the disk is full; 74: a shard
    became unreadable during reading; 129, 130, 143: interrupted.
    """


for command in (build_lmdb, join, import_caffe, merge, verify, inspect, export_files, pca_stats, copy):
    main.add_command(command)

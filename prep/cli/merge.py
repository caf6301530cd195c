"""`alexprep merge`: the command that merges stores into a new store."""

from __future__ import annotations

import time
from pathlib import Path

import click

from prep.build.report import report_build
from prep.cli.options import cluster_option, jobs_option, make_runner, path_for
from prep.console import json_option, progress, store_option


@click.command("merge")
@click.argument("sources", nargs=-1, required=True, metavar="STORE...", type=click.Path(path_type=Path))
@store_option
@click.option("--restart", is_flag=True, help="Discard an unfinished merge and start again.")
@jobs_option
@cluster_option
@json_option
def merge(
    sources: tuple[Path, ...], store: Path, restart: bool, jobs: int | None, cluster: str | None, as_json: bool
) -> None:
    """Merge two or more stores into a new store, without loss.

    The images of the records are copied byte for byte. Classes are joined by name: the classes of the first STORE keep
    their labels, and new classes of the other stores follow. All stores must have the same settings, except for the
    seed. The manifest of the new store lists the fingerprint of each split that was read. The STOREs are not changed.
    After an interruption the same command resumes the merge.

    \b
    Example:
      alexprep merge store more-photographs --store both
    """
    from prep.build.split_checks import check_store_folder
    from prep.merge.stores import count_records, merge_stores

    sources, store = tuple(path_for(cluster, path) for path in sources), path_for(cluster, store)
    check_store_folder(store)
    started = time.monotonic()
    records = count_records(sources)
    with make_runner(cluster, jobs) as workers, progress("merging", records, "records") as merge_progress:
        merged = merge_stores(sources, store, workers, merge_progress, restart)
    done = merge_progress.done - merge_progress.skipped
    for name in merged.splits:
        report_build(merged, name, done, time.monotonic() - started, as_json, "  already merged; nothing to do")

"""Commands of `alextrain` that look at the folders of runs, whoever trains in them meanwhile."""

from __future__ import annotations

from pathlib import Path

import click

from prep.console import json_option, one_line, print_json, say


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@json_option
def status(run_dir: Path, as_json: bool) -> None:
    """Where a run stands: steps, time left, last errors, last checkpoint; whether it is alive, and how it ended.

    It may be training meanwhile, in another process. Exit code 0 for any run, alive or dead.

    \b
    Example:
      alextrain status run
      alextrain status run --json
    """
    from train.runs.status import status_lines, status_of

    found = status_of(run_dir)
    if as_json:
        print_json(found)
        return
    for line in status_lines(found):
        click.echo(one_line(line))


@click.command()
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="compare.png",
    show_default=True,
    help="The picture of all learning curves: .png or .svg.",
)
@json_option
def compare(run_dirs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """In what runs differ, what errors they came to, and their learning curves in one picture.

    \b
    Example:
      alextrain compare run other
      alextrain compare ablations/*-seed0 --out ablations.svg
    """
    from train.report.compare import comparison_json, comparison_lines, draw_comparison, read_runs

    runs = read_runs(run_dirs)
    draw_comparison(runs, out)
    if as_json:
        print_json({**comparison_json(runs), "out": str(out)})
        return
    for line in comparison_lines(runs):
        click.echo(one_line(line))
    say(f"Drawn: {out}")

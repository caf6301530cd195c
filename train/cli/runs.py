"""`alextrain status` and `compare`: read run folders, even while other processes train the runs."""

from __future__ import annotations

from pathlib import Path

import click

from prep.console import json_option, print_json, print_line, say
from prep.files import output_file
from train.cli.options import run_argument
from train.runs.ensemble_dir import read_ensemble, with_members


@click.command()
@run_argument
@json_option
def status(run_dir: Path, as_json: bool) -> None:
    """Print the state of a run: steps, time left, errors, newest checkpoint, and whether the run's process is alive.

    For the folder of an ensemble, print the state of each member.

    The command also works while another process trains the run. For a run that has ended, the command prints how the
    run ended. The exit code is 0 for every run, even for a run that crashed.

    \b
    Example:
      alextrain status run
      alextrain status run --json
    """
    from train.runs.ensemble_status import ensemble_status, ensemble_status_lines
    from train.runs.status import status_lines, status_of

    ensemble = read_ensemble(run_dir)
    state = status_of(run_dir) if ensemble is None else ensemble_status(run_dir, ensemble)
    if as_json:
        print_json(state)
        return
    for line in status_lines(state) if ensemble is None else ensemble_status_lines(state):
        print_line(line)


@click.command()
@click.argument("run_dirs", metavar="RUN_DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    callback=output_file(".png", ".svg", kind="a figure is"),
    default="compare.png",
    show_default=True,
    help="File for the figure of all learning curves, .png or .svg.",
)
@json_option
def compare(run_dirs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare runs: print their error rates and the settings that differ, and draw all learning curves in one figure.

    The folder of an ensemble stands for all members of the ensemble.

    \b
    Example:
      alextrain compare run other
      alextrain compare ablations/*-seed0 --out ablations.svg
    """
    from train.report.compare import comparison_json, comparison_lines, draw_comparison, read_runs

    runs = read_runs(with_members(run_dirs))
    draw_comparison(runs, out)
    if as_json:
        print_json({**comparison_json(runs), "out": str(out)})
        return
    for line in comparison_lines(runs):
        print_line(line)
    say(f"Drawn: {out}")

"""Run the complete workflow on the demo's data set, from photographs to a trained and evaluated AlexNet.

    python -m tools.demo

The program prints and runs the commands that a user would type. If the workflow was interrupted, run the program again
to continue. If the workflow was finished, the program starts again from the beginning. The workflow takes a few minutes
on two cores.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from shlex import quote

import click

from prep.console import UserError, duration_text
from tools.photo_digits import CLASSES, make_dataset

COMMANDS = (
    "alexprep build-lmdb {0}/photographs --store {0}/store",
    "alexprep pca-stats --store {0}/store --plot {0}/colour.png",
    "alexstream preview {0}/preview.png --store {0}/store",
    "alextrain run --store {0}/store --run-dir {0}/run --recipe short --steps 232",
    "alextrain evaluate {0}/run --store {0}/store --views 10 --json",
    "alextrain report {0}/run --store {0}/store",
)
RESULTS = (
    ("preview.png", "photographs as the stream augments them"),
    ("colour.png", "principal components of the colours"),
    ("run/report.html", "the run on one page: errors, figures, recipe, machine"),
    ("run/metrics.jsonl", "all metrics of the run"),
)


def run_demo(folder: Path) -> None:
    """Run the workflow in `folder`. Raises UserError if a command fails."""
    started = time.monotonic()
    finished = folder / ".alexnet-demo-finished"
    if finished.exists():
        for name in ("photographs", "store", "run"):
            shutil.rmtree(folder / name, ignore_errors=True)
        finished.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "photographs").exists():
        click.secho(f"$ python -m tools.photo_digits {folder}/photographs", bold=True)
        make_dataset(folder / "photographs")
    errors: dict[str, float] = {}
    for command in COMMANDS:
        arguments = [part.format(folder) for part in command.split()]
        click.secho(f"$ {' '.join(arguments)}", bold=True)
        errors |= _run_command(arguments)
    finished.touch()
    click.secho(
        f"\nTop-1 error by ten views: {errors['top1_error']:.1%} on {errors['images']} validation photographs; random "
        f"guesses have an error of {1 - 1 / CLASSES:.0%}. The demo took {duration_text(time.monotonic() - started)}. "
        "Look at:",
        bold=True,
    )
    for name, description in RESULTS:
        click.echo(f"  {folder / name!s:32} {description}")
    if sys.prefix != sys.base_prefix:
        click.secho("\nTo use alexprep, alexstream and alextrain in this shell, run:", bold=True)
        click.echo(f"  . {activation_script()}")


def activation_script() -> str:
    """Return the path of the script that adds this virtual environment to PATH, such as `.venv/bin/activate`."""
    script = Path(sys.prefix) / "bin" / "activate"
    return quote(str(script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else script))


def _run_command(arguments: list[str]) -> dict[str, float]:
    """Run a command that is installed beside this Python, and show its output.

    If the command prints JSON, the JSON object is returned.
    """
    script = Path(sys.executable).parent / arguments[0]
    as_json = "--json" in arguments
    # Ctrl-C reaches this program and the command. This program ignores Ctrl-C; the command saves its state and ends.
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        with subprocess.Popen(
            [str(script), *arguments[1:]], stdout=subprocess.PIPE if as_json else None, text=True
        ) as process:
            output, _ = process.communicate()
    finally:
        signal.signal(signal.SIGINT, before)
    if process.returncode < 0 or process.returncode in (129, 130, 143):
        raise KeyboardInterrupt
    if process.returncode:
        raise UserError(f"`{' '.join(arguments)}` ended with exit code {process.returncode}.")
    if not as_json:
        return {}
    click.echo(output.strip())
    result: dict[str, float] = json.loads(output)
    return result


@click.command()
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default="demo",
    show_default=True,
    help="Folder for the photographs, the store and the run.",
)
def main(folder: Path) -> None:
    """Make photographs, build a store, preview the stream, train AlexNet, evaluate it and write a report."""
    try:
        run_demo(folder)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("Interrupted. `make demo` continues from here.") from None


if __name__ == "__main__":
    main()

"""The whole flow on the demo's data: photographs in, a trained and evaluated AlexNet out, in minutes on two cores.

    python -m tools.demo

Runs the product's own commands, as a user would type them, and shows each. Interrupted, it goes on where it was;
finished, it begins anew the next time.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import click

from prep.console import UserError, duration_text
from tools.photo_digits import CLASSES, make

STEPS = (
    "alexprep build-lmdb {0}/photographs --store {0}/store",
    "alexprep pca-stats --store {0}/store --plot {0}/colour.png",
    "alexstream preview {0}/preview.png --store {0}/store",
    "alextrain run --store {0}/store --run-dir {0}/run --recipe short --steps 232",
    "alextrain evaluate {0}/run --store {0}/store --views 10 --json",
    "alextrain report {0}/run --store {0}/store",
)
LOOK_AT = (
    ("preview.png", "what the stream does to a photograph"),
    ("colour.png", "the principal components of the colours"),
    ("run/report.html", "one page about the run: errors, what it learnt in pictures, recipe, machine"),
    ("run/metrics.jsonl", "every number of the run"),
)


def demo(folder: Path) -> None:
    """Run the flow in `folder`; raises UserError where a step fails."""
    started = time.monotonic()
    finished = folder / ".alexnet-demo-finished"
    if finished.exists():
        for made in ("photographs", "store", "run"):
            shutil.rmtree(folder / made, ignore_errors=True)
        finished.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "photographs").exists():
        click.secho(f"$ python -m tools.photo_digits {folder}/photographs", bold=True)
        make(folder / "photographs")
    errors = {}
    for step in STEPS:
        words = [word.format(folder) for word in step.split()]
        click.secho(f"$ {' '.join(words)}", bold=True)
        errors |= _run(words)
    finished.touch()
    click.secho(
        f"\nTen-view top-1 error {errors['top1_error']:.1%} on {errors['images']} photographs that it had not seen; "
        f"chance is {1 - 1 / CLASSES:.0%}. {duration_text(time.monotonic() - started)} in all. Look at:",
        bold=True,
    )
    for name, what in LOOK_AT:
        click.echo(f"  {folder / name!s:32} {what}")


def _run(words: list[str]) -> dict[str, float]:
    """Run a command of this environment, its output shown; returns what it says with --json."""
    script = Path(sys.executable).parent / words[0]
    as_json = "--json" in words
    before = signal.signal(signal.SIGINT, lambda *_: None)  # Ctrl-C reaches the command, which ends in its own time
    try:
        with subprocess.Popen(
            [str(script), *words[1:]], stdout=subprocess.PIPE if as_json else None, text=True
        ) as child:
            said, _ = child.communicate()
    finally:
        signal.signal(signal.SIGINT, before)
    if child.returncode < 0 or child.returncode in (129, 130, 143):
        raise KeyboardInterrupt
    if child.returncode:
        raise UserError(f"`{' '.join(words)}` ended with exit code {child.returncode}.")
    if not as_json:
        return {}
    click.echo(said.strip())
    answer: dict[str, float] = json.loads(said)
    return answer


@click.command()
@click.option(
    "--folder", type=click.Path(path_type=Path), default="demo", show_default=True, help="Where all of it goes."
)
def main(folder: Path) -> None:
    """Make photographs, build a store, preview the stream, train AlexNet, evaluate it, report what it learnt."""
    try:
        demo(folder)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        raise click.ClickException("Interrupted. `make demo` goes on from here.") from None


if __name__ == "__main__":
    main()

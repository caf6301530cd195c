"""The command group `alextrain`, to which every command is added."""

from __future__ import annotations

import click

from prep.console import CONTEXT_SETTINGS, Group
from prep.version import version_option
from train.cli.ablate import ablate
from train.cli.convert import export, import_
from train.cli.describe import recipe, summary
from train.cli.evaluate import evaluate
from train.cli.images import features, predict, search
from train.cli.results import figures, report
from train.cli.run import run
from train.cli.runs import compare, status


@click.group(cls=Group, context_settings=CONTEXT_SETTINGS, resumable=("run", "ablate"))
@version_option
def main() -> None:
    """The two-column AlexNet of Krizhevsky, Sutskever and Hinton (2012): train it, evaluate it, inspect it.

    \b
    Example:
      alextrain run --gpus 0,1 --store store
      alextrain evaluate run --views 10

    Exit codes: 0: done; 1: an error to correct; 2: wrong usage; 3: the disk is full; 130, 143: interrupted.
    """


for command in (
    run,
    summary,
    recipe,
    ablate,
    compare,
    evaluate,
    export,
    features,
    figures,
    import_,
    predict,
    report,
    search,
    status,
):
    main.add_command(command)

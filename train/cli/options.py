"""Options that commands of `alextrain` share. Choices come from train/config, which imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from train.config.architecture import ARCHITECTURES
from train.config.choices import ACTIVATIONS, CHECKPOINTS_KEPT, EVAL_VIEWS, POOLS_PX, PRECISIONS, SCHEDULES
from train.config.recipes import RECIPES

Command = Callable[..., Any]

gpus_option = click.option(
    "--gpus",
    metavar="0,1|0|cpu",
    help="0,1: a column on each GPU; 0: both on one; cpu.  [default: what the machine has]",
)
model_option = click.option(
    "--model",
    type=click.Choice(list(ARCHITECTURES)),
    default="alexnet",
    show_default=True,
    help="Which network of the family; see `alextrain summary --model`.",
)
recipe_option = click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="released",
    show_default=True,
    help="Every number of the training; see `alextrain recipe`.",
)

batch_option = click.option(
    "--batch", type=click.IntRange(1), metavar="N", help="Images in a batch.  [default: the recipe's]"
)
epochs_option = click.option(
    "--epochs", type=click.IntRange(1), metavar="N", help="Passes over the data, in all.  [default: the recipe's]"
)
steps_option = click.option(
    "--steps", type=click.IntRange(1), metavar="N", help="End after so many batches in all, if that comes first."
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Of parameters, order, windows, noise and dropout.",
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of convolutions and matrix products: float32, a GPU's TF32, or bfloat16 with float32 parameters and sums.",
)
accumulate_option = click.option(
    "--accumulate",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Compute a batch in N equal parts, one after the other: the same update, in less memory.",
)
keep_option = click.option(
    "--keep",
    type=click.IntRange(1),
    default=CHECKPOINTS_KEPT,
    show_default=True,
    metavar="K",
    help="Newest checkpoints to keep, beside the one with the lowest validation error.",
)
fork_option = click.option(
    "--fork",
    type=click.Path(path_type=Path),
    metavar="NEW_DIR",
    help="Begin a new run there with the newest checkpoint of --run-dir and the settings given here.",
)
checkpoint_option = click.option(
    "--checkpoint",
    metavar="best|last|FILE",
    default="last",
    show_default=True,
    help="The one with the lowest validation error, the newest, or a file.",
)
views_option = click.option(
    "--views",
    type=click.Choice(EVAL_VIEWS),
    default="10",
    show_default=True,
    help="The centre, or ten views, or a window each 32 px of the whole square at once; the softmax is averaged.",
)
set_option = click.option(
    "--set",
    "settings",
    metavar="FIELD=VALUE",
    multiple=True,
    help="Another number than the recipe's, as lr=0.02 or lrn.alpha=1e-4; `alextrain recipe` prints the names.",
)

_SETTINGS = (
    set_option,
    click.option("--activation", type=click.Choice(ACTIVATIONS), help="Short for --set activation=…"),
    click.option("--pool", type=click.Choice([str(px) for px in POOLS_PX]), help="Short for --set pool_px=…"),
    click.option("--schedule", type=click.Choice(SCHEDULES), help="Short for --set schedule=…"),
    click.option("--no-lrn", is_flag=True, help="Short for --set lrn=none --set within_map=none."),
    click.option("--no-dropout", is_flag=True, help="Short for --set dropout=0."),
    click.option(
        "--no-colour",
        is_flag=True,
        help="No colour noise: short for --set augmentation.colour=off --set augmentation.divisor=1.",
    ),
    click.option("--no-crossing", is_flag=True, help="Columns meet in fc8 alone: short for --set crossing=false."),
)


def recipe_settings(command: Command) -> Command:
    """Add --set and its shorthands to a command, which gets them all as `settings`, a list of FIELD=VALUE."""

    @wraps(command)
    def collected(
        *,
        settings: tuple[str, ...],
        activation: str | None,
        pool: str | None,
        schedule: str | None,
        no_lrn: bool,
        no_dropout: bool,
        no_colour: bool,
        no_crossing: bool,
        **others: Any,
    ) -> Any:
        short = {
            f"activation={activation}": activation,
            f"pool_px={pool}": pool,
            f"schedule={schedule}": schedule,
            "lrn=none within_map=none": no_lrn,
            "dropout=0": no_dropout,
            "augmentation.colour=off augmentation.divisor=1": no_colour,
            "crossing=false": no_crossing,
        }
        chosen = [word for words, given in short.items() if given for word in words.split()]
        return command(settings=[*settings, *chosen], **others)

    for option in reversed(_SETTINGS):
        collected = option(collected)
    return collected

"""Options that several commands of `alextrain` share.

Choices and defaults come from train/config, which does not import torch, so that --help stays fast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from prep.console import WrongArgument
from prep.images.limits import MAX_PIXELS
from train.config.architecture import ARCHITECTURES
from train.config.choices import (
    ACTIVATIONS,
    CHECKPOINTS_KEPT,
    EVAL_VIEWS,
    INDEX_RECORDS,
    MAX_COUNT,
    MAX_THREADS,
    POOLS_PX,
    PRECISIONS,
    SCHEDULES,
)
from train.config.recipes import RECIPES

Command = Callable[..., Any]

run_argument = click.argument("run_dir", type=click.Path(path_type=Path))
run_dir_option = click.option(
    "--run-dir", type=click.Path(path_type=Path), default="run", show_default=True, help="Folder of the run."
)
index_option = click.option(
    "--index",
    "index_records",
    type=click.IntRange(1),
    default=INDEX_RECORDS,
    show_default=True,
    metavar="N",
    help="Maximum number of training images to search through.",
)
run_store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="ALEXNET_STORE",
    show_envvar=True,
    help="Folder of the store that the images come from.  [default: the run's training store]",
)
gpus_option = click.option(
    "--gpus",
    metavar="0,1|0|cpu",
    help="Devices: 0,1 (one column on each GPU), 0 (both columns on one GPU) or cpu.  [default: the machine's GPUs, "
    "else cpu]",
)
training_gpus_option = click.option(
    "--gpus",
    metavar="0,1|0|cpu",
    help="Devices: 0,1 (one column on each GPU), 0 (both columns on one GPU) or cpu. Under torchrun, the number of "
    "GPUs of each process: 1, 2 (one column on each), or cpu.  [default: the machine's GPUs, else cpu]",
)
threads_option = click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    metavar="N",
    help="Number of CPU threads with which a process prepares images, and with --gpus cpu also computes the network.  "
    "[default: the number of usable cores; under torchrun, this number divided by the number of "
    "processes that share these cores]",
)
model_option = click.option(
    "--model",
    type=click.Choice(list(ARCHITECTURES)),
    default="alexnet",
    show_default=True,
    help="Network architecture; `alextrain summary --model NAME` prints the layers of an architecture.",
)
recipe_option = click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="released",
    show_default=True,
    help="Hyperparameters of the training; `alextrain recipe NAME` prints the hyperparameters of a recipe. The recipe "
    "large is for batches of 1,024 to 8,192 images, and is unproven on ImageNet.",
)

batch_option = click.option(
    "--batch",
    type=click.IntRange(1, MAX_COUNT),
    metavar="N",
    help="Number of images in a batch. With the recipe large, the learning rate is proportional to this number.  "
    "[default: the recipe's]",
)
epochs_option = click.option(
    "--epochs",
    type=click.IntRange(1, MAX_COUNT),
    metavar="N",
    help="Total number of passes over the training images.  [default: the recipe's]",
)
steps_option = click.option(
    "--steps",
    type=click.IntRange(1, MAX_COUNT),
    metavar="N",
    help="Total number of batches after which training ends, even within an epoch.  [default: no limit]",
)
seed_option = click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Seed of the initial parameters, record order, crops, colour noise and dropout.",
)
stream_seed_option = click.option(
    "--stream-seed",
    type=click.IntRange(0, 2**31 - 1),
    metavar="SEED",
    help="Seed of the record order, crops and colour noise. Runs with equal stream seeds train on the same batches.  "
    "[default: the value of --seed]",
)
members_option = click.option(
    "--members",
    type=click.IntRange(2, 1000),
    metavar="N",
    help="Train an ensemble of N networks on one stream. --run-dir gets a run folder for each network: member-1, "
    "member-2, and so on. Member k has the seed --seed + k. The stream has the seed --stream-seed, by default --seed. "
    "Each batch is decoded once.  [default: one network, or the members of the ensemble in --run-dir]",
)
one_at_a_time_option = click.option(
    "--one-at-a-time",
    is_flag=True,
    help="Train the members of an ensemble one after another. This needs the memory of only one network, but the "
    "stream is decoded once for each member. The trained parameters are the same, bit for bit, as without this option.",
)
_service_option = click.option(
    "--service",
    metavar="NAME[@HOST:PORT]",
    help="Name of the service that decodes and crops the images (see `alexstream serve`). HOST:PORT is the address of "
    "the head node of the service's Ray cluster.  [default: no service; this machine decodes the images]",
)
_service_fallback_option = click.option(
    "--service-fallback",
    type=click.Choice(["local"]),
    help="What to do if the service is lost. With `local`, this machine decodes the images, and the batches "
    "stay the same, bit for bit.  [default: the command ends with an error]",
)
_PRECISION_HELP = (
    "Number format of convolutions and matrix products: float32, a GPU's TF32, or bfloat16 with float32 parameters and "
    "sums."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help=_PRECISION_HELP,
)
training_precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help=f"{_PRECISION_HELP}  [default: bf16 for the recipe modern on GPUs that have bf16, otherwise fp32]",
)
deterministic_option = click.option(
    "--deterministic",
    is_flag=True,
    help="Use only algorithms that give the same bits in every run on the same kind of GPU. Steps may take longer.",
)
accumulate_option = click.option(
    "--accumulate",
    type=click.IntRange(1, MAX_COUNT),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of equal parts in which a batch is computed, one part after another. A larger number of parts needs "
    "less memory. Apart from rounding, the update does not depend on the number of parts.",
)
keep_option = click.option(
    "--keep",
    type=click.IntRange(1, MAX_COUNT),
    default=CHECKPOINTS_KEPT,
    show_default=True,
    metavar="K",
    help="Number of newest checkpoints to keep, in addition to the checkpoint with the lowest validation error.",
)


fork_option = click.option(
    "--fork",
    type=click.Path(path_type=Path),
    metavar="NEW_DIR",
    help="Folder of a new run, which starts from the newest checkpoint of --run-dir. The new run has the settings of "
    "the run in --run-dir. Options that you add replace these settings.",
)
max_pixels_option = click.option(
    "--max-pixels",
    type=click.IntRange(1),
    default=MAX_PIXELS,
    show_default=True,
    metavar="N",
    help="Largest number of pixels of a photograph.",
)
checkpoint_option = click.option(
    "--checkpoint",
    metavar="best|last|FILE",
    default="last",
    show_default=True,
    help="Checkpoint to load: best (lowest validation error), last (newest), or a file.",
)
views_option = click.option(
    "--views",
    type=click.Choice(EVAL_VIEWS),
    default="10",
    show_default=True,
    help="Crops of an image over which the softmax is averaged: 1 (centre), 10 (corners and centre, and their mirror "
    "images), or dense (every 32 px of the central square).",
)
set_option = click.option(
    "--set",
    "settings",
    metavar="FIELD=VALUE",
    multiple=True,
    help="Field of the recipe and its new value, as in lr=0.02 or lrn.alpha=1e-4; `alextrain recipe` prints all "
    "fields. Repeat the option for several fields.",
)

_SHORTHANDS = (
    click.option(
        "--activation",
        type=click.Choice(ACTIVATIONS),
        help="Nonlinearity of the hidden layers; short for --set activation=…  [default: the recipe's]",
    ),
    click.option(
        "--pool",
        type=click.Choice([str(px) for px in POOLS_PX]),
        help="Side of the pooling windows in px, at stride 2; short for --set pool_px=…  [default: the recipe's]",
    ),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help="Learning rate schedule; short for --set schedule=…  [default: the recipe's]",
    ),
    click.option(
        "--no-lrn",
        is_flag=True,
        help="No local response normalization; short for --set lrn=none --set within_map=none.",
    ),
    click.option("--no-dropout", is_flag=True, help="No dropout; short for --set dropout=0."),
    click.option(
        "--no-colour",
        is_flag=True,
        help="No colour noise; short for --set augmentation.colour=off --set augmentation.divisor=1.",
    ),
    click.option(
        "--no-crossing",
        is_flag=True,
        help="No connections between the columns before fc8; short for --set crossing=false.",
    ),
)


def service_options(command: Command) -> Command:
    """Add --service and --service-fallback to a command. Raises UserError for a fallback without a service."""

    @wraps(command)
    def with_service(*, service: str | None, service_fallback: str | None, **others: Any) -> Any:
        if service_fallback is not None and service is None:
            raise WrongArgument(f"--service-fallback {service_fallback}: no service is named. Pass --service NAME too.")
        return command(service=service, service_fallback=service_fallback, **others)

    for option in (_service_fallback_option, _service_option):
        with_service = option(with_service)
    return with_service


def recipe_settings(command: Command) -> Command:
    """Add --set and its short forms to a command.

    The command receives the values of these options as `settings`, a list of FIELD=VALUE.
    """

    @wraps(command)
    def with_settings(
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
        shorthands = {
            f"activation={activation}": activation,
            f"pool_px={pool}": pool,
            f"schedule={schedule}": schedule,
            "lrn=none within_map=none": no_lrn,
            "dropout=0": no_dropout,
            "augmentation.colour=off augmentation.divisor=1": no_colour,
            "crossing=false": no_crossing,
        }
        expanded = [setting for text, is_given in shorthands.items() if is_given for setting in text.split()]
        return command(settings=[*settings, *expanded], **others)

    for option in reversed((set_option, *_SHORTHANDS)):
        with_settings = option(with_settings)
    return with_settings

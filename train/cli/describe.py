"""`alextrain summary` and `recipe`: the layers of a network, and the hyperparameters of a recipe, as tables."""

from __future__ import annotations

import click

from prep.console import json_option, print_json, print_line
from train.cli.options import model_option, recipe_settings
from train.config.architecture import ARCHITECTURES
from train.config.recipes import RECIPES, recipe_note


@click.command()
@model_option
@click.option(
    "--classes",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Number of classes, which is the number of units of the last layer (fc8).",
)
@click.option(
    "--gpus",
    metavar="0,1|0|cpu",
    default="0,1",
    show_default=True,
    help="Devices to name in the table: 0,1 (two GPUs), 0 (one GPU) or cpu. The devices need not exist.",
)
@json_option
def summary(model: str, classes: int, gpus: str, as_json: bool) -> None:
    """Print the layers of a network: output shape, source of the input, neurons, parameters, multiply-adds, devices.

    \b
    Example:
      alextrain summary --classes 1000
      alextrain summary --model torchvision
    """
    from train.config.devices import check_device_count
    from train.model.summary import summary_json, summary_lines

    check_device_count(gpus)
    names = ["cpu"] if gpus == "cpu" else [f"GPU {index}" for index in gpus.split(",")]
    devices = names[0], names[-1]
    if as_json:
        print_json(summary_json(classes, devices, ARCHITECTURES[model]))
        return
    for line in summary_lines(classes, devices, ARCHITECTURES[model]):
        print_line(line)


@click.command()
@click.argument("name", type=click.Choice(list(RECIPES)), default="paper")
@recipe_settings
@json_option
def recipe(name: str, settings: list[str], as_json: bool) -> None:
    """Print the hyperparameters of a recipe: name (FIELD of --set), value and source.

    \b
    Example:
      alextrain recipe released
      alextrain recipe paper --set lr=0.02 --no-lrn
    """
    from dataclasses import asdict

    from train.config.overrides import recipe_with_overrides
    from train.config.recipe_table import rate_lines, recipe_lines

    chosen = recipe_with_overrides(name, settings)
    if as_json:
        print_json(asdict(chosen))
        return
    note = recipe_note(name)
    for line in [*recipe_lines(chosen), *([""] if note else []), *rate_lines(chosen), *([note] if note else [])]:
        print_line(line)

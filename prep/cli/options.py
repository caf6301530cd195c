"""Options that several commands of `alexprep` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from prep.console import (
    json_option,
)
from prep.store.manifest import FILTERS, FORMATS, SPLITS

if TYPE_CHECKING:
    pass


split_option = click.option(
    "--split", type=click.Choice(SPLITS), default="train", show_default=True, help="Which split."
)


jobs_option = click.option(
    "--jobs", type=click.IntRange(1, 1024), metavar="N", help="Worker processes.  [default: all cores]"
)


def record_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide what a record is, and what happens on the way to it."""
    for option in reversed(
        (
            click.option(
                "--side", type=click.IntRange(32, 4096), default=256, show_default=True, help="Shorter side, px."
            ),
            click.option("--keep-aspect", is_flag=True, help="Keep the whole picture, not its central square."),
            click.option(
                "--format", type=click.Choice(FORMATS), default="jpeg", show_default=True, help="Of each record."
            ),
            click.option("--quality", type=click.IntRange(1, 100), default=90, show_default=True, help="JPEG quality."),
            click.option(
                "--filter",
                type=click.Choice(FILTERS),
                default="area",
                show_default=True,
                help="Rescaling filter; area enlarges by bicubic.",
            ),
            click.option(
                "--seed",
                type=click.IntRange(0, 2**63 - 1),
                default=0,
                show_default=True,
                help="Of the order of the records.",
            ),
            click.option(
                "--on-bad",
                type=click.Choice(["fail", "skip"]),
                default="fail",
                show_default=True,
                help="An input that is no picture: stop, or leave it out and say so.",
            ),
            click.option(
                "--max-bad",
                type=click.IntRange(0),
                metavar="N",
                help="Leave out at most N, then stop (as --on-bad skip).",
            ),
            click.option("--restart", is_flag=True, help="Discard what an unfinished build of the split left."),
            jobs_option,
            json_option,
        )
    ):
        command = option(command)
    return command

"""The command group `alextrain`, to which all commands are added."""

from __future__ import annotations

import sys
from typing import Any

import click

from prep.console import CONTEXT_SETTINGS, Group, WrongArgument
from prep.version import version_option
from train.cli.ablate import ablate
from train.cli.convert import export, import_
from train.cli.describe import recipe, summary
from train.cli.evaluate import evaluate
from train.cli.images import features, predict, search
from train.cli.results import figures, report
from train.cli.run import run
from train.cli.runs import compare, status
from train.replicas.errors import OtherReplicaFailed, is_stop
from train.replicas.torchrun import prints_errors, torchrun_rank, wait_for_message, write_error_file

FOR_REPLICAS = ("run", "ablate", "evaluate")  # commands that the processes of torchrun run together


class TorchrunGroup(Group):
    """A command group whose messages are printed once under torchrun, not once by each process."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Find a command. With several processes of torchrun, only FOR_REPLICAS and `--help` are allowed."""
        name, command, rest = super().resolve_command(ctx, args)
        _, size = torchrun_rank()
        if size > 1 and name not in FOR_REPLICAS and not {"-h", "--help"} & set(rest):
            together = f"{', '.join(FOR_REPLICAS[:-1])} and {FOR_REPLICAS[-1]}"
            raise WrongArgument(
                f"alextrain {name} runs in one process, but torchrun has started {size}. Start this command without "
                f"torchrun: alextrain {name} … (Only the commands {together} can use several processes.)"
            )
        return name, command, rest

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. If the command fails, torchrun's report of failed processes also shows the error."""
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            write_error_file(f"Error: {error.format_message()}", prints_errors())
            if not prints_errors() and wait_for_message():
                ctx.exit(error.exit_code)
            raise
        except OtherReplicaFailed as error:
            if is_stop(error.kind):
                self.say_interrupted(ctx)
            write_error_file("Stopped, because another replica has failed.", is_own=False)
            raise

    def say_interrupted(self, ctx: click.Context) -> None:
        """Print, on rank 0, that the command was interrupted.

        Nothing is printed if this rank was already ending, because of another rank's error, when the signal came.
        """
        error = sys.exception()
        while error is not None and (not isinstance(error, OtherReplicaFailed) or is_stop(error.kind)):
            error = error.__context__
        if error is None and torchrun_rank()[0] == 0:
            super().say_interrupted(ctx)


@click.group(cls=TorchrunGroup, context_settings=CONTEXT_SETTINGS, resumable=("run", "ablate"))
@version_option
def main() -> None:
    """The two-column AlexNet of Krizhevsky, Sutskever and Hinton (2012): train it, evaluate it, inspect it.

    \b
    Example:
      alextrain run --gpus 0,1 --store store
      alextrain evaluate run --views 10

    Exit codes: 0: done; 1: an error to correct; 2: wrong usage; 3: the disk is full; 74: a shard
    became unreadable during reading; 129, 130, 143: interrupted.
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

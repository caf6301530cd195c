"""Command groups: errors in one line, exit codes, interrupts, and the options that several commands have."""

from __future__ import annotations

import errno
import math
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import click

from prep.console.errors import Terminated, UserError
from prep.console.machine import memory_error
from prep.console.output import prepare_streams, say
from prep.console.text import did_you_mean, escaped

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class FiniteRange(click.FloatRange):
    """A number in a range, as for click.FloatRange, except that NaN is refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number. Raises click.BadParameter for a number outside of the range, and for NaN."""
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number.", param, ctx)
        return number


# Options that several commands have.
store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    default="store",
    show_default=True,
    envvar="ALEXNET_STORE",
    show_envvar=True,
    help="Folder of the store.",
)


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON: one object a line.")


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


@contextmanager
def _escaped_usage_errors() -> Iterator[None]:
    """Make click's own errors one line of text with escaped control characters."""
    try:
        yield
    except click.MissingParameter as error:  # the message has a line for each choice of the option
        raise click.UsageError(" ".join(error.format_message().split()), error.ctx) from None
    except ValueError as error:
        if "embedded null" not in str(error):
            raise
        raise click.UsageError("An argument contains the character NUL, which a file name cannot contain.") from None
    except click.ClickException as error:
        vars(error)["message"] = escaped(error.message)  # click declares the attribute as final
        raise


class _CommandFailed(click.ClickException):
    """Makes click print one line to standard error and exit with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(escaped(message))
        self.exit_code = exit_code  # type: ignore[misc]  # click reads exit_code from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line.

        If standard error cannot be written, for example on a full disk, only the exit code reports the error.
        """
        with suppress(OSError):
            super().show(file)


def _system_error_text(error: OSError) -> str:
    text = error.strerror or str(error)
    if "usable temporary directory" in text:  # the message of tempfile, which lists the folders
        return f"{text}. Set the variable TMPDIR to a folder in which you can write."
    place = error.filename or "the system"  # most likely, the user passed the path that failed
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{place}: {text}. Ask the owner of the folder for permission, or name another folder."
    return f"{place}: {text}."


class Group(click.Group):
    """A command group that prints a UserError as one line. The exit code after signal n is 128 + n (Ctrl-C: 130).

    `resumable` has the names of the commands that continue interrupted work when they are run again. Other commands
    start from the beginning.
    """

    def __init__(self, *args: Any, resumable: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resumable = resumable

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Call prepare_streams, then run the command line. Parameters and result are those of click.Group.main."""
        prepare_streams()
        return super().main(*args, **kwargs)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the options that come before the name of the command. Raises click.UsageError for a wrong option."""
        with _escaped_usage_errors():
            return super().make_context(*args, **kwargs)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """Return the command that `args` names. Raises click.UsageError for an empty argument.

        An empty argument is most likely a variable of the shell that is not set. As a path, an empty argument would
        mean the current folder.
        """
        for before, arg in zip(["", *args], args, strict=False):
            if not arg or re.fullmatch(r"--[a-z][a-z-]*=", arg):
                option = arg.rstrip("=") or (before if before.startswith("--") else "an argument")
                raise click.UsageError(f"{option}: the value is empty. Give a value, or leave out the option.", ctx)
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises click.ClickException for UserError or OSError. Exits with 128 + n on signal n."""
        signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            with _escaped_usage_errors():
                return super().invoke(ctx)
        except click.BadParameter as error:
            if error.param is not None and isinstance(error.param.type, click.Choice):
                choices = [str(choice) for choice in error.param.type.choices]
                hint = did_you_mean(error.message.partition("'")[2].partition("'")[0], choices)
                raise click.BadParameter(error.message + hint, error.ctx, error.param, error.param_hint) from None
            raise
        except UserError as error:
            raise _CommandFailed(str(error), error.exit_code) from error
        except BrokenPipeError:
            raise  # click itself handles a closed pipe
        except Exception as error:
            if (full := memory_error(error)) is not None:
                raise _CommandFailed(str(full), full.exit_code) from error
            if not isinstance(error, OSError):
                raise
            raise _CommandFailed(_system_error_text(error), 1) from error
        except (KeyboardInterrupt, Terminated) as stop:
            self.say_interrupted(ctx)
            ctx.exit(128 + (stop.signum if isinstance(stop, Terminated) else signal.SIGINT))

    def say_interrupted(self, ctx: click.Context) -> None:
        """Print that the command was interrupted, and what the same command does when it is run again."""
        effect = "continue from here" if ctx.invoked_subcommand in self.resumable else "start over"
        say(f"Interrupted. Run the same command again to {effect}.")

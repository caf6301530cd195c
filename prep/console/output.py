"""Lines of output, in which control characters are escaped. Every command prints with the functions of this module.

Results go to standard output. Messages, warnings and progress go to standard error, so `command --json | jq` always
works. tests/test_terminal.py refuses other ways to print.
"""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import click

from prep.console.errors import disk_error
from prep.console.text import escaped

_displays: list[Callable[[str], None]] = []  # the function that prints a line above the live display, if there is one


def print_above(display: Callable[[str], None] | None) -> None:
    """Make `say` call `display`, a function that prints a line above a live display.

    With None, `say` prints directly again.
    """
    _displays[:] = [] if display is None else [display]


_is_prepared = False  # whether prepare_streams has run in this process


def prepare_streams() -> None:
    """Make the standard streams usable for a command, however the command was started.

    A closed standard stream (`command >&-`) is opened on /dev/null. Otherwise, the next file that the command opens,
    such as a shard, would get the number of the stream. A C library would then write its messages into this file.

    A character that the encoding of standard output lacks is printed as an escape. Control characters are also escaped
    in tracebacks and in Python's warnings, whose text may come from a file.
    """
    global _is_prepared
    if not _is_prepared:
        _is_prepared = True
        sys.excepthook = _print_traceback
        format_warning = warnings.formatwarning
        warnings.formatwarning = lambda *args, **kwargs: _escaped_lines(format_warning(*args, **kwargs))
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the new descriptor gets the lowest free number, which is `number`
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # Python does the same for standard error


def _print_traceback(kind: type[BaseException], error: BaseException, at: TracebackType | None) -> None:
    import traceback

    with suppress(OSError):
        click.echo(_escaped_lines("".join(traceback.format_exception(kind, error, at))), err=True, nl=False)


def _escaped_lines(text: str) -> str:
    return "\n".join(map(escaped, text.split("\n")))


def print_line(text: str = "") -> None:
    """Print one line to standard output. Control characters in `text` are escaped, including newlines.

    Raises BrokenPipeError if the reader of a pipe has ended, DiskFull if the output is a file on a full disk, and
    UserError if standard output cannot be written for another reason.
    """
    _print_result(escaped(text))


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on one line of standard output.

    JSON escapes all characters outside ASCII and all control characters, so a program that parses the line gets every
    name unchanged. Raises the same exceptions as print_line.
    """
    _print_result(json.dumps(data))


def _print_result(line: str) -> None:
    try:
        click.echo(line)
    except BrokenPipeError:
        raise  # click itself handles a closed pipe
    except OSError as error:
        raise disk_error(error, f"standard output cannot be written: {error.strerror or error}.") from None


def say(text: str) -> None:
    """Print one line to standard error. Control characters in `text` are escaped, including newlines.

    A failure to print, such as a closed pipe or a full disk, is ignored.
    """
    with suppress(OSError):
        if _displays:
            _displays[0](escaped(text))
        else:
            click.echo(escaped(text), err=True)

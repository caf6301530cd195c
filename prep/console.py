"""Command-line input and output: one-line errors, exit codes, interrupts, progress with rate and ETA, `--json`.

ETA is the estimated time that is left. alexprep, alexstream and alextrain share this module. Results go to standard
output. Messages, warnings and progress go to standard error, so `command --json | jq` always works.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import IO, Any, NoReturn

import click

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

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


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line. The message says what is wrong, with the actual and the expected value, and what the user
    can do.
    """

    exit_code = 1


class WrongArgument(UserError):
    """An option or argument that the command cannot take: malformed, out of range, or in conflict with another option.

    click exits with the same code for unknown commands and options.
    """

    exit_code = 2


class DiskFull(UserError):
    """A file cannot grow, because the disk or a quota is full, or because the file has the largest allowed size."""

    exit_code = 3


def disk_error(error: OSError, text: str) -> UserError:
    """Return the exception for a failed write: DiskFull if the file cannot grow, otherwise UserError.

    `text` is the message of the exception.
    """
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DiskFull(text) if full else UserError(text)


class Terminated(BaseException):
    """SIGTERM or another terminating signal as an exception. Clean-up code then runs as after Ctrl-C."""

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__()
        self.signum = signum


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class _CommandFailed(click.ClickException):
    """Makes click print one line to standard error and exit with `exit_code`."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(one_line(message))
        self.exit_code = exit_code  # type: ignore[misc]  # click reads exit_code from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the line.

        If standard error cannot be written, for example on a full disk, only the exit code reports the error.
        """
        with suppress(OSError):
            super().show(file)


class Group(click.Group):
    """A command group that prints a UserError as one line. The exit code after signal n is 128 + n (Ctrl-C: 130).

    `resumable` has the names of the commands that continue interrupted work when they are run again. Other commands
    start from the beginning.
    """

    def __init__(self, *args: Any, resumable: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resumable = resumable

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises click.ClickException for UserError or OSError. Exits with 128 + n on signal n."""
        signal.signal(signal.SIGTERM, _on_sigterm)
        try:
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
        except OSError as error:  # the user most likely passed the path that failed
            raise _CommandFailed(f"{error.filename or 'the system'}: {error.strerror or error}.", 1) from error
        except (KeyboardInterrupt, Terminated) as stop:
            self.say_interrupted(ctx)
            ctx.exit(128 + (stop.signum if isinstance(stop, Terminated) else signal.SIGINT))

    def say_interrupted(self, ctx: click.Context) -> None:
        """Print that the command was interrupted, and what the same command does when it is run again."""
        effect = "continue from here" if ctx.invoked_subcommand in self.resumable else "start over"
        say(f"Interrupted. Run the same command again to {effect}.")


_displays: list[Callable[[str], None]] = []  # the function that prints a line above the live display, if there is one


def print_above(display: Callable[[str], None] | None) -> None:
    """Let `say` print with `display`, which prints a line above a live display.

    With None, `say` prints directly again.
    """
    _displays[:] = [] if display is None else [display]


def say(text: str) -> None:
    """Print one line to standard error. A failure to print, such as a closed pipe or a full disk, is ignored."""
    with suppress(OSError):
        if _displays:
            _displays[0](one_line(text))
        else:
            click.echo(one_line(text), err=True)


def one_line(text: str) -> str:
    """Return `text` with escaped control characters, because file names may contain newlines and terminal escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def did_you_mean(value: object, allowed: Sequence[str]) -> str:
    """Return ` Did you mean released?` with the values of `allowed` that are most similar to `value`.

    Returns "" if no value is similar.
    """
    similar = get_close_matches(str(value), allowed, 2, 0.5)
    return f" Did you mean {' or '.join(similar)}?" if similar else ""


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on one line of standard output."""
    click.echo(json.dumps(data))


def count_noun(n: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: `1 image`, `1,797 images`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def shell_quoted(path: Path) -> str:
    """Return a path quoted for a shell command that the user copies: `'my run'`."""
    return quote(str(path))


def duration_text(seconds: float) -> str:
    """Return a duration as text: `48 s`, `3 min 20 s`, `1 h 05 min`."""
    rounded_s = round(seconds)
    if rounded_s < 60:
        return f"{rounded_s} s"
    if rounded_s < 3600:
        return f"{rounded_s // 60} min {rounded_s % 60:02d} s"
    return f"{rounded_s // 3600} h {rounded_s % 3600 // 60:02d} min"


def bytes_text(n: float) -> str:
    """Return a number of bytes as text, in powers of 1000: `812 B`, `27.4 KB`, `31.2 GB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < (999.5 if unit == "B" else 999.95):
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use.

    Containers and taskset limit the number of usable cores.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory(max_bytes: int, map_large_blocks: bool) -> None:
    """Make glibc's malloc keep up to `max_bytes` of freed memory for later allocations.

    By default, glibc returns every large freed block to the kernel. The kernel must then zero new pages for the next
    allocation. Zeroing took half of the time to rescale a photograph, and a quarter of the time of AlexNet's training
    step. With `map_large_blocks`, blocks of more than 32 MiB are still returned to the kernel at once. If the C library
    is not glibc, nothing changes.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if map_large_blocks:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    else:
        mallopt(-4, 0)  # M_MMAP_MAX: largest number of blocks that malloc may allocate with mmap
    mallopt(-1, max_bytes)  # M_TRIM_THRESHOLD: free bytes to keep at the top of the heap


class Progress:
    """Count of finished work, with rate and time left (ETA).

    Call `advance(n)`, or call `update(done)` if the caller counts the work itself.
    """

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.started = total, unit, time.monotonic()
        self.done = 0  # units that are finished, out of `total`
        self.skipped = 0  # units of `done` that an earlier run finished; they do not count in the rate
        self.bad = 0  # bad inputs or records, including those that earlier runs found
        self.size_bytes = 0  # bytes that this run wrote

    def skip(self, n: int) -> None:
        """Count `n` units that were finished before this run."""
        self.skipped += n
        self.update(self.done + n)

    def advance(self, n: int = 1) -> None:
        """Count `n` more finished units."""
        self.update(self.done + n)

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        """Set the totals. `done` and `bad` include the work of earlier runs. `size_bytes` counts only this run."""
        self.done, self.bad, self.size_bytes = done, bad, size_bytes

    def rate(self) -> float:
        """Return the average number of units that this run has finished per second since its start."""
        return (self.done - self.skipped) / max(time.monotonic() - self.started, 1e-9)

    def eta_s(self) -> float:
        """Return the seconds left, estimated from the average rate of this run."""
        return max(0, self.total - self.done) / max(self.rate(), 1e-9)

    def notes(self) -> list[str]:
        """Return texts with the bytes written and with the number of bad inputs.

        A text is left out if its number is 0.
        """
        return [bytes_text(self.size_bytes)] * bool(self.size_bytes) + [f"{self.bad:,} bad"] * bool(self.bad)


class _ProgressLines(Progress):
    """Progress as lines of text or JSON, at most one every `every_s` seconds.

    The first line is printed after `every_s` seconds.
    """

    def __init__(self, label: str, total: int, unit: str, as_json: bool, every_s: float = 5.0) -> None:
        super().__init__(total, unit)
        self.label, self.as_json, self.every_s, self.last_printed = label, as_json, every_s, time.monotonic()

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        super().update(done, bad, size_bytes)
        now = time.monotonic()
        if now - self.last_printed >= self.every_s and done:
            self.last_printed = now
            say(self._json_line() if self.as_json else self._text_line())

    def _json_line(self) -> str:
        line: dict[str, Any] = {"progress": self.label, "done": self.done, "total": self.total, "unit": self.unit}
        eta_s = round(self.eta_s()) if self.done > self.skipped else None
        line |= {f"{self.unit}_per_s": round(self.rate(), 1), "eta_s": eta_s}
        if self.size_bytes or self.bad:
            line |= {"bad": self.bad, "bytes": self.size_bytes}
        return json.dumps(line, ensure_ascii=False)

    def _text_line(self) -> str:
        parts = [f"{self.label}: {self.done:,} of {self.total:,} {self.unit}", f"{self.rate():,.1f} {self.unit}/s"]
        if self.done > self.skipped:
            parts.append(f"{duration_text(self.eta_s())} left")
        return ", ".join(parts + self.notes())


class _ProgressBar(Progress):
    """Progress as a rich bar on a terminal."""

    def __init__(self, label: str, total: int, unit: str, bar: Any) -> None:
        super().__init__(total, unit)
        self.bar, self.task = bar, bar.add_task(label, total=total, rate="", note="")

    def update(self, done: int, bad: int = 0, size_bytes: int = 0) -> None:
        super().update(done, bad, size_bytes)
        rate = f"{self.rate():,.0f} {self.unit}/s"
        self.bar.update(self.task, completed=done, rate=rate, note=", ".join(self.notes()))


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """Show progress with rate and time left (ETA) on standard error: as a bar on a terminal, otherwise as lines.

    The lines are JSON objects if the running command has the option --json, and otherwise text.
    """
    if not sys.stderr.isatty():
        context = click.get_current_context(silent=True)
        yield _ProgressLines(label, total, unit, as_json=context is not None and bool(context.params.get("as_json")))
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _ProgressBar(label, total, unit, bar)

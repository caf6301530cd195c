"""How a command speaks: errors in one line, progress with rate and ETA, `--json` for programs.

All three commands share this; it knows nothing of pictures. Results go to standard output, everything said on the
way to standard error, so `command --json | jq` always works.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from types import FrameType
from typing import IO, Any, NoReturn

import click

CONTEXT_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}

# Options that commands share.
store_option = click.option(
    "--store",
    type=click.Path(path_type=Path),
    default="store",
    show_default=True,
    envvar="ALEXNET_STORE",
    show_envvar=True,
    help="Folder of the store.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line on standard output.")


class UserError(ValueError):
    """Something the user can mend: what is wrong, with both values, then what to do. Printed as one line."""

    exit_code = 1


class DiskFull(UserError):
    """There is no room for what is to be written."""

    exit_code = 3


def disk_error(error: OSError, text: str) -> UserError:
    """What to raise for an error of the disk: DiskFull where a disk, a quota or a file has no room left."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return DiskFull(text) if full else UserError(text)


class Terminated(BaseException):
    """SIGTERM, or another signal that ends a process, raised so that clean-up runs as it does for Ctrl-C."""

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__()
        self.signum = signum


def _on_sigterm(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


class _Shown(click.ClickException):
    """One line on standard error, and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(one_line(message))
        self.exit_code = exit_code  # type: ignore[misc]  # click reads it from the instance

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it; where that cannot be, as on a full disk, the exit code still tells."""
        with suppress(OSError):
            super().show(file)


class Group(click.Group):
    """A command group that turns a user's mistake into one line, and Ctrl-C into exit code 130 (SIGTERM: 143).

    `resumable` names the commands that keep what they have done when interrupted; the others begin again.
    """

    def __init__(self, *args: Any, resumable: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.resumable = resumable

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; raises click.ClickException for UserError, exits 130 or 143 when interrupted."""
        signal.signal(signal.SIGTERM, _on_sigterm)
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _Shown(str(error), error.exit_code) from error
        except BrokenPipeError:
            raise  # click knows what to do
        except OSError as error:  # of a path that a command was given, most likely
            raise _Shown(f"{error.filename or 'the system'}: {error.strerror or error}.", 1) from error
        except (KeyboardInterrupt, Terminated) as stop:
            then = "goes on from here" if ctx.invoked_subcommand in self.resumable else "begins again"
            say(f"Interrupted. The same command {then}.")
            ctx.exit(128 + (stop.signum if isinstance(stop, Terminated) else signal.SIGINT))


def say(text: str) -> None:
    """One line to a person, on standard error; where that is closed, or full, the work goes on unheard."""
    with suppress(OSError):
        click.echo(one_line(text), err=True)


def one_line(text: str) -> str:
    """With control characters written out: a file's name may hold a line's end, or what steers a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_json(data: dict[str, Any]) -> None:
    """One JSON object on one line of standard output, for programs."""
    click.echo(json.dumps(data))


def count_noun(n: int, noun: str, plural: str = "") -> str:
    """`1 picture`, `1,797 pictures`."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def shell_quoted(path: Path) -> str:
    """A path as an argument in a command that is to be copied into a shell: `'my run'`."""
    return quote(str(path))


def duration_text(seconds: float) -> str:
    """`48 s`, `3 min 20 s`, `1 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(n: float) -> str:
    """`812 B`, `27.4 KB`, `31.2 GB`, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(n) < (999.5 if unit == "B" else 999.95):
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.1f} TB"


def usable_cores() -> int:
    """Cores this process may run on, which a container or taskset can make fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory(most_bytes: int, map_large_blocks: bool) -> None:
    """Have the C library keep up to `most_bytes` of freed memory for the next arrays.

    glibc otherwise gives every large block back to the kernel and pays for fresh, zeroed pages each time: measured,
    half of rescaling a photograph and a quarter of AlexNet's step. With `map_large_blocks` those over 32 MiB still go
    back at once. Does nothing where the C library is another.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    if map_large_blocks:
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD
    else:
        mallopt(-4, 0)  # M_MMAP_MAX: no block has a mapping of its own
    mallopt(-1, most_bytes)  # M_TRIM_THRESHOLD: what is kept at the heap's top


class Progress:
    """Counts work towards a total. `advance(n)`, or `update(done)` where the count is kept elsewhere."""

    def __init__(self, total: int, unit: str) -> None:
        self.total, self.unit, self.started = total, unit, time.monotonic()
        self.done = 0  # of `total`
        self.skipped = 0  # of `done`, by an earlier run: they tell nothing of the rate
        self.bad = self.size = 0

    def skip(self, n: int) -> None:
        """`n` units were done before this run."""
        self.skipped += n
        self.update(self.done + n)

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self.update(self.done + n)

    def update(self, done: int, bad: int = 0, size: int = 0) -> None:
        """`done` units are done in all; this run met `bad` bad ones and made `size` bytes."""
        self.done, self.bad, self.size = done, bad, size

    def rate(self) -> float:
        """Units per second since the start of this run."""
        return (self.done - self.skipped) / max(time.monotonic() - self.started, 1e-9)

    def eta_s(self) -> float:
        """Seconds left at the present rate."""
        return max(0, self.total - self.done) / max(self.rate(), 1e-9)


class _Lines(Progress):
    """A JSON object a line, one every `every_s` seconds, for logs and programs. Shorter work prints nothing."""

    def __init__(self, label: str, total: int, unit: str, every_s: float = 5.0) -> None:
        super().__init__(total, unit)
        self.label, self.every_s, self.last = label, every_s, time.monotonic()

    def update(self, done: int, bad: int = 0, size: int = 0) -> None:
        super().update(done, bad, size)
        now = time.monotonic()
        if now - self.last >= self.every_s and done:
            self.last = now
            line: dict[str, Any] = {"progress": self.label, "done": done, "total": self.total, "unit": self.unit}
            eta_s = round(self.eta_s()) if done > self.skipped else None
            line |= {f"{self.unit}_per_s": round(self.rate(), 1), "eta_s": eta_s}
            if size or bad:
                line |= {"bad": bad, "bytes": size}
            say(json.dumps(line, ensure_ascii=False))


class _Bar(Progress):
    """A rich progress bar for a terminal."""

    def __init__(self, label: str, total: int, unit: str, bar: Any) -> None:
        super().__init__(total, unit)
        self.bar, self.task = bar, bar.add_task(label, total=total, rate="", note="")

    def update(self, done: int, bad: int = 0, size: int = 0) -> None:
        super().update(done, bad, size)
        note = ", ".join([bytes_text(size)] * bool(size) + [f"{bad:,} bad"] * bool(bad))
        self.bar.update(self.task, completed=done, rate=f"{self.rate():,.0f} {self.unit}/s", note=note)


@contextmanager
def progress(label: str, total: int, unit: str) -> Iterator[Progress]:
    """A bar on a terminal, lines of JSON elsewhere; both with rate and time left, both on standard error."""
    if not sys.stderr.isatty():
        yield _Lines(label, total, unit)
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
        yield _Bar(label, total, unit, bar)

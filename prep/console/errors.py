"""Errors that end a command with one line, their exit codes, and termination by a signal."""

from __future__ import annotations

import errno
import signal

from prep.console.text import escaped


class UserError(ValueError):
    """An error that the user can fix.

    The message is one line. The message says what is wrong, with the actual and the expected value, and what the user
    can do. Text in the message that comes from a file or an option is shown with escaped control characters.
    """

    exit_code = 1

    def __str__(self) -> str:
        return escaped(super().__str__())


class WrongArgument(UserError):
    """An option or argument that the command cannot take: malformed, out of range, or in conflict with another option.

    The exit code is 2, which click also uses for unknown commands and options.
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
    """SIGTERM or another terminating signal, raised as an exception so that clean-up code runs as after Ctrl-C."""

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__()
        self.signum = signum

"""Errors of a group of replicas. One rank prints the error, and all ranks end with the same exit code."""

from __future__ import annotations

from prep.console import Terminated, UserError


class ReplicaLost(UserError):
    """A replica has ended, or did not take part in an exchange within the time-out.

    The message names the rank of the replica.
    """


def is_stop(kind: str) -> bool:
    """Return whether `kind` is the name of an exception class that a signal raises."""
    return kind in (Terminated.__name__, KeyboardInterrupt.__name__)


class OtherReplicaFailed(SystemExit):
    """Ends this process without output, because another rank prints the error."""

    def __init__(self, text: str, code: int, kind: str) -> None:
        """Store the message, the exit code and the exception class of the other rank."""
        super().__init__(code)
        self.text, self.kind = text, kind

    def __str__(self) -> str:
        """Return the message that the other rank printed."""
        return self.text

"""Errors of a group of replicas. Each error is printed by one rank; the other ranks end with the same exit code."""

from __future__ import annotations

from prep.console import UserError


class ReplicaLost(UserError):
    """A replica has ended, or did not take part in an exchange within the time-out. The message names its rank."""


class OtherReplicaFailed(SystemExit):
    """Ends this process without output, because another rank has printed the error. `code` is the exit code."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(code)
        self.text = text

    def __str__(self) -> str:
        """Return the message that the other rank printed."""
        return self.text

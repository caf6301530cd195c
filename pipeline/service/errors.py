"""Errors of the service. Each error is one line for the user."""

from __future__ import annotations

from prep.console import UserError


def last_line(error: Exception) -> str:
    """Return the last line of the text of a Ray error, which names the cause.

    A line of more than 300 characters is cut after 300 characters.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [repr(error)])[-1][:300]


class ServiceError(UserError):
    """A service cannot be used: the service does not exist, serves another store, or sent an unexpected answer."""


class ServiceLost(ServiceError):
    """A service no longer answers, because the service was stopped or its cluster ended."""

"""Errors of the service, as one line for the user."""

from __future__ import annotations

from prep.console import UserError


def last_line(error: Exception) -> str:
    """The last line of an error of Ray, which names the cause, cut after 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [repr(error)])[-1][:300]


class ServiceError(UserError):
    """The service cannot give a batch: it does not exist, it has another store, or it sent something unexpected."""


class ServiceLost(ServiceError):
    """The service was there and no longer answers: it was stopped, or its cluster is gone."""

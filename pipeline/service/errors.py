"""Errors of the service, as one line for the user."""

from __future__ import annotations

from prep.console import UserError


class ServiceError(UserError):
    """The service cannot give a batch: it does not exist, it has another store, or it sent something unexpected."""


class ServiceLost(ServiceError):
    """The service was there and no longer answers: it was stopped, or its cluster is gone."""

"""State of a service, as a loader reports it."""

from __future__ import annotations

from typing import NamedTuple


class ServiceStatus(NamedTuple):
    """State of the service that a loader uses, as of the last answer of the service."""

    name: str  # name of the service
    workers: int  # number of workers that are ready
    queue: int  # number of batches that wait for a worker, for all consumers together
    # "connected", or "local" after the service was lost and the loader makes the batches from the local store
    state: str

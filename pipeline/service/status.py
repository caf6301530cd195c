"""What a loader knows about its service."""

from __future__ import annotations

from typing import NamedTuple


class ServiceStatus(NamedTuple):
    """State of the service that a loader uses, as of the last answer of the service."""

    name: str  # name of the service
    workers: int  # number of workers that are ready
    queue: int  # number of batches that wait for a worker, of all consumers
    # "connected", or "local" after the service was lost: the loader then makes the batches from the local store
    state: str

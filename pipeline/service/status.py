"""State of a service, which TrainLoader.service_status and EvalLoader.service_status return."""

from __future__ import annotations

from typing import NamedTuple


class ServiceStatus(NamedTuple):
    """State of the service that a loader uses, as of the last answer of the service."""

    name: str  # name of the service
    workers: int  # number of workers that are ready
    queue: int  # number of batches of all loaders together that wait for a worker
    # "connected", or "local" after the service was lost and the loader makes the batches from the local store
    state: str

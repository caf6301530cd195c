"""Lets all replicas stop after the same step, whichever replica received the signal to stop.

If a replica stopped alone, the other replicas would wait for its gradients. The replicas exchange one number per step,
after the step was launched. In this exchange, a host waits for the other hosts, but not for its GPU. The hosts can
therefore stay some steps ahead of the GPUs.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import numpy as np

from pipeline.loader import Batch, TrainLoader
from pipeline.service.errors import ServiceError
from prep.console import Terminated
from train.replicas.group import ReplicaGroup


class Agreement:
    """Tells all ranks if a rank has been asked to stop, or if a rank has lost the service."""

    def __init__(self, group: ReplicaGroup, uses_service: bool) -> None:
        """`uses_service`: True if a service decodes the images, so that the next batch of a rank may be missing."""
        self._group, self._uses_service = group, uses_service

    def stop(self, requested: BaseException | None) -> BaseException | None:
        """Return the exception with which this rank must stop, or None if no rank was asked to stop.

        If this rank was not asked to stop, but another rank was, the exception corresponds to the other rank's signal.

        requested  KeyboardInterrupt or Terminated, if this rank was asked to stop; otherwise None
        """
        if self._group.size == 1:
            return requested
        own = 0
        if requested is not None:
            own = requested.signum if isinstance(requested, Terminated) else signal.SIGINT
        signum = self._largest(own)
        if not signum or requested is not None:
            return requested
        return KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)

    def batches(self, loader: TrainLoader) -> Iterator[Batch]:
        """Yield the batches of `loader`. If a rank lacks its next batch, all ranks raise the ServiceError of this rank.

        If the run uses a service, the ranks tell each other before each step whether they have a batch. Without a
        service, no batch can be missing, and the ranks exchange nothing.
        """
        if self._group.size == 1 or not self._uses_service:
            yield from loader
            return
        batches = iter(loader)
        while True:
            batch, error = None, None
            try:
                batch = next(batches, None)
            except ServiceError as lost:
                error = lost
            if self._largest(error is not None):
                texts = self._group.gather_json(error and str(error))
                raise error or ServiceError(next(text for text in texts if text is not None))
            if batch is None:
                return
            yield batch

    def _largest(self, number: int) -> int:
        return int(self._group.gather_equal(np.array([number], dtype=np.int64)).max())

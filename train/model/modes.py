"""Context manager for evaluation mode: no dropout and no gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Return a context in which the network is in evaluation mode and no gradients are recorded.

    On exit, also after an exception, all modules of the network get the mode that the network had before.
    """
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        network.train(was_training)

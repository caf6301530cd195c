"""Context manager for evaluation mode: no dropout and no gradients inside, the former mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode and no gradients are recorded; afterwards, also after an exception,
    the model and all its modules are in the mode that the model was in.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

"""Evaluation mode for a while: a network computes without dropout inside, and is back in its former mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, `model.training` is False and no gradients are recorded; afterwards the mode is what it was.

    The former mode also comes back after an exception. Only the model's own `training` flag is remembered: its modules
    are all put into that mode.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)

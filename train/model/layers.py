"""The layers of the network: a column, a fully-connected layer that can slide over maps, nonlinearities, dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.config.architecture import Widths
from train.config.recipe import Recipe
from train.replicas.group import ALONE, ReplicaGroup

POOLED_PX = 6  # number of rows of pool5's maps for an image of 224 px; the number of columns is the same
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {  # these functions change their argument in place
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


class FullyConnected(nn.Linear):
    """A fully-connected layer that can also slide over feature maps, as a `side` × `side` convolution.

    The weight has the shape (units, maps · side²). An input (N, maps · side²) gives (N, units). An input (N, maps,
    rows, columns) gives (N, units, rows − side + 1, columns − side + 1).
    """

    def __init__(self, maps: int, units: int, side: int = 1) -> None:
        super().__init__(maps * side**2, units)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer to x, whose shape is given in the docstring of FullyConnected."""
        if x.dim() == 2:
            return super().forward(x)
        return F.conv2d(x, self.weight.view(len(self.weight), -1, self.side, self.side), self.bias)


class Column(nn.Module):
    """The layers of one column: all layers except fc8.

    w        widths of the layers of this column
    visible  number of columns whose activations are the input of this column's conv3, fc6 and fc7: all columns, or 1
             if the network has no crossings
    """

    def __init__(self, w: Widths, visible: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, w.conv1, 11, stride=4)
        self.conv2 = nn.Conv2d(w.conv1, w.conv2, 5, padding=2)
        self.conv3 = nn.Conv2d(visible * w.conv2, w.conv3, 3, padding=1)
        self.conv4 = nn.Conv2d(w.conv3, w.conv4, 3, padding=1)
        self.conv5 = nn.Conv2d(w.conv4, w.conv5, 3, padding=1)
        self.fc6 = FullyConnected(visible * w.conv5, w.fc6, POOLED_PX)
        self.fc7 = FullyConnected(visible * w.fc6, w.fc7)


def drop(x: Tensor, recipe: Recipe, training: bool, replicas: ReplicaGroup = ALONE) -> Tensor:
    """Apply dropout (section 4.2).

    Training sets values to zero with probability p = recipe.dropout. If recipe.dropout_scales_training is True,
    training also divides the other values by 1 − p. If it is False, evaluation multiplies all values by 1 − p.

    replicas  the replicas that compute a training step together. The random generators of all replicas have the same
              state. Each replica draws random numbers for the images of all replicas, in the order of the ranks, and
              uses only the numbers for its own images. The numbers are therefore the same as in one process that has
              the images of all replicas
    """
    p = recipe.dropout
    if p == 0:
        return x
    if training and replicas.size > 1:
        # Random numbers are drawn in memory order, so `ones` has the layout of x.
        layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
        ones = x.new_ones((len(x) * replicas.size, *x.shape[1:])).contiguous(memory_format=layout)
        return x * drop(ones, recipe, training)[len(x) * replicas.rank :][: len(x)]
    if recipe.dropout_scales_training:
        return F.dropout(x, p, training)
    return x * torch.empty_like(x).bernoulli_(1 - p) if training else x * (1 - p)


def join_on_devices(parts: Sequence[Tensor], receivers: Sequence[torch.device]) -> list[Tensor]:
    """Join the tensors `parts` along dim 1. Returns the joined tensor on each device of `receivers`, in their order.

    If a device occurs twice in `receivers`, the list has the same tensor twice. If `parts` has only one tensor, the
    result is a list of only this tensor, unchanged and on its own device.

    No other function moves activations between devices.
    """
    if len(parts) == 1:
        return list(parts)
    joined: dict[torch.device, Tensor] = {}
    for device in receivers:
        if device not in joined:
            joined[device] = torch.cat([part.to(device, non_blocking=True) for part in parts], dim=1)
    return [joined[device] for device in receivers]

"""The two-column AlexNet (the paper, sections 3.2 and 3.5, figure 2).

Each column has half of every layer's maps or units and lives on a device of its own; they may be one device. The column
sees only its own maps, except where figure 2 has crossing arrows: before conv3, fc6, fc7 and fc8, and there `cross`
is called. Normalisation never crosses. Maps lie in memory with their channels last, which makes a step on a CPU a third
shorter: convolution, pooling and the normalisation over channels all like it.

Shapes, per column, for N images:

    conv1  (N,  48, 55, 55)   11×11, stride 4         pool1 (N,  48, 27, 27)   3×3, stride 2, overlapping
    conv2  (N, 128, 27, 27)   5×5, padding 2          pool2 (N, 128, 13, 13)
    conv3  (N, 192, 13, 13)   3×3, padding 1, sees both columns
    conv4  (N, 192, 13, 13)   3×3, padding 1
    conv5  (N, 128, 13, 13)   3×3, padding 1          pool5 (N, 128, 6, 6)
    fc6, fc7  (N, 2048)       see both columns        fc8   (N, classes), on column 0's device, sees both columns

224 px give 55 positions of conv1 because the authors' code rounds up (layer.py:1004: 1 + ceil((224 − 11) / 4)) and
lets the last window hang over the right and lower edge by three zero pixels, which is the mean colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.augment import WINDOW_PX
from train.lrn import local_response_norm, within_map_norm
from train.recipe import Recipe

COLUMNS = 2
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")


@dataclass(frozen=True)
class Widths:
    """Maps or units of each layer, both columns together: the paper's, unless a test wants a small network."""

    conv1: int = 96
    conv2: int = 256
    conv3: int = 384
    conv4: int = 384
    conv5: int = 256
    fc6: int = 4096
    fc7: int = 4096


class Column(nn.Module):
    """One column: half of every layer but the last."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        w = Widths(**{name: n // COLUMNS for name, n in vars(widths).items()})
        self.conv1 = nn.Conv2d(3, w.conv1, 11, stride=4)
        self.conv2 = nn.Conv2d(w.conv1, w.conv2, 5, padding=2)
        self.conv3 = nn.Conv2d(COLUMNS * w.conv2, w.conv3, 3, padding=1)
        self.conv4 = nn.Conv2d(w.conv3, w.conv4, 3, padding=1)
        self.conv5 = nn.Conv2d(w.conv4, w.conv5, 3, padding=1)
        self.fc6 = nn.Linear(COLUMNS * w.conv5 * 6 * 6, w.fc6)
        self.fc7 = nn.Linear(COLUMNS * w.fc6, w.fc7)


class AlexNet(nn.Module):
    """Two columns and the classifier. Outputs logits (N, classes) on column 0's device.

    classes   number of classes
    recipe    what of the network a recipe decides: initialisation, normalisation, dropout, division of the input
    devices   of column 0 and column 1; equal ones put both columns on one device
    widths    the paper's, unless given
    """

    def __init__(
        self,
        classes: int,
        recipe: Recipe,
        devices: Sequence[str | torch.device] = ("cpu", "cpu"),
        widths: Widths | None = None,
    ) -> None:
        super().__init__()
        if len(devices) != COLUMNS:
            raise ValueError(f"{len(devices)} devices for {COLUMNS} columns")
        widths = widths or Widths()
        odd = [f"{name} = {n}" for name, n in vars(widths).items() if n % COLUMNS]
        if odd:
            raise ValueError(f"{', '.join(odd)}: every layer is shared by {COLUMNS} columns, expected even numbers")
        self.recipe, self.widths = recipe, widths
        self.devices = tuple(torch.device(device) for device in devices)
        with torch.device("meta"):
            self.columns = nn.ModuleList(Column(widths) for _ in range(COLUMNS))
            self.fc8 = nn.Linear(widths.fc7, classes)
        for column, device in zip(self.columns, self.devices, strict=True):
            column.to_empty(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.fc8.to_empty(device=self.devices[0])
        if self.devices[0].type != "meta":
            initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Images float32 (N, 3, 224, 224), grey levels minus the mean, on any device; logits (N, classes)."""
        if images.shape[1:] != (3, WINDOW_PX, WINDOW_PX):
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 3, {WINDOW_PX}, {WINDOW_PX})")
        inputs = self._to_columns(images)
        maps = [self._layers_1_and_2(column, x) for column, x in zip(self._columns, inputs, strict=True)]
        maps = [self._layers_3_to_5(column, x) for column, x in zip(self._columns, self.cross(maps), strict=True)]
        units = [m.flatten(1) for m in maps]  # (N, 4608): joined, column 0's maps come first
        units = [self._drop(F.relu(c.fc6(x))) for c, x in zip(self._columns, self.cross(units), strict=True)]
        units = [self._drop(F.relu(c.fc7(x))) for c, x in zip(self._columns, self.cross(units), strict=True)]
        (joined,) = self.cross(units, self.devices[:1])
        logits: Tensor = self.fc8(joined)
        return logits

    def cross(self, halves: Sequence[Tensor], receivers: Sequence[torch.device] | None = None) -> list[Tensor]:
        """Give each receiving device (by default each column's) both columns' activations, column 0's first.

        The only place where activations change device. Columns that share a device share the joined tensor.
        """
        joined: dict[torch.device, Tensor] = {}
        for device in receivers or self.devices:
            if device not in joined:
                joined[device] = torch.cat([half.to(device, non_blocking=True) for half in halves], dim=1)
        return [joined[device] for device in receivers or self.devices]

    def joined(self, part: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()) -> dict[str, Tensor]:
        """`part` of every parameter, in the shapes of the network without columns, on the CPU.

        `conv2.weight` is (256, 48, 5, 5), as a convolution with two groups has it; `fc6.weight` is (4096, 9216). A file
        with these loads for any placement of the columns.
        """
        found = {}
        for name, parameters in self.by_joined_name().items():
            found[name] = torch.cat([part(p).cpu() for p in parameters])
        return found

    def load_joined(
        self, tensors: Mapping[str, Tensor], part: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()
    ) -> None:
        """The inverse of joined; raises ValueError for names or shapes that do not fit."""
        mine = self.by_joined_name()
        if set(mine) != set(tensors):
            raise ValueError(f"parameters {sorted(set(mine) ^ set(tensors))} are on one side only")
        for name, parameters in mine.items():
            rows = sum(p.shape[0] for p in parameters)
            if tensors[name].shape != (rows, *parameters[0].shape[1:]):
                raise ValueError(
                    f"{name}: shape {tuple(tensors[name].shape)}, expected {(rows, *parameters[0].shape[1:])}"
                )
            pieces = torch.split(tensors[name], [p.shape[0] for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                part(parameter).copy_(piece)

    def by_joined_name(self) -> dict[str, list[nn.Parameter]]:
        """Joined name (`conv1.weight` …) to the columns' parameters that make it up, in order; fc8 has one."""
        names = [name for name, _ in self._columns[0].named_parameters()]
        found = {name: [column.get_parameter(name) for column in self._columns] for name in names}
        return {**found, **{f"fc8.{name}": [parameter] for name, parameter in self.fc8.named_parameters()}}

    def to(self, *args: object, **kwargs: object) -> AlexNet:
        """Refused: the network is placed when it is made, and moving it as one piece would undo that."""
        raise TypeError(
            "an AlexNet owns its placement: make it anew with other devices, and load_joined the parameters"
        )

    @property
    def _columns(self) -> list[Column]:
        return [column for column in self.columns if isinstance(column, Column)]

    def _to_columns(self, images: Tensor) -> list[Tensor]:
        """The image for each column, padded by three rows and columns at the lower right."""
        ready: dict[torch.device, Tensor] = {}
        for device in self.devices:
            if device not in ready:
                placed = images.to(device, non_blocking=True)
                if self.recipe.input_divisor != 1.0:
                    placed = placed / self.recipe.input_divisor
                ready[device] = F.pad(placed, (0, 3, 0, 3)).contiguous(memory_format=torch.channels_last)
        return [ready[device] for device in self.devices]

    def _layers_1_and_2(self, column: Column, x: Tensor) -> Tensor:
        """(N, 3, 227, 227) to (N, 128, 13, 13)."""
        x = column.conv1(x)
        if self.recipe.norm_before_relu:
            x = F.relu(F.max_pool2d(self._norm(x), 3, 2))
        else:
            x = F.max_pool2d(self._norm(F.relu(x)), 3, 2)
        x = self._norm(F.relu(column.conv2(x)))
        if self.recipe.within_map is not None:
            x = within_map_norm(x, **vars(self.recipe.within_map))
        return F.max_pool2d(x, 3, 2)

    def _layers_3_to_5(self, column: Column, x: Tensor) -> Tensor:
        """(N, 256, 13, 13), of both columns, to (N, 128, 6, 6)."""
        x = F.relu(column.conv3(x))
        x = F.relu(column.conv4(x))
        return F.max_pool2d(F.relu(column.conv5(x)), 3, 2)

    def _norm(self, x: Tensor) -> Tensor:
        return local_response_norm(x, **vars(self.recipe.lrn))

    def _drop(self, x: Tensor) -> Tensor:
        """Dropout: zero with probability p in training, all times 1 − p in test (section 4.2), or the scaling
        swapped.
        """
        p = self.recipe.dropout
        if p == 0:
            return x
        if self.recipe.dropout_scales_training:
            return F.dropout(x, p, self.training)
        return x * torch.empty_like(x).bernoulli_(1 - p) if self.training else x * (1 - p)


def initialise(model: AlexNet) -> None:
    """Fill all parameters from torch's generator of the CPU: the same numbers wherever the columns are.

    init     weights                                          biases
    normal   N(0, init_std[layer]²)                           1 in the layers of bias_one, else 0
    he       N(0, 2 / fan_in); fc8 N(0, 0.01²)                the same

    paper: std 0.01 everywhere, biases 1 in conv2, conv4, conv5, fc6, fc7. released: std 0.03 in conv3, conv4, conv5.
    Each layer is drawn whole and then shared out, so the joined parameters do not depend on the columns.
    """
    recipe = model.recipe
    for name, parameters in model.by_joined_name().items():
        layer, kind = name.split(".")
        shape = (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
        if kind == "bias":
            whole = torch.full(shape, 1.0 if layer in recipe.bias_one else 0.0)
        else:
            he = math.sqrt(2 / math.prod(shape[1:])) if layer != "fc8" else 0.01
            whole = torch.randn(shape) * (he if recipe.init == "he" else recipe.init_std[layer])
        with torch.no_grad():
            for parameter, piece in zip(parameters, torch.split(whole, [p.shape[0] for p in parameters]), strict=True):
                parameter.copy_(piece)

"""AlexNet in its two columns (the paper, sections 3.2 and 3.5, figure 2), and its relatives of train.config.architecture.

Each column has half of every layer's maps or units and lives on a device of its own; they may be one device. The column
sees only its own maps, except where figure 2 has crossing arrows: before conv3, fc6, fc7 and fc8, and there `cross`
is called. Normalization never crosses. Maps lie in memory with their channels last, which makes a step on a CPU a third
shorter: convolution, pooling and the normalization over channels all like it. A network of one column is the same
without anything to cross.

Shapes, per column, for N images:

    conv1  (N,  48, 55, 55)   11×11, stride 4         pool1 (N,  48, 27, 27)   3×3, stride 2, overlapping
    conv2  (N, 128, 27, 27)   5×5, padding 2          pool2 (N, 128, 13, 13)
    conv3  (N, 192, 13, 13)   3×3, padding 1, sees both columns
    conv4  (N, 192, 13, 13)   3×3, padding 1
    conv5  (N, 128, 13, 13)   3×3, padding 1          pool5 (N, 128, 6, 6)
    fc6, fc7  (N, 2048)       see both columns        fc8   (N, classes), on column 0's device, sees both columns

How 224 px give 55 positions of conv1: Architecture.padding_px. Pooling rounds down, so that windows of 2 px give maps
of the same size, as section 3.4 compares them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.augment import CROP_PX
from train.config.architecture import ALEXNET, TORCHVISION_LAYERS, Architecture, Widths
from train.config.recipe import Lrn, Recipe
from train.model.lrn import local_response_norm, within_map_norm
from train.model.pooling import max_pool

POOLED_PX = 6  # side of pool5's maps for a window
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu_,
    "tanh": torch.tanh_,
    "sigmoid": torch.sigmoid_,
}


class FullyConnected(nn.Linear):
    """A fully-connected layer that also slides over maps, `side` × `side` at a time, with the same numbers.

    weight (units, maps · side²). Input (N, maps · side²) gives (N, units); (N, maps, rows, columns) gives (N, units,
    rows − side + 1, columns − side + 1).
    """

    def __init__(self, maps: int, units: int, side: int = 1) -> None:
        super().__init__(maps * side**2, units)
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """As the class says."""
        if x.dim() == 2:
            return super().forward(x)
        return F.conv2d(x, self.weight.view(len(self.weight), -1, self.side, self.side), self.bias)


class Column(nn.Module):
    """One column: its share of every layer but the last. `sees` is how many columns a crossing shows it."""

    def __init__(self, w: Widths, sees: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, w.conv1, 11, stride=4)
        self.conv2 = nn.Conv2d(w.conv1, w.conv2, 5, padding=2)
        self.conv3 = nn.Conv2d(sees * w.conv2, w.conv3, 3, padding=1)
        self.conv4 = nn.Conv2d(w.conv3, w.conv4, 3, padding=1)
        self.conv5 = nn.Conv2d(w.conv4, w.conv5, 3, padding=1)
        self.fc6 = FullyConnected(sees * w.conv5, w.fc6, POOLED_PX)
        self.fc7 = FullyConnected(sees * w.fc6, w.fc7)


class AlexNet(nn.Module):
    """A network of the family. Outputs logits (N, classes) on column 0's device.

    classes       number of classes
    recipe        what of the network a recipe decides: initialization, activation, normalization, pooling, dropout,
                  whether columns cross, division of the input
    devices       of column 0 and column 1; equal ones put both columns on one device, one column is on the first
    architecture  which network
    """

    def __init__(
        self,
        classes: int,
        recipe: Recipe,
        devices: Sequence[str | torch.device] = ("cpu", "cpu"),
        architecture: Architecture = ALEXNET,
    ) -> None:
        super().__init__()
        count = architecture.columns
        if len(devices) not in (count, 2):
            raise ValueError(f"{len(devices)} devices for {count} columns")
        self.recipe, self.architecture = recipe, architecture
        self.devices = tuple(torch.device(device) for device in devices[:count])
        share = Widths(**{name: n // count for name, n in vars(architecture.widths).items()})
        with torch.device("meta"):
            self.columns = nn.ModuleList(Column(share, count if recipe.crossing else 1) for _ in range(count))
            self.fc8 = FullyConnected(architecture.widths.fc7, classes)
        for column, device in zip(self.columns, self.devices, strict=True):
            column.to_empty(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
        self.fc8.to_empty(device=self.devices[0])
        if self.devices[0].type != "meta":
            initialize(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, classes) of images float32 (N, 3, 224, 224), grey levels minus the mean, on any device.

        A convolutional network takes larger ones, too, and gives those a map of logits, as `dense` does.
        """
        if self.architecture.convolutional:
            logits = self.dense(images)
            return logits.flatten(1) if logits.shape[2:] == (1, 1) else logits
        if images.shape[1:] != (3, CROP_PX, CROP_PX):
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 3, {CROP_PX}, {CROP_PX})")
        return self._classified([maps.flatten(1) for maps in self._pooled(images)])  # column 0's maps come first

    def dense(self, images: Tensor) -> Tensor:
        """Logits (N, classes, rows, columns) of images (N, 3, height, width) of at least 224 px: a window each 32 px.

        256 px give 2 × 2. A window sees its neighborhood where alone it would see zero padding, so that its logits are
        near those of the same window alone, not equal.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < CROP_PX:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 3, {CROP_PX} or more, the same)")
        return self._classified(self._pooled(images))

    def cross(self, halves: Sequence[Tensor], receivers: Sequence[torch.device] | None = None) -> list[Tensor]:
        """Give each receiving device (by default each column's) both columns' activations, column 0's first.

        The only place where activations change device. Columns that share a device share the joined tensor; a single
        column's is passed on.
        """
        if len(halves) == 1:
            return list(halves)
        joined: dict[torch.device, Tensor] = {}
        for device in receivers or self.devices:
            if device not in joined:
                joined[device] = torch.cat([half.to(device, non_blocking=True) for half in halves], dim=1)
        return [joined[device] for device in receivers or self.devices]

    def joined_tensors(self, part: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()) -> dict[str, Tensor]:
        """`part` of every parameter, in the shapes of the network without columns, on the CPU.

        `conv2.weight` is (256, 48, 5, 5), as a convolution with two groups has it; `fc6.weight` is (4096, 9216). A file
        with these loads for any placement of the columns.
        """
        found = {}
        for name, parameters in self.parameters_by_joined_name().items():
            found[name] = torch.cat([part(p).cpu() for p in parameters])
        return found

    def load_joined_tensors(
        self, tensors: Mapping[str, Tensor], part: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()
    ) -> None:
        """The inverse of joined; raises ValueError for names or shapes that do not fit."""
        mine = self.parameters_by_joined_name()
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

    def parameters_by_joined_name(self) -> dict[str, list[nn.Parameter]]:
        """Joined name (`conv1.weight` …) to the columns' parameters that make it up, in order; fc8 has one."""
        names = [name for name, _ in self._columns[0].named_parameters()]
        found = {name: [column.get_parameter(name) for column in self._columns] for name in names}
        return {**found, **{f"fc8.{name}": [parameter] for name, parameter in self.fc8.named_parameters()}}

    def to(self, *args: object, **kwargs: object) -> AlexNet:
        """Refused: the network is placed when it is made, and moving it as one piece would undo that."""
        raise TypeError(
            "an AlexNet owns its placement: make it anew with other devices, and load_joined_tensors the parameters"
        )

    @property
    def _columns(self) -> list[Column]:
        return [column for column in self.columns if isinstance(column, Column)]

    def _pooled(self, images: Tensor) -> list[Tensor]:
        """pool5 of each column: (N, 128, 6, 6) of images of 224 px."""
        maps = [self._layers_1_and_2(column, x) for column, x in zip(self._columns, self._inputs(images), strict=True)]
        return [self._layers_3_to_5(column, x) for column, x in zip(self._columns, self._seen(maps), strict=True)]

    def _classified(self, units: list[Tensor]) -> Tensor:
        """fc6 to fc8, of vectors or of maps."""
        for name in ("fc6", "fc7"):
            layers: list[nn.Module] = [column.get_submodule(name) for column in self._columns]
            inputs = self._seen(self._dropped(name, units))
            units = [self._activation(layer(x)) for layer, x in zip(layers, inputs, strict=True)]
        (joined,) = self.cross(self._dropped("fc8", units), self.devices[:1])
        logits: Tensor = self.fc8(joined)
        return logits

    def _seen(self, halves: list[Tensor]) -> list[Tensor]:
        """What conv3, fc6 and fc7 of each column are given: both halves, or its own where a recipe forbids crossing."""
        return self.cross(halves) if self.recipe.crossing else halves

    def _inputs(self, images: Tensor) -> list[Tensor]:
        """The padded image for each column."""
        padding = (*self.architecture.padding_px(images.shape[3]), *self.architecture.padding_px(images.shape[2]))
        ready: dict[torch.device, Tensor] = {}
        for device in self.devices:
            if device not in ready:
                placed = images.to(device, non_blocking=True)
                if self.recipe.input_divisor != 1.0:
                    placed = placed / self.recipe.input_divisor
                ready[device] = F.pad(placed, padding).contiguous(memory_format=torch.channels_last)
        return [ready[device] for device in self.devices]

    def _layers_1_and_2(self, column: Column, x: Tensor) -> Tensor:
        """(N, 3, 227, 227) to (N, 128, 13, 13)."""
        norm = self._norm
        if self.recipe.norm_before_relu:
            x = self._pool(column.conv1(x), norm, active_after=True)
        else:
            x = self._pool(column.conv1(x), norm, active_before=True)
        x = column.conv2(x)
        if self.recipe.within_map is None or not self.architecture.normalised:
            return self._pool(x, norm, active_before=True)
        x = self._activation(x)
        if norm is not None:
            x = local_response_norm(x, **vars(norm))
        return self._pool(within_map_norm(x, **vars(self.recipe.within_map)))

    def _layers_3_to_5(self, column: Column, x: Tensor) -> Tensor:
        """(N, 256, 13, 13), of both columns, to (N, 128, 6, 6)."""
        x = self._activation(column.conv3(x))
        x = self._activation(column.conv4(x))
        return self._pool(column.conv5(x), active_after=True)

    @property
    def _norm(self) -> Lrn | None:
        return self.recipe.lrn if self.architecture.normalised else None

    def _activation(self, x: Tensor) -> Tensor:
        """In place: no layer keeps its output."""
        return ACTIVATION_FUNCTIONS[self.recipe.activation](x)

    def _pool(
        self, x: Tensor, norm: Lrn | None = None, active_before: bool = False, active_after: bool = False
    ) -> Tensor:
        """Activation, normalization, pooling, activation: what is asked for. ReLU is done along with the rest."""
        relu = self.recipe.activation == "relu"
        if active_before and not relu:
            x = self._activation(x)
        x = max_pool(x, norm, relu and active_before, relu and active_after, self.recipe.pool_px)
        return self._activation(x) if active_after and not relu else x

    def _dropped(self, layer: str, units: list[Tensor]) -> list[Tensor]:
        return [self._drop(x) for x in units] if layer in self.architecture.dropout_before else units

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


def initialize(model: AlexNet) -> None:
    """Fill all parameters from torch's generator of the CPU: the same numbers wherever the columns are.

    init     weights                             biases
    normal   N(0, init_std[layer]²)              init_bias[layer], 0 where it names none
    he       N(0, 2 / fan_in); fc8 N(0, 0.01²)   the same

    paper: std 0.01 everywhere, biases 1 in conv2, conv4, conv5, fc6, fc7. released: std 0.03 in conv3, conv4, conv5.
    Each layer is drawn whole and then shared out, so the joined parameters do not depend on the columns.
    """
    recipe = model.recipe
    for name, parameters in model.parameters_by_joined_name().items():
        layer, kind = name.split(".")
        shape = (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
        if kind == "bias":
            whole = torch.full(shape, recipe.init_bias.get(layer, 0.0))
        else:
            he = math.sqrt(2 / math.prod(shape[1:])) if layer != "fc8" else 0.01
            whole = torch.randn(shape) * (he if recipe.init == "he" else recipe.init_std[layer])
        with torch.no_grad():
            for parameter, piece in zip(parameters, torch.split(whole, [p.shape[0] for p in parameters]), strict=True):
                parameter.copy_(piece)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's state_dict of AlexNet under our names, for load_joined_tensors of the architecture `torchvision`.

    Its weights expect (RGB / 255 − mean) / std with torchvision's mean and std for each channel, which our stream does
    not serve. Raises KeyError for a name that is not of that network.
    """
    found = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        found[f"{TORCHVISION_LAYERS[layer]}.{kind}"] = tensor
    return found

"""AlexNet as a PyTorch module, for every architecture in train/config/architecture.py.

The paper describes the network in sections 3.2 and 3.5 and in figure 2. Each of the two columns has half of the maps or
units of every layer except fc8. Each column is on one device; both columns can be on the same device. The arrows in
figure 2 cross before conv3, fc6, fc7 and fc8. Before these layers, `cross` joins the activations of both columns. In
all other layers, and in every normalization, a column sees only its own maps. A network of one column has no crossings.
Feature maps are in channels-last layout, in which convolution, pooling and normalization across maps are faster than in
channels-first layout. On a CPU, a training step takes a third less time in channels-last layout.

Shapes, per column, for N images:

    conv1  (N,  48, 55, 55)   11×11, stride 4         pool1 (N,  48, 27, 27)   3×3, stride 2, overlapping
    conv2  (N, 128, 27, 27)   5×5, padding 2          pool2 (N, 128, 13, 13)
    conv3  (N, 192, 13, 13)   3×3, padding 1, sees both columns
    conv4  (N, 192, 13, 13)   3×3, padding 1
    conv5  (N, 128, 13, 13)   3×3, padding 1          pool5 (N, 128, 6, 6)
    fc6, fc7  (N, 2048)       see both columns        fc8   (N, classes), on column 0's device, sees both columns

Architecture.padding_px explains why conv1 has 55 rows of outputs for an image of 224 px. Pooling rounds the size of its
output down. Pooling windows of 2 px and of 3 px therefore give maps of the same size. Section 3.4 of the paper compares
both window sizes, which requires maps of the same size.
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
from train.model.gpu.fault import normalization_fault
from train.model.gpu.fused_network import FusedNetwork
from train.model.layers import ACTIVATION_FUNCTIONS, Column, FullyConnected, drop, join_on_devices
from train.model.lrn import local_response_norm, within_map_norm
from train.model.pooling import max_pool
from train.replicas.group import ALONE, ReplicaGroup


class AlexNet(nn.Module):
    """The network. `forward` returns logits (N, classes) on column 0's device.

    classes       number of classes
    recipe        gives activation, normalization, pooling, crossing, dropout, initialization and input_divisor
    devices       the device of column 0 and the device of column 1, which may be the same device; a network of one
                  column ignores the second device
    architecture  columns and layer widths

    Raises ValueError unless there are two devices, or as many devices as columns.
    """

    def __init__(
        self,
        classes: int,
        recipe: Recipe,
        devices: Sequence[str | torch.device] = ("cpu", "cpu"),
        architecture: Architecture = ALEXNET,
    ) -> None:
        super().__init__()
        columns = architecture.columns
        if len(devices) not in (columns, 2):
            raise ValueError(f"{len(devices)} devices for {columns} columns")
        self.recipe, self.architecture = recipe, architecture
        self._replicas = ALONE
        self.devices = tuple(torch.device(device) for device in devices[:columns])
        share = Widths(**{name: n // columns for name, n in vars(architecture.widths).items()})
        with torch.device("meta"):
            self.columns = nn.ModuleList(Column(share, columns if recipe.crossing else 1) for _ in range(columns))
            self.fc8 = FullyConnected(architecture.widths.fc7, classes)
        for column, device in zip(self.columns, self.devices, strict=True):
            column.to_empty(device=device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's type stubs lack this overload
        self.fc8.to_empty(device=self.devices[0])
        self._fused = FusedNetwork(self._columns, self.fc8, recipe, architecture, self.devices)
        self.layer_by_layer = False  # True: each layer is called as a module, so that forward hooks run even on a GPU
        if self.devices[0].type != "meta":
            initialize(self)

    @property
    def replicas(self) -> ReplicaGroup:
        """The replicas that compute a training step together, with equal parameters. Dropout depends on the rank."""
        return self._replicas

    @replicas.setter
    def replicas(self, group: ReplicaGroup) -> None:
        self._replicas = self._fused.replicas = group

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for float32 images (N, 3, 224, 224): pixels in 0..255, minus the mean.

        The images may be on any device. With a convolutional architecture, `forward` also accepts larger images. For
        larger images, `forward` returns the result of `dense`. Raises ValueError for images of any other shape.
        """
        if self.architecture.convolutional:
            logits = self.dense(images)
            return logits.flatten(1) if logits.shape[2:] == (1, 1) else logits
        if images.shape[1:] != (3, CROP_PX, CROP_PX):
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 3, {CROP_PX}, {CROP_PX})")
        if self._uses_fused_kernels(images):
            return self._fused.logits(images, self.training)
        return self._fully_connected([maps.flatten(1) for maps in self._convolutional(images)])

    def dense(self, images: Tensor) -> Tensor:
        """Return logits (N, classes, rows, columns) for images (N, 3, H, W): one vector of logits for each crop.

        The crops have 224 px and a stride of 32 px, so an image of 256 px has 2 rows and 2 columns of crops. At the
        edge of a crop, the layers see the adjacent pixels of the image instead of zero padding. The logits are
        therefore close, but not equal, to the logits of `forward` for each crop alone. Raises ValueError for images
        smaller than 224 px.
        """
        if images.dim() != 4 or images.shape[1] != 3 or min(images.shape[2:]) < CROP_PX:
            raise ValueError(f"images of shape {tuple(images.shape)}, expected (N, 3, H, W), H and W ≥ {CROP_PX}")
        fused = self._uses_fused_kernels(images)
        return self._fully_connected(self._fused.maps(images) if fused else self._convolutional(images))

    def cross(self, halves: Sequence[Tensor], receivers: Sequence[torch.device] | None = None) -> list[Tensor]:
        """Return the activations `halves` of both columns, joined along dim 1 with column 0 first, for each receiver.

        receivers  devices that need the joined tensor; None: the device of each column

        Columns on the same device share the joined tensor. In a network of one column, the activations are returned
        unchanged.
        """
        return join_on_devices(halves, receivers or self.devices)

    def joined_tensors(self, part: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()) -> dict[str, Tensor]:
        """Return the parameters by name, each joined from both columns along dim 0, column 0 first.

        The joined parameters are on the CPU, whatever the devices of the columns. `conv2.weight` has the shape (256,
        48, 5, 5) of a convolution with two groups; `fc6.weight` has the shape (4096, 9216).

        part  function that maps a parameter to the tensor to join: the parameter itself, its gradient or its velocity
        """
        by_name = self.parameters_by_joined_name()
        return {name: torch.cat([part(p).cpu() for p in parameters]) for name, parameters in by_name.items()}

    def load_joined_tensors(
        self, tensors: Mapping[str, Tensor], part: Callable[[nn.Parameter], Tensor] = lambda p: p.detach()
    ) -> None:
        """Copy joined tensors into the columns. With the same `part`, this function is the inverse of joined_tensors.

        Raises ValueError if a name or a shape differs from the result of joined_tensors.
        """
        by_name = self.parameters_by_joined_name()
        if set(by_name) != set(tensors):
            differing = sorted(set(by_name) ^ set(tensors))
            raise ValueError(f"parameters {differing}: in the tensors or in the network, but not in both")
        for name, parameters in by_name.items():
            rows = sum(p.shape[0] for p in parameters)
            if tensors[name].shape != (rows, *parameters[0].shape[1:]):
                raise ValueError(
                    f"{name}: shape {tuple(tensors[name].shape)}, expected {(rows, *parameters[0].shape[1:])}"
                )
            pieces = torch.split(tensors[name], [p.shape[0] for p in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                part(parameter).copy_(piece)

    def parameters_by_joined_name(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters that make up each joined tensor: one for each column, or a single one for fc8.

        The keys are the names of the joined tensors, such as `conv1.weight`.
        """
        names = [name for name, _ in self._columns[0].named_parameters()]
        by_name = {name: [column.get_parameter(name) for column in self._columns] for name in names}
        return {**by_name, **{f"fc8.{name}": [parameter] for name, parameter in self.fc8.named_parameters()}}

    def to(self, *args: object, **kwargs: object) -> AlexNet:
        """Raise TypeError, because a single device would override the device of each column."""
        raise TypeError(
            "an AlexNet cannot be moved, because each column has a device of its own. Create an AlexNet with other "
            "devices, and load the joined_tensors() of this network with load_joined_tensors."
        )

    @property
    def _columns(self) -> list[Column]:
        return [column for column in self.columns if isinstance(column, Column)]

    def _uses_fused_kernels(self, images: Tensor) -> bool:
        """Return True if the fused kernels of train/model/gpu compute the layers for these images.

        The result is False if a device is not a GPU or lacks working Triton kernels. The result is also False if
        `layer_by_layer` is true, if torch compiles the network, or if the images need a gradient.
        """
        if self.layer_by_layer or torch.compiler.is_compiling() or images.requires_grad:
            return False
        widths, columns = self.architecture.widths, self.architecture.columns
        maps = max(widths.conv1, widths.conv2) // columns if self._norm is not None else 0
        return all(device.type == "cuda" and normalization_fault(device, maps) is None for device in self.devices)

    def _convolutional(self, images: Tensor) -> list[Tensor]:
        """Return the output of pool5 in each column: (N, 128, 6, 6) for images of 224 px."""
        maps = [self._layers_1_and_2(column, x) for column, x in zip(self._columns, self._inputs(images), strict=True)]
        return [self._layers_3_to_5(column, x) for column, x in zip(self._columns, self._visible(maps), strict=True)]

    def _fully_connected(self, units: list[Tensor]) -> Tensor:
        """Return the logits, computed by fc6, fc7 and fc8.

        units  output of pool5 in each column: vectors, or maps over which the layers slide
        """
        for name in ("fc6", "fc7"):
            layers: list[nn.Module] = [column.get_submodule(name) for column in self._columns]
            inputs = self._visible(self._with_dropout(name, units))
            units = [self._activation(layer(x)) for layer, x in zip(layers, inputs, strict=True)]
        (joined,) = self.cross(self._with_dropout("fc8", units), self.devices[:1])
        logits: Tensor = self.fc8(joined)
        return logits

    def _visible(self, halves: list[Tensor]) -> list[Tensor]:
        """Return the input of conv3, fc6 or fc7 for each column.

        If the recipe has crossings, each column sees both halves, joined. Without crossings, each column sees only its
        own half.
        """
        return self.cross(halves) if self.recipe.crossing else halves

    def _inputs(self, images: Tensor) -> list[Tensor]:
        """Return the images for each column, divided by input_divisor and padded, on the device of the column."""
        padding = (*self.architecture.padding_px(images.shape[3]), *self.architecture.padding_px(images.shape[2]))
        by_device: dict[torch.device, Tensor] = {}
        for device in self.devices:
            if device not in by_device:
                x = images.to(device, non_blocking=True)
                if self.recipe.input_divisor != 1.0:
                    x = x / self.recipe.input_divisor
                by_device[device] = F.pad(x, padding).contiguous(memory_format=torch.channels_last)
        return [by_device[device] for device in self.devices]

    def _layers_1_and_2(self, column: Column, x: Tensor) -> Tensor:
        """Compute layers 1 and 2 of a column: from (N, 3, 227, 227) to (N, 128, 13, 13)."""
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
        """Compute layers 3 to 5 of a column: from the (N, 256, 13, 13) maps of both columns to (N, 128, 6, 6)."""
        x = self._activation(column.conv3(x))
        x = self._activation(column.conv4(x))
        return self._pool(column.conv5(x), active_after=True)

    @property
    def _norm(self) -> Lrn | None:
        return self.recipe.lrn if self.architecture.normalised else None

    def _activation(self, x: Tensor) -> Tensor:
        """Apply the nonlinearity in place.

        Working in place is safe, because no backward pass needs the overwritten values.
        """
        return ACTIVATION_FUNCTIONS[self.recipe.activation](x)

    def _pool(
        self, x: Tensor, norm: Lrn | None = None, active_before: bool = False, active_after: bool = False
    ) -> Tensor:
        """Apply activation if `active_before`, normalization if `norm`, pooling, and activation if `active_after`.

        max_pool applies ReLU, and this method applies all other activations.
        """
        relu = self.recipe.activation == "relu"
        if active_before and not relu:
            x = self._activation(x)
        x = max_pool(x, norm, relu and active_before, relu and active_after, self.recipe.pool_px)
        return self._activation(x) if active_after and not relu else x

    def _with_dropout(self, layer: str, units: list[Tensor]) -> list[Tensor]:
        if layer not in self.architecture.dropout_before:
            return units
        return [drop(x, self.recipe, self.training, self.replicas) for x in units]


def initialize(network: AlexNet) -> None:
    """Initialize all parameters. The random values come from torch's CPU generator and do not depend on the devices.

    recipe.init  weights                             biases
    normal       N(0, init_std[layer]²)              init_bias[layer]; 0 for a layer that init_bias does not list
    he           N(0, 2 / fan_in); fc8 N(0, 0.01²)   the same as for `normal`

    The recipe `paper` has standard deviation 0.01 in every layer, and biases of 1 in conv2, conv4, conv5, fc6 and fc7.
    The recipe `released` has standard deviation 0.03 in conv3, conv4 and conv5. Each joined tensor is drawn at random
    as a whole and then split between the columns.
    """
    recipe = network.recipe
    for name, parameters in network.parameters_by_joined_name().items():
        layer, kind = name.split(".")
        shape = (sum(p.shape[0] for p in parameters), *parameters[0].shape[1:])
        if kind == "bias":
            joined = torch.full(shape, recipe.init_bias.get(layer, 0.0))
        else:
            he_std = math.sqrt(2 / math.prod(shape[1:])) if layer != "fc8" else 0.01
            joined = torch.randn(shape) * (he_std if recipe.init == "he" else recipe.init_std[layer])
        with torch.no_grad():
            for parameter, piece in zip(parameters, torch.split(joined, [p.shape[0] for p in parameters]), strict=True):
                parameter.copy_(piece)


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return torchvision's state_dict with the names that load_joined_tensors expects.

    Only a network with the architecture `torchvision` can load the result. The weights expect (RGB / 255 − mean) / std
    as input, with torchvision's mean and std of each channel. The data pipeline of this project gives RGB − mean
    instead. Raises KeyError for a name that is not in torchvision's AlexNet.
    """
    tensors = {}
    for name, tensor in state.items():
        layer, kind = name.rsplit(".", 1)
        tensors[f"{TORCHVISION_LAYERS[layer]}.{kind}"] = tensor
    return tensors

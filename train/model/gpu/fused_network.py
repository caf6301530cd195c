"""The forward pass of the network on a GPU: the formula of AlexNet.forward with fused kernels and joined columns.

If the recipe has crossings and all columns are on one device, the columns form one group. In all other cases, each
column is a group of its own. conv1 (over blocks of 4 × 4 px), conv3, fc6 and fc7 are computed once for each group.
conv2, conv4 and conv5 are computed once for each column, because cuDNN's grouped convolutions are slower. One operation
(epilogue.py) computes all steps between two convolutions, and joins or splits the columns.

The results equal the results of AlexNet's own layers, except for rounding. Parameters and checkpoints are the same with
and without the fused kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prep.console import say
from train.config.architecture import Architecture
from train.config.recipe import Recipe
from train.model.gpu.conv1_blocks import block_weights, image_blocks
from train.model.gpu.epilogue import Epilogue, apply_epilogue
from train.model.layers import ACTIVATION_FUNCTIONS, Column, FullyConnected, drop, join_on_devices
from train.model.lrn import within_map_norm
from train.replicas.group import ALONE


class FusedNetwork:
    """The forward pass of an AlexNet on a GPU, with the parameters of the AlexNet's modules."""

    def __init__(
        self,
        columns: Sequence[Column],
        fc8: FullyConnected,
        recipe: Recipe,
        architecture: Architecture,
        devices: Sequence[torch.device],
    ) -> None:
        """All arguments are attributes of the AlexNet. `devices` has a device for each column."""
        self.fc8, self.recipe, self.architecture = fc8, recipe, architecture
        joined = recipe.crossing and len(set(devices)) == 1
        self.groups = [list(columns)] if joined else [[column] for column in columns]
        self.devices = list(devices[:1]) if joined else list(devices)
        self.replicas = ALONE  # the replicas that compute a training step together
        self._said = False

    def logits(self, images: Tensor, training: bool) -> Tensor:
        """Return logits (N, classes) for images (N, 3, 224, 224).

        training  True: dropout as in training; False: dropout as in evaluation (`drop` in train/model/layers.py)
        """
        units = [maps.flatten(1) for maps in self._pooled_maps(images, channels_first=True)]
        activation = ACTIVATION_FUNCTIONS[self.recipe.activation]
        for name in ("fc6", "fc7"):
            inputs = self._cross(self._with_dropout(name, units, training))
            units = [
                activation(F.linear(x, *(_join(group, f"{name}.{kind}") for kind in ("weight", "bias"))))
                for x, group in zip(inputs, self.groups, strict=True)
            ]
        units = self._with_dropout("fc8", units, training)
        (joined,) = join_on_devices(units, self.devices[:1])
        result: Tensor = self.fc8(joined)
        return result

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the output of pool5 in each column, for images (N, 3, H, W) with H, W ≥ 224."""
        joined = self._pooled_maps(images, channels_first=False)
        return [part for maps, group in zip(joined, self.groups, strict=True) for part in maps.chunk(len(group), dim=1)]

    def _pooled_maps(self, images: Tensor, channels_first: bool) -> list[Tensor]:
        """Return the output of pool5 in each group, with the columns of the group joined."""
        recipe = self.recipe
        blocks = self._blocks(images)
        maps = []
        for group, device in zip(self.groups, self.devices, strict=True):
            weights = block_weights(_join(group, "conv1.weight", torch.float32)).to(blocks[device].dtype)
            x = F.conv2d(blocks[device], weights)
            split = apply_epilogue([x], _biases(group, "conv1"), self._layer_1)
            split = [F.conv2d(x, column.conv2.weight, padding=2) for x, column in zip(split, group, strict=True)]
            maps.append(self._layer_2(split, group))
        pooled = []
        activation, pooling = Epilogue(recipe.activation), Epilogue(pool_px=recipe.pool_px, after=recipe.activation)
        for group, visible in zip(self.groups, self._cross(maps), strict=True):
            x = F.conv2d(visible, _join(group, "conv3.weight"), padding=1)
            split = apply_epilogue([x], _biases(group, "conv3"), activation)
            split = [F.conv2d(x, column.conv4.weight, padding=1) for x, column in zip(split, group, strict=True)]
            split = apply_epilogue(split, _biases(group, "conv4"), activation)
            split = [F.conv2d(x, column.conv5.weight, padding=1) for x, column in zip(split, group, strict=True)]
            pooled += apply_epilogue(split, _biases(group, "conv5"), pooling, True, channels_first)
        return pooled

    @property
    def _layer_1(self) -> Epilogue:
        recipe, norm = self.recipe, self.recipe.lrn if self.architecture.normalised else None
        if recipe.norm_before_relu:
            return Epilogue("none", norm, recipe.pool_px, recipe.activation)
        return Epilogue(recipe.activation, norm, recipe.pool_px)

    def _layer_2(self, split: list[Tensor], group: list[Column]) -> Tensor:
        """Apply the operations between conv2 and conv3. Returns one joined tensor."""
        epilogue = replace(self._layer_1, before=self.recipe.activation, after="none")
        biases = _biases(group, "conv2")
        if self.recipe.within_map is None or not self.architecture.normalised:
            (joined,) = apply_epilogue(split, biases, epilogue, joined=True)
            return joined
        if not self._said:
            self._said = True
            say(
                "Layer 2: normalization within a map has no fused kernel. PyTorch operators compute this "
                "normalization, which is slower."
            )
        (joined,) = apply_epilogue(split, biases, replace(epilogue, pool_px=0), joined=True)
        normalized = within_map_norm(joined, **vars(self.recipe.within_map))
        no_bias = normalized.new_zeros(normalized.shape[1], dtype=torch.float32)
        (pooled,) = apply_epilogue([normalized], [no_bias], Epilogue(pool_px=self.recipe.pool_px))
        return pooled

    def _blocks(self, images: Tensor) -> dict[torch.device, Tensor]:
        """Return conv1's input on each device."""
        padding = (*self.architecture.padding_px(images.shape[3]), *self.architecture.padding_px(images.shape[2]))
        return {
            device: image_blocks(
                images.to(device, non_blocking=True), padding, self.recipe.input_divisor, _dtype(device)
            )
            for device in dict.fromkeys(self.devices)
        }

    def _cross(self, joined: list[Tensor]) -> list[Tensor]:
        """Return the input of conv3, fc6 or fc7 in each group.

        If the recipe has crossings, the input is the maps or units of all groups. Without crossings, the input is only
        the maps or units of the group.
        """
        return join_on_devices(joined, self.devices) if self.recipe.crossing else joined

    def _with_dropout(self, layer: str, units: list[Tensor], training: bool) -> list[Tensor]:
        if layer not in self.architecture.dropout_before:
            return units
        return [drop(x, self.recipe, training, self.replicas) for x in units]


def _biases(group: Sequence[Column], layer: str) -> list[Tensor]:
    return [column.get_parameter(f"{layer}.bias") for column in group]


def _dtype(device: torch.device) -> torch.dtype:
    """Return the type of the convolutions' inputs: the type of autocast if autocast is enabled, otherwise float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


def _join(group: Sequence[Column], name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a parameter of the columns in a group, joined along dim 0.

    The type of the result is `dtype`. If `dtype` is None, the type is that of the convolutions' inputs.
    """
    parameters = [column.get_parameter(name) for column in group]
    dtype = dtype or _dtype(parameters[0].device)
    if len(parameters) == 1 and dtype == parameters[0].dtype:
        return parameters[0]
    joined: Tensor = _Join.apply(dtype, *parameters)  # type: ignore[no-untyped-call]  # torch has no types for it
    return joined


class _Join(torch.autograd.Function):
    """Joins parameters and converts their type, in one pass over memory."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *parameters: Tensor) -> Tensor:
        ctx.rows = [len(parameter) for parameter in parameters]
        first = parameters[0]
        last = first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last)
        joined = torch.empty(
            (sum(ctx.rows), *first.shape[1:]),
            dtype=dtype,
            device=first.device,
            memory_format=torch.channels_last if last else torch.contiguous_format,
        )
        for piece, parameter in zip(torch.split(joined, ctx.rows), parameters, strict=True):
            piece.copy_(parameter)
        return joined

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (None, *torch.split(grad.float(), ctx.rows))

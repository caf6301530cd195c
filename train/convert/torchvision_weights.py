"""Our network `torchvision` and torchvision.models.alexnet: the same function of pixels, in either's numbers.

Of pixels p in 0..255, with the mean m subtracted and c the colour:

    torchvision's conv1 gets    t = (p / 255 − mean_c) / std_c        (torchvision.transforms.Normalize)
    ours gets                   u = (p − m_c) / input_divisor

    export   m goes into Normalize as mean_c = m_c / 255, so that t = u · input_divisor / (255 std_c), and the weights
             are multiplied by the inverse. Exact, at the border too: both pad with zeros, which are pixels of colour m.
             A mean image does not fit into Normalize; t = (p − m) / (255 std_c) is exact with it, Normalize with the
             mean of the mean image is not.
    import   mean_c is the file's and m the store's, and t = (u · input_divisor + m_c − 255 mean_c) / (255 std_c):
             weights are multiplied by input_divisor / (255 std_c), and conv1's bias takes the constant, times the sum
             of the colour's weights. Exact in windows that lie within the picture. Where conv1 reads padding, in the
             first and the last row and column of its 55 × 55 positions, that is of colour m in place of 255 mean_c.

Dropout that scales in test (section 4.2) multiplies the inputs of fc6 and fc7 by 1 − p where torchvision's does
nothing: their weights take the factor, exactly for p = ½. All folding is done in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from prep.console import UserError
from train.config.architecture import TORCHVISION, TORCHVISION_LAYERS, Architecture
from train.config.recipe import Recipe
from train.model.alexnet import from_torchvision


class Normalization(NamedTuple):
    """The arguments of torchvision.transforms.Normalize: of RGB in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# Of all its weights trained on ImageNet: torchvision.transforms._presets.ImageClassification.
TORCHVISIONS = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def check_fits(architecture: Architecture, recipe: Recipe) -> None:
    """Raise UserError, with the reason, for a network that torchvision's definition cannot compute."""
    if architecture.name != TORCHVISION.name:
        raise UserError(
            f"a network {architecture.name}: torchvision's AlexNet has one column, other widths and no normalization. "
            "Only --model torchvision has its layout; safetensors and onnx take every network."
        )
    if recipe.activation != "relu" or recipe.pool_px != 3:
        raise UserError(
            f"a network with activation {recipe.activation} and pools of {recipe.pool_px} px: torchvision's AlexNet "
            "has relu and 3 px. Only such a network has its layout; safetensors and onnx take every one."
        )


def to_torchvision(parameters: Mapping[str, Tensor], recipe: Recipe, std: Sequence[float]) -> dict[str, Tensor]:
    """Joined parameters as torchvision's state_dict, for pixels (p − m) / (255 std)."""
    found = {}
    for theirs, ours in TORCHVISION_LAYERS.items():
        weight = parameters[f"{ours}.weight"].double()
        if ours == "conv1":
            weight = weight * (255 * _colours(std) / recipe.input_divisor)
        found[f"{theirs}.weight"] = (weight * _test_scale(recipe, ours)).float()
        found[f"{theirs}.bias"] = parameters[f"{ours}.bias"].clone()
    return found


def to_ours(
    state: Mapping[str, Tensor], recipe: Recipe, normalization: Normalization, mean_rgb: Sequence[float]
) -> dict[str, Tensor]:
    """The inverse: torchvision's state_dict, trained with `normalization`, as joined parameters for grey levels minus
    `mean_rgb`. Raises KeyError or ValueError for what is not of that network; load_joined_tensors looks at the rest.
    """
    found = {name: tensor.double() for name, tensor in from_torchvision(state).items()}
    weight = found["conv1.weight"]
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise ValueError(f"conv1.weight: shape {tuple(weight.shape)}, expected (64, 3, 11, 11)")
    levels = 255 * _colours(normalization.std)
    away = (_colours(mean_rgb) - 255 * _colours(normalization.mean)) / levels
    found["conv1.bias"] = found["conv1.bias"] + (weight * away).sum((1, 2, 3))
    found["conv1.weight"] = weight * (recipe.input_divisor / levels)
    for layer in TORCHVISION.dropout_before:
        found[f"{layer}.weight"] = found[f"{layer}.weight"] / _test_scale(recipe, layer)
    return {name: tensor.float() for name, tensor in found.items()}


def _test_scale(recipe: Recipe, layer: str) -> float:
    """What a layer's inputs are multiplied by in test."""
    scaled = layer in TORCHVISION.dropout_before and not recipe.dropout_scales_training
    return 1 - recipe.dropout if scaled else 1.0


def _colours(values: Sequence[float]) -> Tensor:
    return torch.tensor(tuple(values), dtype=torch.float64).view(3, 1, 1)

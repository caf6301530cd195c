"""Converts weights between torchvision.models.alexnet and our network `torchvision`.

`check_fits` refuses networks that torchvision's AlexNet cannot represent. The converted network computes the same
function of the pixels as the original network. The inputs of the two networks differ only in mean and scale. In
the formulas, p is a pixel in 0..255, m is the mean that this project subtracts, and c is the channel:

    torchvision's conv1 takes    t = (p / 255 − mean_c) / std_c        (torchvision.transforms.Normalize)
    this project's conv1 takes   u = (p − m_c) / input_divisor        (in evaluation: Recipe.eval_input_divisor)

    export   Normalize gets mean_c = m_c / 255. Then t = u · input_divisor / (255 std_c), and conv1's weights are
             multiplied by 255 std_c / input_divisor. The result is exact, also at the border of the image. Both
             networks pad the input with zeros, and a zero in the input stands for a pixel of value m. If m is a mean
             image, the weights are exact for the input t = (p − m) / (255 std_c). Normalize, however, can subtract only
             one value for each channel, the average of the mean image. The input from Normalize is therefore
             approximate.
    import   m comes from the store. mean_c comes from the imported file if `alextrain export` wrote the file; otherwise
             mean_c is torchvision's mean for ImageNet. Then t = (u · input_divisor + m_c − 255 mean_c) / (255 std_c).
             conv1's weights are multiplied by input_divisor / (255 std_c). The constant (m_c − 255 mean_c) / (255
             std_c) is multiplied by the original weights, summed, and added to conv1's bias. The result is exact for
             conv1's windows inside the image. The first and the last row and column of conv1's 55 × 55 outputs also
             depend on the padding, and are approximate. A zero of the padding stands for a pixel of value m in our
             network, but for a pixel of value 255 mean_c in the original network.

If dropout with probability d scales in evaluation (section 4.2), the inputs of fc6 and fc7 are multiplied by 1 − d in
evaluation. torchvision's dropout does not scale in evaluation. An export therefore multiplies the weights of fc6 and
fc7 by 1 − d, and an import divides these weights by 1 − d. Multiplying and dividing are exact for d = ½. All
conversions are computed in float64.
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
    """The arguments of torchvision.transforms.Normalize, for RGB in 0..1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


# The normalization with which torchvision trained all its ImageNet weights (class ImageClassification in
# torchvision.transforms._presets).
IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def check_fits(architecture: Architecture, recipe: Recipe) -> None:
    """Raise UserError for a network that torchvision.models.alexnet cannot represent. The error names the reason."""
    if architecture.name != TORCHVISION.name:
        raise UserError(
            f"network {architecture.name}: torchvision's AlexNet has one column, other widths and no LRN. "
            "Only --model torchvision fits. --to safetensors and --to onnx fit every network."
        )
    if recipe.activation != "relu" or recipe.pool_px != 3:
        raise UserError(
            f"network with activation {recipe.activation} and pooling windows of {recipe.pool_px} px: torchvision's "
            "AlexNet has relu and 3 px. --to safetensors and --to onnx fit every network."
        )


def to_torchvision_weights(parameters: Mapping[str, Tensor], recipe: Recipe, std: Sequence[float]) -> dict[str, Tensor]:
    """Return parameters (AlexNet.joined_tensors) as torchvision's state_dict, for the input (p − m) / (255 std)."""
    state = {}
    for torchvision_layer, layer in TORCHVISION_LAYERS.items():
        weight = parameters[f"{layer}.weight"].double()
        if layer == "conv1":
            weight = weight * (255 * _per_channel(std) / recipe.eval_input_divisor)
        state[f"{torchvision_layer}.weight"] = (weight * _test_time_scale(recipe, layer)).float()
        state[f"{torchvision_layer}.bias"] = parameters[f"{layer}.bias"].clone()
    return state


def from_torchvision_weights(
    state: Mapping[str, Tensor], recipe: Recipe, normalization: Normalization, mean_rgb: Sequence[float]
) -> dict[str, Tensor]:
    """Return the weights of torchvision's state_dict as parameters for AlexNet.load_joined_tensors.

    `mean_rgb`, in grey levels, is the mean that is subtracted from the images of the new network. `normalization` is
    the normalization with which the weights were trained. Raises KeyError if `state` has a name that torchvision's
    AlexNet does not have, or lacks conv1, fc6 or fc7. Raises ValueError if conv1 does not have 3 input channels. The
    caller checks all other names and shapes with AlexNet.load_joined_tensors.
    """
    tensors = {name: tensor.double() for name, tensor in from_torchvision(state).items()}
    weight = tensors["conv1.weight"]
    if weight.dim() != 4 or weight.shape[1] != 3:
        raise ValueError(f"conv1.weight: shape {tuple(weight.shape)}, expected (64, 3, 11, 11)")
    std_levels = 255 * _per_channel(normalization.std)
    offset = (_per_channel(mean_rgb) - 255 * _per_channel(normalization.mean)) / std_levels
    tensors["conv1.bias"] = tensors["conv1.bias"] + (weight * offset).sum((1, 2, 3))
    tensors["conv1.weight"] = weight * (recipe.eval_input_divisor / std_levels)
    for layer in TORCHVISION.dropout_before:
        tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] / _test_time_scale(recipe, layer)
    return {name: tensor.float() for name, tensor in tensors.items()}


def _test_time_scale(recipe: Recipe, layer: str) -> float:
    """Return the factor by which the inputs of a layer are multiplied in evaluation."""
    is_scaled = layer in TORCHVISION.dropout_before and not recipe.dropout_scales_training
    return 1 - recipe.dropout if is_scaled else 1.0


def _per_channel(values: Sequence[float]) -> Tensor:
    """Return the values as float64 (3, 1, 1)."""
    return torch.tensor(tuple(values), dtype=torch.float64).view(3, 1, 1)

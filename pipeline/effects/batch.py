"""Effects of a batch with PyTorch, on any device. The pixels equal those of pipeline/engines/effects.h.

The arithmetic uses 32-bit integers. An operation, such as a change of the brightness, is computed at once for all
images that need this operation.

**Hue.** For a pixel with maximum M, minimum m and chroma C = M − m, the hue h in sextants is (g − b) / C if red is the
maximum. Otherwise, h is 2 + (b − r) / C if green is the maximum, and 4 + (r − g) / C if blue is the maximum. After a
rotation by d sextants, a channel is M − C · max(0, min(k, 4 − k, 1)) with k = (h + d + n) mod 6 and n = 5, 3, 1 for R,
G, B. This formula equals torchvision's adjust_hue (_rgb2hsv and _hsv2rgb in _functional_tensor.py). The code computes
C · k, which is a multiple of 1/4096, and therefore does not divide by C. torchvision multiplies the channel by 255.999
/ 255 and rounds down. This code multiplies the channel by 1 + 257 / 65536 instead: it rounds the product of the channel
and 257 / 65536 down to a multiple of 1/4096, adds this product to the channel, and rounds the sum down to a whole
number.

**Blur.** A row pass and a column pass use the weights of pipeline.effects.parameters. Products and sums are multiples
of 1/128. The last step rounds to nearest, as torchvision's gaussian_blur does. Beyond the edges, the blur uses the
pixels of the image, reflected at the edge pixels, as gaussian_blur does.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.effects.parameters import FACTOR_ONE, Effects

_FACTOR_BITS = FACTOR_ONE.bit_length() - 1
_ROW_BITS = 7  # number of bits after the binary point in the blur's sums
# A function that returns M changed images. Its arguments are M images, int32 (M, side, side, 3), and their M
# parameters.
Function = Callable[[Tensor, Tensor], Tensor]
# A function, the indices of the images that the function changes, and the parameters of these images.
Step = tuple[Function, Tensor, Tensor]


def effect_steps(effects: Effects, upload: Callable[[Tensor], Tensor]) -> list[Step]:
    """Return the steps of jitter, grey and blur for `apply_effects`. `upload` copies a tensor to the device."""
    steps: list[Step] = []
    order, factor, radius = effects.steps["order"], effects.steps["factor"], effects.steps["radius"]
    values: list[tuple[Function, npt.NDArray[np.bool_], npt.NDArray[np.int32]]] = [
        *((_JITTER[k], order[:, place] == k, factor[:, k]) for place, k in product(range(4), range(4))),
        (_grey, effects.steps["grey"] == 1, effects.steps["grey"]),
        (_blur, radius > 0, effects.weights[:, : radius.max(initial=0) + 1]),
    ]
    for function, is_used, parameter in values:
        numbers = np.flatnonzero(is_used)
        if len(numbers):
            chosen = torch.from_numpy(np.ascontiguousarray(parameter[numbers]))
            steps.append((function, upload(torch.from_numpy(numbers)), upload(chosen)))
    return steps


def apply_effects(windows: Tensor, steps: list[Step]) -> None:
    """Apply the steps to windows, uint8 (N, side, side, 3), in place."""
    for function, numbers, parameter in steps:
        pixels = windows.index_select(0, numbers).to(torch.int32)
        windows.index_copy_(0, numbers, function(pixels, parameter).to(torch.uint8))


def erase_boxes(images: Tensor, box: Tensor, layout: str) -> None:
    """Set a box of each image to 0, in place.

    `images` is (N, 3, side, side), or (N, side, side, 3) with layout "NHWC". `box` is Effects.box on the device.
    """
    steps = torch.arange(images.shape[2], device=images.device)
    corner, size = box[:, :2, None], box[:, 2:, None]
    inside = (steps >= corner) & (steps < corner + size)  # (N, 2, side): rows and columns
    mask = inside[:, 0, :, None] & inside[:, 1, None]
    images.masked_fill_(mask[:, None] if layout == "NCHW" else mask[..., None], 0)


def _grey_level(pixels: Tensor) -> Tensor:
    """Return floor(0.2989 r + 0.587 g + 0.114 b), int32 (M, side, side, 1).

    The code multiplies the weights by 2^22 and rounds the products. Adding 272 corrects the errors of this rounding.
    """
    red, green, blue = pixels.unbind(3)
    return (1253677 * red + 2462056 * green + 478151 * blue + 272 >> 22).unsqueeze(3)


def _blend(pixels: Tensor, factor: Tensor, offset: Tensor | int) -> Tensor:
    return ((factor * pixels + offset) >> _FACTOR_BITS).clamp(0, 255)


def _brightness(pixels: Tensor, factor: Tensor) -> Tensor:
    return _blend(pixels, factor.view(-1, 1, 1, 1), 0)


def _contrast(pixels: Tensor, factor: Tensor) -> Tensor:
    total = _grey_level(pixels).sum(dim=(1, 2, 3))  # int64
    count = pixels.shape[1] * pixels.shape[2]
    offset = ((FACTOR_ONE - factor) * total).div(count, rounding_mode="floor").to(torch.int32)
    return _blend(pixels, factor.view(-1, 1, 1, 1), offset.view(-1, 1, 1, 1))


def _saturation(pixels: Tensor, factor: Tensor) -> Tensor:
    factor = factor.view(-1, 1, 1, 1)
    return _blend(pixels, factor, (FACTOR_ONE - factor) * _grey_level(pixels))


def _hue(pixels: Tensor, sextants: Tensor) -> Tensor:
    red, green, blue = pixels.unbind(3)
    largest = pixels.amax(3)
    chroma = largest - pixels.amin(3)
    unit = FACTOR_ONE * chroma
    from_green_or_blue = torch.where(largest == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(largest == red, green - blue, from_green_or_blue)
    angle = FACTOR_ONE * hue + chroma * sextants.view(-1, 1, 1)

    def channel(shift: int) -> Tensor:
        turned = angle + shift * unit
        turned = torch.where(turned < 0, turned + 6 * unit, turned)
        for _ in range(2):
            turned = torch.where(turned >= 6 * unit, turned - 6 * unit, turned)
        level = FACTOR_ONE * largest - torch.minimum(torch.minimum(turned, 4 * unit - turned), unit).clamp(min=0)
        return (level + (level * 257 >> 16)) >> _FACTOR_BITS

    return torch.stack([channel(5), channel(3), channel(1)], dim=3)


def _grey(pixels: Tensor, _: Tensor) -> Tensor:
    return _grey_level(pixels).expand_as(pixels)


def _blur(pixels: Tensor, weights: Tensor) -> Tensor:
    weights = weights.view(len(weights), -1, 1, 1, 1)
    rows = _blur_along(pixels << _ROW_BITS, weights, 2)
    return (_blur_along(rows, weights, 1) + (1 << (_ROW_BITS - 1))) >> _ROW_BITS


def _blur_along(values: Tensor, weights: Tensor, axis: int) -> Tensor:
    """Return the weighted sum along an axis. Each product is divided by 65536 and rounded down.

    On average, rounding down makes a product too small by one half, so the sum begins with half the number of products.
    A product is an unsigned 32-bit number, but the tensors are int32. A product of 2^31 or more therefore appears
    negative. Its bits are still right, and the shift and the mask take its upper 16 bits.
    """
    side, radius = values.shape[axis], weights.shape[1] - 1
    positions = torch.arange(-radius, side + radius, device=values.device).abs()
    padded = values.index_select(axis, side - 1 - (side - 1 - positions).abs())
    used = (weights[:, 1:] > 0).sum(dim=1, dtype=torch.int32)
    total = (weights[:, 0] * values >> 16 & 0xFFFF) + (used + 1) // 2
    for k in range(1, radius + 1):
        both = padded.narrow(axis, radius - k, side) + padded.narrow(axis, radius + k, side)
        total += weights[:, k] * both >> 16 & 0xFFFF
    return total


_JITTER = (_brightness, _contrast, _saturation, _hue)

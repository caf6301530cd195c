"""Parameters of the effects of each image, from uniform random numbers.

A pixel value x gets a new value by torchvision's formulas. They need only integers here, because the factor f of each
operation is a multiple of 1/4096:

    brightness  floor(f · x), at most 255
    contrast    floor(f · x + (1 − f) · mean of the grey levels), within 0..255
    saturation  floor(f · x + (1 − f) · grey level), within 0..255
    grey level  floor(0.2989 r + 0.587 g + 0.114 b)

torchvision (_functional_tensor.py: _blend, rgb_to_grayscale) computes the same formulas in float32. A result differs
from torchvision's by at most one grey level, and only where float32 rounding crosses a whole number.
pipeline.effects.batch has the formulas of hue and blur.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.sampling import EFFECT_NUMBERS
from pipeline.settings.effects import EffectSettings

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int32]

FACTOR_ONE = 4096  # the integer that stands for a factor of 1, or for one sextant of the hue
WEIGHT_ONE = 1 << 16  # sum of the weights of a blur
NO_OPERATION = -1  # value of a place in Effects.steps["order"] without an operation
TRIES = (EFFECT_NUMBERS - 12) // 2  # number of boxes that torchvision's RandomErasing tries: 10
STEPS_DTYPE = np.dtype(  # same fields as struct effects in pipeline/engines/effects.h
    [("order", np.int32, 4), ("factor", np.int32, 4), ("grey", np.int32), ("radius", np.int32)]
)
_ORDERS = np.array(list(permutations(range(4))), np.int32)


class Effects(NamedTuple):
    """Parameters of the effects of N images."""

    # (N,) of STEPS_DTYPE. `order` has the operations of the jitter in their order: 0 brightness, 1 contrast, 2
    # saturation, 3 hue, or NO_OPERATION. `factor` has the factors of these four operations in units of 1/4096; the
    # factor of the hue is a rotation of 0..6 sextants. `grey` is 0 or 1. `radius` is the largest distance in px at
    # which the blur weight is above 0; 0 if the image is not blurred.
    steps: npt.NDArray[np.void]
    # (N, R + 2): blur weights at the distances 0..R px, then 0. All 2 · R + 1 weights of a blur sum to WEIGHT_ONE.
    weights: Integers
    box: Integers  # (N, 4): row, column, height and width of the erased box in the finished image; all 0: no box

    @property
    def change_pixels(self) -> bool:
        """True if at least one of the images has jitter, grey or blur."""
        steps = self.steps
        return bool((steps["order"] != NO_OPERATION).any() or steps["grey"].any() or steps["radius"].any())

    def for_kernel(self) -> tuple[npt.NDArray[Any] | None, npt.NDArray[Any] | None, npt.NDArray[Any] | None]:
        """Return steps, blur weights and boxes for kernels.c; None for an array that no image needs.

        The weights become uint16, so a middle weight of 65536 becomes 0. Only images without blur have this weight, and
        kernels.c does not use their weights.
        """
        box = self.box if self.box.any() else None
        return (self.steps, self.weights.astype(np.uint16), box) if self.change_pixels else (None, None, box)


def blur_radius(size_px: int) -> int:
    """Return the radius of the blur's kernel, which has 2 · radius + 1 weights on each axis.

    The number of weights is about a tenth of `size_px`. For 224 px the kernel has 23 weights (SimCLR:
    tf2/data_util.py, random_blur and gaussian_blur).
    """
    return size_px // 10 // 2


def effect_parameters(uniform: Numbers, settings: EffectSettings, size_px: int) -> Effects:
    """Return the parameters for N images of `size_px`. `uniform` is the result of pipeline.sampling.draw_effects.

    The 32 numbers of an image give, in this order: whether the image has jitter, grey, blur and erase (four numbers);
    the order of the jitter; the four factors of the jitter; the sigma of the blur; row and column of the erased box;
    areas and then ratios of the ten boxes that are tried.
    """
    shares, order, factors, sigma, position, tries = np.split(uniform, (4, 5, 9, 10, 12), axis=1)
    steps = np.zeros(len(uniform), STEPS_DTYPE)
    steps["order"] = NO_OPERATION
    if settings.jitter is not None:
        _draw_jitter(steps, shares[:, 0] < settings.jitter_share, order[:, 0], factors, settings.jitter)
    steps["grey"] = shares[:, 1] < settings.grey
    low, high = settings.blur_sigma
    weights = blur_weights(low + (high - low) * sigma[:, 0], blur_radius(size_px))
    weights[shares[:, 2] >= settings.blur] = [WEIGHT_ONE, *[0] * (blur_radius(size_px) + 1)]
    steps["radius"] = np.max(np.where(weights > 0, np.arange(weights.shape[1]), 0), axis=1)
    box = erased_boxes(tries.reshape(-1, 2, TRIES), position, settings, size_px)
    box[shares[:, 3] >= settings.erase] = 0
    return Effects(steps, weights, box)


def _draw_jitter(
    steps: npt.NDArray[np.void],
    has_jitter: npt.NDArray[np.bool_],
    order: Numbers,
    factors: Numbers,
    jitter: tuple[float, float, float, float],
) -> None:
    """Set the fields `order` and `factor`, as ColorJitter.get_params draws them.

    All 24 orders are equally probable. An operation whose setting in `jitter` is 0 changes nothing, and is left out.
    """
    *blends, hue = jitter
    low = np.array([*(max(0.0, 1 - value) for value in blends), -hue])
    high = np.array([*(1 + value for value in blends), hue])
    drawn = np.rint(FACTOR_ONE * (low + (high - low) * factors)).astype(np.int32)
    drawn[:, 3] = 6 * drawn[:, 3] % (6 * FACTOR_ONE)  # converts turns to sextants: 1 turn is 6 sextants
    operations = _ORDERS[(len(_ORDERS) * order).astype(np.int64)]
    is_used = has_jitter[:, None] & (np.array(jitter) > 0)[operations]
    steps["order"] = np.where(is_used, operations, NO_OPERATION)
    steps["factor"] = drawn


def blur_weights(sigma_px: Numbers, radius: int) -> Integers:
    """Return the blur weights (N, radius + 2) for standard deviations (N,).

    The weight at distance x is 2^16 · exp(−x² / (2 sigma²)) / sum, rounded to nearest. The middle weight is 2^16 minus
    the weights of both sides. The last number of each row is 0. At this 0, the C code stops adding weights.
    """
    density = np.exp(-0.5 * (np.arange(radius + 1) / sigma_px[:, None]) ** 2)
    density /= density[:, :1] + 2 * density[:, 1:].sum(axis=1, keepdims=True)
    weights = np.pad(np.rint(WEIGHT_ONE * density).astype(np.int32), ((0, 0), (0, 1)))
    weights[:, 0] = WEIGHT_ONE - 2 * weights[:, 1:].sum(axis=1)
    return weights


def erased_boxes(tries: Numbers, position: Numbers, settings: EffectSettings, size_px: int) -> Integers:
    """Return row, column, height and width of the boxes (N, 4), as torchvision's RandomErasing.get_params draws them.

    Each try is a box with a uniform area and a log-uniform ratio of height to width. The result is the first try whose
    height and width are less than `size_px`. If there is no such try, the box is empty. `tries` is (N, 2, TRIES) and
    `position` is (N, 2), uniform in [0, 1).
    """
    (smallest, largest), (low, high) = settings.erase_scale, np.log(settings.erase_ratio)
    area = size_px**2 * (smallest + (largest - smallest) * tries[:, 0])
    ratio = np.exp(low + (high - low) * tries[:, 1])
    sides = np.rint(np.sqrt(np.stack([area * ratio, area / ratio], axis=2))).astype(np.int32)  # (N, TRIES, 2)
    fits = (sides < size_px).all(axis=2)
    chosen = sides[np.arange(len(sides)), fits.argmax(axis=1)]
    corner = (position * (size_px + 1 - chosen)).astype(np.int32)
    return np.where(fits.any(axis=1, keepdims=True), np.concatenate([corner, chosen], axis=1), 0).astype(np.int32)

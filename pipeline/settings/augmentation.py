"""Settings of the formula of pipeline.augment, whose docstring describes each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from pipeline.settings.effects import EffectSettings
from prep.console import WrongArgument, did_you_mean
from prep.store.manifest import ChannelStats

CROP_PX = 224
MIN_SIZE_PX = 32
MEANS = ("channel", "image", "aligned", "none")
COLOURS = ("stdev", "eigenvalue", "off")
WINDOWS = ("random", "resized", "centre")
PRESETS = ("alexnet", "resnet", "simclr")
Levels = tuple[float, float, float]  # grey levels of R, G and B, 0..255
# Mean and standard deviation of ImageNet's pixels in [0, 1]: IMAGENET_DEFAULT_MEAN and IMAGENET_DEFAULT_STD of timm
# (timm/data/constants.py), and the values in torchvision's references/classification/presets.py.
IMAGENET = ChannelStats((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1.0)
# Settings that every state of a stream contains. A state contains each of the other settings only if it differs from
# its default. A state that was saved before a setting existed therefore stays valid.
_ALWAYS_IN_STATES = ("mean", "colour", "strength", "divisor", "shared_by")


@dataclass(frozen=True)
class Augmentation(EffectSettings):
    """Settings of the images of a stream. `Augmentation.preset(name)` returns the settings of a well-known recipe."""

    # Mean to subtract: one of MEANS, which the docstring of pipeline.augment describes, or three grey levels.
    mean: str | Levels = "channel"
    # Formula of σ, the standard deviation of the colour noise along a principal component, in grey levels. λ is the
    # component's eigenvalue of the covariance matrix of the RGB values. "stdev": strength·√λ, with λ of pixels in
    # 0..255 (the authors' code). "eigenvalue": 255·strength·λ, with λ of pixels in [0, 1]. "off": 0.
    colour: str = "stdev"
    strength: float = 0.1  # standard deviation of α, the factor of the colour noise (section 4.1)
    divisor: float = 1.0  # every finished image is divided by this number; 1 + strength in the authors' code
    shared_by: int = 1  # number of consecutive images that share window and flip; 32 in the authors' code (crop_chunk)
    eval_divisor: float | None = None  # divisor of evaluation images; None: same as `divisor`; 1 in the authors' code
    size_px: int = CROP_PX  # side of the images: MIN_SIZE_PX to the side of the store's images
    # Part of a record that becomes a training image. "random": a random crop of size_px from the central square.
    # "centre": the centre crop. "resized": a random region of the record, resized to size_px, as torchvision's
    # RandomResizedCrop.
    window: str = "random"
    # Smallest and largest area of a resized region, as a share of the record's area: more than 0 and at most 1.
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # smallest and largest width / height of a resized region
    flip: float = 0.5  # probability with which a training image is mirrored left to right
    std: Levels | None = None  # grey levels by which R, G and B are divided, after the mean was subtracted

    @classmethod
    def preset(cls, name: str) -> Self:
        """Return the settings of a well-known recipe. Raises WrongArgument for a name that is not one of PRESETS.

        alexnet  the default settings: random crop, flip and colour noise (section 4.1 of the paper)
        resnet   RandomResizedCrop(224) with scale 0.08..1 and ratio 3/4..4/3, flip with probability one half, and
                 ImageNet's mean and standard deviation. Sources: references/classification/presets.py of torchvision
                 and timm's transforms_imagenet_train, both without colour jitter
        simclr   the windows and flip of resnet, jitter of strength 1 for 80 % of the images, 20 % grey images, 50 %
                 blurred images, and pixels in [0, 1]. Sources: SimCLR, appendix A, and
                 google-research/simclr, tf2/data_util.py (which resizes by a bicubic filter)
        """
        check_choice("preset", name, PRESETS)
        if name == "alexnet":
            return cls()
        if name == "simclr":
            return cls(
                "none",
                colour="off",
                window="resized",
                divisor=255.0,
                jitter=(0.8, 0.8, 0.8, 0.2),
                jitter_share=0.8,
                grey=0.2,
                blur=0.5,
            )
        return cls(_grey_levels(IMAGENET.mean), colour="off", window="resized", std=_grey_levels(IMAGENET.std))

    @property
    def divisor_in_evaluation(self) -> float:
        """The number by which evaluation images are divided."""
        return self.divisor if self.eval_divisor is None else self.eval_divisor

    def for_state(self) -> dict[str, Any]:
        """Return the settings of training images, for the state of a stream, as JSON values.

        `eval_divisor` is left out. A setting that is not in _ALWAYS_IN_STATES is left out if it has its default value.
        """
        values = {field.name: (getattr(self, field.name), field.default) for field in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, (value, default) in values.items()
            if name in _ALWAYS_IN_STATES or (name != "eval_divisor" and value != default)
        }

    def window_text(self, views: int) -> str:
        """Return the settings of the windows for StreamKey.window. The text "random" means one crop of CROP_PX."""
        if (self.window, self.size_px, views) == ("random", CROP_PX, 1):
            return "random"
        region = f" scale {self.scale} ratio {self.ratio}" if self.window == "resized" else ""
        return f"{self.window} {self.size_px} px {views} views{region}"

    def __post_init__(self) -> None:
        """Raises WrongArgument for a value that is not allowed."""
        if isinstance(self.mean, str):
            check_choice("mean", self.mean, MEANS)
        else:
            _check_levels("mean", self.mean, f"a tuple of three grey levels, or one of {', '.join(MEANS)}")
        check_choice("colour", self.colour, COLOURS)
        check_choice("window", self.window, WINDOWS)
        self.check_effects()
        if self.strength < 0 or min(self.divisor, self.divisor_in_evaluation) <= 0 or self.shared_by < 1:
            raise WrongArgument(
                f"strength {self.strength}, divisor {self.divisor}, shared_by {self.shared_by}, eval_divisor "
                f"{self.eval_divisor}: expected strength at least 0, divisors more than 0, shared_by at least 1."
            )
        if self.std is not None:
            _check_levels("std", self.std, "a tuple of three grey levels of more than 0, or None")
            if min(self.std) <= 0:
                raise WrongArgument(f"std {self.std}: expected three grey levels of more than 0, or None.")
        if not isinstance(self.size_px, int) or self.size_px < MIN_SIZE_PX:
            raise WrongArgument(f"size_px {self.size_px}: expected a whole number of at least {MIN_SIZE_PX}.")
        if not 0 <= self.flip <= 1:
            raise WrongArgument(f"flip {self.flip}: expected a probability of 0 to 1.")
        check_range("scale", self.scale, 1)
        check_range("ratio", self.ratio, math.inf)
        if self.window == "resized" and self.mean == "aligned":
            raise WrongArgument(
                'mean "aligned" with window "resized": a resized region has no aligned part of the mean image. Choose '
                'mean "channel", "image" or "none", or three grey levels.'
            )


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise WrongArgument if `value` is not one of `allowed`."""
    if value not in allowed:
        raise WrongArgument(f"{name} {value!r}: expected one of {', '.join(allowed)}.{did_you_mean(value, allowed)}")


def check_range(name: str, value: Sequence[float], largest: float) -> None:
    """Raise WrongArgument unless `value` is two numbers in increasing order, more than 0 and at most `largest`."""
    if not (_are_numbers(value, 2) and 0 < value[0] <= value[1] <= largest):
        limit = "" if math.isinf(largest) else f" and at most {largest:g}"
        raise WrongArgument(f"{name} {value}: expected a tuple of two numbers in increasing order, more than 0{limit}.")


def _check_levels(name: str, value: Sequence[float], expected: str) -> None:
    if not _are_numbers(value, 3):
        raise WrongArgument(f"{name} {value!r}: expected {expected}.")


def _are_numbers(value: Any, count: int) -> bool:
    """Return whether `value` is a tuple of `count` finite numbers."""
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(isinstance(number, int | float) and math.isfinite(number) for number in value)
    )


def _grey_levels(levels: Sequence[float]) -> Levels:
    red, green, blue = (255 * level for level in levels)
    return red, green, blue

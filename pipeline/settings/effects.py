"""Settings of colour jitter, grey, blur and random erasing. Augmentation (augmentation.py) inherits these settings."""

from __future__ import annotations

from dataclasses import dataclass

from prep.console import WrongArgument

MAX_JITTER = 10.0  # largest brightness, contrast and saturation; up to this value, 32 bits are enough in kernels.c


@dataclass(frozen=True, kw_only=True)
class EffectSettings:
    """Settings of the effects of training images. Evaluation images have no effects.

    The steps have a fixed order: jitter, grey, blur, then flip, colour noise, mean and division, then erase. Jitter,
    grey and blur take uint8 pixels and round their result to uint8.
    """

    # Brightness, contrast, saturation and hue of torchvision's ColorJitter. The factors of the first three are drawn
    # from [max(0, 1 − value), 1 + value], and the hue is rotated by −value to value turns. None: no jitter.
    jitter: tuple[float, float, float, float] | None = None
    jitter_share: float = 1.0  # share of images with jitter, 0..1 (torchvision's RandomApply)
    grey: float = 0.0  # share of grey images, 0..1 (torchvision's RandomGrayscale)
    blur: float = 0.0  # share of blurred images, 0..1; the kernel is a tenth of size_px wide (SimCLR's data_util.py)
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # range of the blur's standard deviation in px (GaussianBlur)
    erase: float = 0.0  # share of images with an erased box, 0..1 (torchvision's RandomErasing, value 0)
    erase_scale: tuple[float, float] = (0.02, 0.33)  # range of the share of the image's area that the box covers
    erase_ratio: tuple[float, float] = (0.3, 3.3)  # range of the box's height / width

    @property
    def has_effects(self) -> bool:
        """True if training images can have effects."""
        return self.changes_pixels or self.erase > 0

    @property
    def changes_pixels(self) -> bool:
        """True if training images can have jitter, grey or blur, which change the pixels of a window."""
        return (self.jitter is not None and self.jitter_share > 0) or max(self.grey, self.blur) > 0

    def check_effects(self) -> None:
        """Raise WrongArgument for a value that is not allowed."""
        *factors, hue = self.jitter or (0.0, 0.0, 0.0, 0.0)
        checks = {
            "jitter": (
                len(factors) == 3 and all(0 <= value <= MAX_JITTER for value in factors) and 0 <= hue <= 0.5,
                f"brightness, contrast and saturation of 0 to {MAX_JITTER:g}, and hue of 0 to 0.5",
            ),
            **{name: (0 <= getattr(self, name) <= 1, "0 to 1") for name in ("jitter_share", "grey", "blur", "erase")},
            "blur_sigma": (_is_range(self.blur_sigma, 0.01, 100), "a range within 0.01 to 100 px, lowest value first"),
            "erase_scale": (_is_range(self.erase_scale, 0, 1), "a range within 0 to 1, lowest value first"),
            "erase_ratio": (_is_range(self.erase_ratio, 0.01, 100), "a range within 0.01 to 100, lowest value first"),
        }
        for name, (is_allowed, expected) in checks.items():
            if not is_allowed:
                raise WrongArgument(f"{name} {getattr(self, name)}: expected {expected}.")


def _is_range(values: tuple[float, float], lowest: float, highest: float) -> bool:
    return len(values) == 2 and lowest <= values[0] <= values[1] <= highest

"""The argument `normalize` of the loaders: mean and standard deviation of each channel."""

from __future__ import annotations

import math

from pipeline.settings.augmentation import Augmentation
from prep.console import WrongArgument
from prep.store.manifest import ChannelStats


def grey_levels(normalize: ChannelStats, augmentation: Augmentation) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of `normalize`, in grey levels.

    Raises WrongArgument for numbers that are not allowed, and if `mean`, `std` or a divisor of `augmentation` is not
    the default.
    """
    try:
        mean, std, max_value = normalize
        is_allowed = len(mean) == len(std) == 3 and min(*std, max_value) > 0 and all(map(math.isfinite, (*mean, *std)))
    except (TypeError, ValueError):
        is_allowed = False
    if not is_allowed:
        raise WrongArgument(
            f"normalize {normalize!r}: expected ChannelStats(mean, std, max_value) with three means, three std of more "
            "than 0 and a max_value of more than 0. loader.channel_stats() returns the numbers of the store."
        )
    if (augmentation.mean, augmentation.divisor, augmentation.divisor_in_evaluation) != ("channel", 1, 1):
        raise WrongArgument(
            f"normalize with augmentation.mean {augmentation.mean} and divisor {augmentation.divisor:g}: normalize "
            'replaces both. Leave both settings at "channel" and 1.'
        )
    if augmentation.std is not None:
        raise WrongArgument(
            f"normalize with augmentation.std {augmentation.std}: normalize replaces std. Pass only one of them."
        )
    return [255 / max_value * level for level in mean], [255 / max_value * level for level in std]

"""Sample windows and parameters of all effects, for the self-test of the C kernel."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import numpy.typing as npt

from pipeline.effects.parameters import STEPS_DTYPE, Effects, blur_weights

SIDE_PX = 43
# First digits of the SHA-256 of the windows after their effects. tests/pipeline/effects/test_batch.py checks that
# PyTorch gives the same digest. The self-test uses the digest, because workers of a service do not load PyTorch.
_DIGEST = "f233c79db6ec0472"


def sample_windows() -> npt.NDArray[np.uint8]:
    """Return four windows (4, SIDE_PX, SIDE_PX, 3), which do not depend on the version of NumPy."""
    return (
        (np.arange(4 * SIDE_PX**2 * 3, dtype=np.uint64) ** 3 // 1009 % 256).astype(np.uint8).reshape(4, SIDE_PX, -1, 3)
    )


def sample_effects() -> Effects:
    """Return effects for the four windows. The jitter of each window begins with a different operation."""
    steps = np.zeros(4, STEPS_DTYPE)
    steps["order"], steps["factor"] = (np.arange(4)[:, None] + np.arange(4)) % 4, (5000, 6500, 2500, 10_000)
    steps["grey"], steps["radius"] = (0, 0, 1, 0), (0, 2, 2, 1)
    weights = blur_weights(np.array([1.0, 1.0, 0.7, 0.3]), 2)
    return Effects(steps, weights, np.array([(0, 0, 0, 0), (1, 2, 3, 4), (0, 0, 0, 0), (40, 0, 3, 43)], np.int32))


def is_expected(images: npt.NDArray[np.float32]) -> bool:
    """Return whether `images` (4, SIDE_PX, SIDE_PX, 3) equal the four windows after their effects."""
    return sha256(images.astype(np.uint8).tobytes()).hexdigest().startswith(_DIGEST)

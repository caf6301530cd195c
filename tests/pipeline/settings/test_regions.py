"""Resized regions have the distribution of torchvision's RandomResizedCrop.get_params, which the test restates."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from pipeline.sampling import choose_regions, draw_flips, draw_regions

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZES = [(256, 256), (256, 391), (500, 375), (256, 1100), (900, 200)]


def get_params(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """Return top, left, height and width, as torchvision.transforms.RandomResizedCrop.get_params does."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randrange(0, height - h + 1), rng.randrange(0, width - w + 1), h, w
    return fallback(height, width, ratio)


def fallback(height: int, width: int, ratio: tuple[float, float]) -> tuple[int, int, int, int]:
    h, w = height, width
    if width / height < min(ratio):
        h = round(w / min(ratio))
    elif width / height > max(ratio):
        w = round(h * max(ratio))
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_regions_have_the_distribution_of_torchvision(size: tuple[int, int]) -> None:
    """Two-sample Kolmogorov-Smirnov tests of area, aspect ratio and position. The significance level is 0.1 %."""
    count, rng = 10_000, random.Random(1)
    theirs = np.array([get_params(*size, SCALE, RATIO, rng) for _ in range(count)], float)
    numbers = np.concatenate([draw_regions(2, 0, step, 1000, SCALE, RATIO) for step in range(count // 1000)])
    ours = choose_regions(numbers, np.full((count, 2), size, np.int32), RATIO).astype(float)
    for name, value in {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "free rows below": lambda box: size[0] - box[:, 0] - box[:, 2],
        "free columns at the right": lambda box: size[1] - box[:, 1] - box[:, 3],
    }.items():
        a, b = np.sort(value(ours)), np.sort(value(theirs))
        points = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, points, "right") - np.searchsorted(b, points, "right")).max() / count
        assert distance < 1.95 * math.sqrt(2 / count), (name, distance)


def test_a_region_is_the_first_try_that_fits_or_the_central_rectangle() -> None:
    """The test computes each region again from the same random numbers.

    In small or narrow images, some tries do not fit.
    """
    sizes = [(256, 256), (32, 33), (32, 200), (400, 32), (35, 64)] * 60
    numbers = draw_regions(0, 3, 1, len(sizes), (0.3, 1.0), (0.5, 2.5))
    boxes = choose_regions(numbers, np.array(sizes, np.int32), (0.5, 2.5))
    central = 0
    for own, (height, width), box in zip(numbers.tolist(), sizes, boxes.tolist(), strict=True):
        for share, aspect in own[:10]:
            w, h = (round(math.sqrt(height * width * share * a)) for a in (aspect, 1 / aspect))
            if w <= width and h <= height:
                expected = int(own[10][0] * (height - h + 1)), int(own[10][1] * (width - w + 1)), h, w
                break
        else:
            expected, central = fallback(height, width, (0.5, 2.5)), central + 1
        assert tuple(box) == expected
        assert 0 <= box[0] <= height - box[2] and 0 <= box[1] <= width - box[3]
    assert 20 < central < 200


def test_the_numbers_of_a_step_depend_on_seed_epoch_and_step_only() -> None:
    positions = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    drawn = [draw_regions(*position, 16, SCALE, RATIO) for position in positions]
    assert len({numbers.tobytes() for numbers in drawn}) == 4
    assert np.array_equal(drawn[3], draw_regions(0, 0, 1, 16, SCALE, RATIO))
    shared = draw_regions(0, 0, 0, 10, SCALE, RATIO, 4)
    assert shared.shape == (10, 11, 2) and len(np.unique(shared[:, 10], axis=0)) == 3
    assert np.array_equal(shared[:4], np.repeat(shared[:1], 4, axis=0))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_the_images_is_flipped(share: float) -> None:
    flips = np.concatenate([draw_flips(0, 0, step, 100, share, 1) for step in range(100)])
    assert flips.dtype == np.int32 and set(flips.tolist()) <= {0, 1}
    assert abs(flips.mean() - share) <= 3.3 * math.sqrt(share * (1 - share) / 10_000)

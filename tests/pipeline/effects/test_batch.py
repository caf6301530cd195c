"""Effects of a batch are compared with torchvision's formulas. PyTorch and the C kernel must give the same bits."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch

from pipeline.effects.batch import apply_effects, effect_steps, erase_boxes
from pipeline.effects.parameters import (
    NO_OPERATION,
    STEPS_DTYPE,
    WEIGHT_ONE,
    Effects,
    blur_radius,
    blur_weights,
    effect_parameters,
)
from pipeline.effects.sample import is_expected, sample_effects, sample_windows
from pipeline.engines import kernels
from pipeline.engines.kernels import BatchJob, address
from pipeline.sampling import draw_effects
from pipeline.settings.effects import EffectSettings
from tests.pipeline.effects import torchvision_formulas as torchvision
from tests.pipeline.streaming import needs_kernel

Pixels = npt.NDArray[np.uint8]
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
FACTORS = (0, 819, 2048, 3500, 4095, 4096, 4500, 7373, 4096 * 11)  # in units of 1/4096
TURNS = (0, 1, 300, 819, 2048, 4095)  # shifts of the hue, in units of 1/4096 of a full turn


def windows(count: int, side: int) -> Pixels:
    """Return `count` images: smooth ramps in image 1, grey pixels in 2, saturated colours in 3, noise in all others."""
    rng = np.random.default_rng(side)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images[1] = np.linspace(0, 255, side)[:, None, None] * [1, 0.5, 0.9]
    images[2] = rng.integers(0, 256, (side, side, 1))
    images[3] = 255 * rng.integers(0, 2, (side, side, 3))
    return images


def no_effects(count: int, side: int) -> Effects:
    steps = np.zeros(count, STEPS_DTYPE)
    steps["order"] = NO_OPERATION
    weights = np.zeros((count, blur_radius(side) + 2), np.int32)
    weights[:, 0] = WEIGHT_ONE
    return Effects(steps, weights, np.zeros((count, 4), np.int32))


def with_pytorch(images: Pixels, effects: Effects) -> Pixels:
    result = torch.from_numpy(images.copy())
    apply_effects(result, effect_steps(effects, lambda values: values))
    return result.numpy()


def jittered(images: Pixels, operation: int, factor: int) -> Pixels:
    effects = no_effects(len(images), images.shape[1])
    effects.steps["order"][:, 2], effects.steps["factor"][:, operation] = operation, factor
    return with_pytorch(images, effects)


def difference(images: Pixels, expected: Pixels) -> npt.NDArray[np.int64]:
    return np.abs(images.astype(np.int64) - expected)


@pytest.mark.parametrize("factor", FACTORS)
def test_brightness_and_saturation_have_the_bits_of_torchvision(factor: int) -> None:
    """The product of a pixel of 8 bits and a factor of 16 bits is exact in float32, so torchvision rounds only once."""
    images = windows(4, 48)
    for image, bright, saturated in zip(
        images, jittered(images, BRIGHTNESS, factor), jittered(images, SATURATION, factor), strict=True
    ):
        assert np.array_equal(bright, torchvision.adjust_brightness(image, factor / 4096))
        far = difference(saturated, torchvision.adjust_saturation(image, factor / 4096))
        same_grey = difference(jittered(image[None], SATURATION, 0)[0], torchvision.rgb_to_grayscale(image)) == 0
        assert not far[same_grey].any() and same_grey.mean() > 0.999


@pytest.mark.parametrize(
    ("operation", "formula", "factors", "unit"),
    [
        (CONTRAST, torchvision.adjust_contrast, FACTORS[:-1], 4096),
        (HUE, torchvision.adjust_hue, [6 * turn for turn in TURNS], 6 * 4096),
    ],
)
def test_contrast_and_hue_are_within_one_grey_level_of_torchvision(
    operation: int, formula: Callable[[Pixels, float], Pixels], factors: list[int], unit: int
) -> None:
    images = windows(6, 64)
    far = [
        difference(result, formula(image, (factor - unit if operation == HUE and 2 * factor > unit else factor) / unit))
        for factor in factors
        for image, result in zip(images, jittered(images, operation, factor), strict=True)
    ]
    assert np.max(far) <= 1 and np.mean(far) < 0.002


def test_a_factor_of_one_and_a_full_turn_change_nothing() -> None:
    images = windows(4, 40)
    for operation in (BRIGHTNESS, CONTRAST, SATURATION, HUE):
        assert np.array_equal(jittered(images, operation, 0 if operation == HUE else 4096), images)


def test_grey_is_the_exact_floor_of_the_weighted_sum_of_all_colours() -> None:
    """Grey is 0.2989 r + 0.587 g + 0.114 b, computed in integers.

    For a few colours, torchvision's float32 gives one grey level less.
    """
    green, blue = np.meshgrid(np.arange(256), np.arange(256), indexing="ij")
    effects = no_effects(1, 256)
    effects.steps["grey"] = 1
    for red in range(0, 256, 17):
        image = np.stack([np.full_like(green, red), green, blue], axis=2).astype(np.uint8)
        grey = with_pytorch(image[None], effects)[0]
        assert np.array_equal(grey, np.repeat((2989 * red + 5870 * green + 1140 * blue)[:, :, None] // 10000, 3, 2))
        far = difference(grey, torchvision.rgb_to_grayscale(image))
        assert far.max() <= 1 and far.mean() < 0.001


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("side", [32, 75, 128])
def test_blur_is_within_one_grey_level_of_torchvision(side: int, sigma: float) -> None:
    images, effects = windows(4, side), no_effects(4, side)
    radius = blur_radius(side)
    effects.weights[:] = blur_weights(np.full(4, sigma), radius)
    effects.steps["radius"] = np.count_nonzero(effects.weights[0]) - 1
    far = [
        difference(result, torchvision.gaussian_blur(image, 2 * radius + 1, sigma))
        for image, result in zip(images, with_pytorch(images, effects), strict=True)
    ]
    assert np.max(far) <= 1 and np.mean(far) < 0.03
    for level in (0, 1, 128, 255):
        flat = np.full_like(images, level)
        assert np.array_equal(with_pytorch(flat, effects), flat)


def test_the_steps_have_their_order_and_other_images_stay_unchanged() -> None:
    images, effects = windows(6, 50), no_effects(6, 50)
    orders = {1: (HUE, CONTRAST, BRIGHTNESS, SATURATION), 4: (BRIGHTNESS, SATURATION, CONTRAST, HUE)}
    factors = (5000, 2500, 6500, 9000)
    for number, order in orders.items():
        effects.steps["order"][number], effects.steps["factor"][number] = order, factors
    effects.steps["grey"][4] = 1
    effects.weights[4] = blur_weights(np.array([1.5]), 2)
    effects.steps["radius"][4] = 2
    results = with_pytorch(images, effects)
    for number, image in enumerate(images):
        expected = image[None]
        for operation in orders.get(number, ()):
            expected = jittered(expected, operation, factors[operation])
        if number == 4:
            last = no_effects(1, 50)
            last.steps["grey"] = 1
            expected = with_pytorch(expected, last)
            last.steps["grey"], last.steps["radius"], last.weights[:] = 0, 2, effects.weights[4]
            expected = with_pytorch(expected, last)
        assert np.array_equal(results[number], expected[0])


def nearly_flat(side: int) -> Pixels:
    """Return an image whose pixels have the level 101, except one pixel with 102. Its mean grey level is above 100."""
    image = np.full((side, side, 3), 101, np.uint8)
    image[10, 10] = 102
    return image


def test_contrast_rounds_down_where_the_offset_is_a_negative_fraction() -> None:
    """A pixel of 101 with factor 2 and mean grey level 100.0004 gives 2 · 101 − 100.0004 = 101.9996."""
    assert jittered(nearly_flat(50)[None], CONTRAST, 8192)[0, 0, 0].tolist() == [101] * 3


def random_effects(count: int, side: int) -> Effects:
    settings = EffectSettings(jitter=(0.8, 0.8, 9, 0.5), jitter_share=0.8, grey=0.2, blur=0.6, erase=0.5)
    return effect_parameters(draw_effects(side, 0, 0, count), settings, side)


@needs_kernel
@pytest.mark.parametrize(("layout", "side"), [("NCHW", 224), ("NHWC", 37), ("NCHW", 64), ("NHWC", 65), ("NCHW", 300)])
def test_c_and_pytorch_give_the_same_bits(layout: str, side: int) -> None:
    assert kernels.native is not None
    count, width = 24 if side < 100 else 6, side + 5
    images, effects = windows(count, width), random_effects(count, side)
    images[5], effects.steps[5] = nearly_flat(width), ((CONTRAST, -1, -1, -1), (0, 8192, 0, 0), 0, 0)
    flip = np.arange(count, dtype=np.int32) % 2
    shape = (count, 3, side, side) if layout == "NCHW" else (count, side, side, 3)
    out, position = np.full(shape, np.nan, np.float32), np.tile(np.array([2, 4], np.int32), (count, 1))
    shift = np.random.default_rng(0).normal(0, 9, (count, 3)).astype(np.float32)
    job = BatchJob(
        None,
        address(images) + images[0].nbytes * np.arange(count).astype(np.uint64),
        np.full(count, images[0].nbytes),
        np.full((count, 2), width, np.int32),
        position[:, None],
        flip[:, None],
        shift,
        None,
        0,
        side,
        layout,
        0.5,
        out,
        effects=effects,
    )
    before = images.copy()
    kernels.native.make_images(job)
    assert job.failed == count and np.array_equal(images, before)
    pixels = with_pytorch(np.ascontiguousarray(images[:, 2 : 2 + side, 4 : 4 + side]), effects)
    pixels[flip == 1] = pixels[flip == 1, :, ::-1]
    expected = (pixels + shift[:, None, None]) * np.float32(0.5)
    for image, (top, left, height, breadth) in zip(expected, effects.box.tolist(), strict=True):
        image[top : top + height, left : left + breadth] = 0
    assert effects.box.any() and effects.change_pixels
    assert np.array_equal(out, expected.transpose(0, 3, 1, 2) if layout == "NCHW" else expected)


def test_the_self_test_of_the_c_kernel_expects_the_result_of_pytorch() -> None:
    effects = sample_effects()
    windows = torch.from_numpy(with_pytorch(sample_windows(), effects))
    erase_boxes(windows, torch.from_numpy(effects.box), "NHWC")
    assert is_expected(windows.numpy().astype(np.float32))
    windows[3, 20, 20, 2] ^= 1
    assert not is_expected(windows.numpy().astype(np.float32))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_only_the_box_is_erased(layout: str) -> None:
    box = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 4], [5, 0, 2, 7]], dtype=torch.int32)
    images = torch.ones((3, 3, 7, 7) if layout == "NCHW" else (3, 7, 7, 3), dtype=torch.float16)
    erase_boxes(images, box, layout)
    expected = np.ones((3, 7, 7))
    expected[1, 1:4, 2:6] = expected[2, 5:, :] = 0
    for channel in images.unbind(1 if layout == "NCHW" else 3):
        assert np.array_equal(channel.numpy(), expected)

"""Parameters of the effects: torchvision's distributions, the share of images with each effect, and exact bits."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest

from pipeline.effects.parameters import WEIGHT_ONE, Effects, blur_radius, blur_weights, effect_parameters
from pipeline.sampling import draw_effects
from pipeline.settings.augmentation import Augmentation
from pipeline.settings.effects import EffectSettings
from prep.console import WrongArgument
from tests.pipeline.effects.torchvision_formulas import erasing_box, gaussian_kernel

IMAGES = 10_000
SIMCLR = EffectSettings(jitter=(0.8, 0.8, 0.8, 0.2), jitter_share=0.8, grey=0.2, blur=0.5, erase=0.25)


def draw(settings: EffectSettings, size_px: int = 224, seed: int = 1) -> Effects:
    return effect_parameters(draw_effects(seed, 2, 3, IMAGES), settings, size_px)


def assert_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Chi-square test with 20 bins: for uniform values, the statistic exceeds 43.8 with probability 0.001."""
    counts, _ = np.histogram(values, 20, (low, high))
    assert counts.sum() == len(values)
    expected = len(values) / 20
    assert ((counts - expected) ** 2 / expected).sum() < 43.8


def assert_share(chosen: np.ndarray, share: float) -> None:
    assert chosen.mean() == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / len(chosen)))


def test_each_effect_has_its_share_and_the_effects_are_independent() -> None:
    effects = draw(replace(SIMCLR, blur_sigma=(1, 2)))  # a blur with a sigma of 0.1 px changes nothing
    chosen = {
        0.8: (effects.steps["order"] >= 0).any(axis=1),
        0.2: effects.steps["grey"] == 1,
        0.5: effects.steps["radius"] > 0,
        0.25: effects.box[:, 2] > 0,
    }
    for share, images in chosen.items():
        assert_share(images, share)
    assert np.abs(np.corrcoef(list(chosen.values())) - np.eye(4)).max() < 4 / np.sqrt(IMAGES)


def test_factors_are_uniform_in_the_ranges_of_color_jitter() -> None:
    factor = draw(EffectSettings(jitter=(0.8, 0.4, 1.5, 0.2))).steps["factor"]
    for k, (low, high) in enumerate([(0.2, 1.8), (0.6, 1.4), (0.0, 2.5)]):
        assert_uniform(factor[:, k] / 4096, low - 1 / 8000, high + 1 / 8000)  # factors are multiples of 1/4096
    turns = factor[:, 3] / (6 * 4096)
    assert factor[:, 3].min() >= 0 and turns.max() < 1
    assert_uniform(np.where(turns > 0.5, turns - 1, turns), -0.2002, 0.2002)


def test_all_orders_of_the_jitter_are_equally_probable() -> None:
    order = draw(EffectSettings(jitter=(0.4, 0.4, 0.4, 0.1))).steps["order"]
    index = {permutation: number for number, permutation in enumerate(permutations(range(4)))}
    counts = np.bincount([index[tuple(row)] for row in order.tolist()], minlength=24)
    assert ((counts - IMAGES / 24) ** 2 / (IMAGES / 24)).sum() < 49.7  # exceeded with probability 0.001


def test_an_operation_that_changes_nothing_is_left_out() -> None:
    order = draw(EffectSettings(jitter=(0.4, 0, 0.4, 0))).steps["order"]
    assert {tuple(sorted(row)) for row in order.tolist()} == {(-1, -1, 0, 2)}
    assert not draw(EffectSettings(jitter=(0, 0, 0, 0))).change_pixels
    assert not draw(EffectSettings()).change_pixels and not draw(EffectSettings()).box.any()


def test_blur_weights_are_torchvisions_kernel_with_uniform_sigma() -> None:
    assert [blur_radius(size_px) for size_px in (224, 96, 64, 32)] == [11, 4, 3, 1]
    sigma = np.array([0.1, 0.35, 1.0, 1.7, 2.0])
    for one, weights in zip(sigma, blur_weights(sigma, 11), strict=True):
        assert weights[12] == 0
        both = np.concatenate([weights[11:0:-1], weights[:12]])
        assert both.sum() == WEIGHT_ONE
        assert np.abs(both / WEIGHT_ONE - gaussian_kernel(23, one))[np.arange(23) != 11].max() <= 0.5 / WEIGHT_ONE
        assert abs(weights[0] / WEIGHT_ONE - gaussian_kernel(23, one)[11]) <= 11 / WEIGHT_ONE
    effects = draw(EffectSettings(blur=1, blur_sigma=(0.6, 2)))
    first, second = effects.weights[:, 0].astype(float), effects.weights[:, 1]
    assert_uniform(np.sqrt(0.5 / np.log(first / second)), 0.597, 2.005)  # w0 / w1 = exp(1 / (2 sigma²))
    beyond = np.arange(13) > effects.steps["radius"][:, None]
    assert not effects.weights[beyond].any()
    assert (np.take_along_axis(effects.weights, effects.steps["radius"][:, None], 1) > 0).all()


def test_erased_boxes_have_the_distribution_of_random_erasing() -> None:
    settings, rng = EffectSettings(erase=1), np.random.default_rng(0)
    box = draw(settings, 64).box.astype(float)
    other = np.array([erasing_box(rng, 64, settings.erase_scale, settings.erase_ratio) for _ in range(IMAGES)], float)
    for one in (box, other):
        assert (one[:, 2:] > 0).all() and (one >= 0).all() and (one[:, :2] + one[:, 2:] <= 64).all()
    for measure in (
        lambda b: b[:, 2] * b[:, 3] / 64**2,
        lambda b: np.log(b[:, 2] / b[:, 3]),
        lambda b: b[:, 0] / (65 - b[:, 2]),
        lambda b: b[:, 1] / (65 - b[:, 3]),
    ):
        deciles = np.quantile(measure(other), np.linspace(0, 1, 11))
        first, second = (np.histogram(measure(one), np.unique([-99, *deciles[1:-1], 99]))[0] for one in (box, other))
        assert ((first - second) ** 2 / (first + second)).sum() < 30  # chi-square, 9 or fewer degrees of freedom


def test_a_box_that_never_fits_is_left_out() -> None:
    assert not draw(EffectSettings(erase=1, erase_scale=(1, 1))).box.any()


def test_the_parameters_are_a_pure_function_of_seed_epoch_and_step_with_fixed_bits() -> None:
    """The digest changes if NumPy or the code draws other numbers: the stream then needs a new STREAM_VERSION."""
    numbers = draw_effects(7, 1, 2, 64)
    assert numbers.shape == (64, 32) and np.array_equal(numbers, draw_effects(7, 1, 2, 64))
    others = [draw_effects(*position, 64) for position in ((8, 1, 2), (7, 2, 2), (7, 1, 3))]
    assert not any((numbers == other).any() for other in others)
    effects = effect_parameters(numbers, SIMCLR, 224)
    content = b"".join(np.ascontiguousarray(values).tobytes() for values in effects)
    assert hashlib.sha256(content).hexdigest()[:16] == "733e3818dbcf1a51"


def test_the_preset_simclr_has_the_effects_of_the_published_code() -> None:
    """The code is google-research/simclr, tf2/data_util.py: random_color_jitter (strength 1), random_blur, no mean."""
    preset = Augmentation.preset("simclr")
    assert (preset.jitter, preset.jitter_share, preset.grey) == ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2)
    assert (preset.blur, preset.blur_sigma, preset.erase) == (0.5, (0.1, 2.0), 0.0)
    assert (preset.window, preset.scale, preset.ratio, preset.flip) == ("resized", (0.08, 1.0), (3 / 4, 4 / 3), 0.5)
    assert (preset.mean, preset.colour, preset.divisor, preset.std) == ("none", "off", 255.0, None)


def test_one_effect_does_not_change_the_numbers_of_another() -> None:
    both, one = draw(SIMCLR), draw(EffectSettings(grey=0.2, erase=0.25))
    assert np.array_equal(both.steps["grey"], one.steps["grey"]) and np.array_equal(both.box, one.box)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("jitter", value) for value in [(0.4, 0.4, 0.4), (-0.1, 0, 0, 0), (0, 0, 11.0, 0), (0, 0, 0, 0.6)]),
        *((name, value) for name in ("jitter_share", "grey", "blur", "erase") for value in (-0.1, 1.1)),
        *(("blur_sigma", value) for value in [(0, 1), (2, 1), (1, 101), (1,)]),
        *(("erase_scale", value) for value in [(-0.1, 1), (0.5, 0.4), (0, 1.1)]),
        *(("erase_ratio", value) for value in [(0, 1), (2, 1), (1, float("nan"))]),
    ],
)
def test_a_wrong_value_is_named_with_what_is_expected(field: str, value: object) -> None:
    with pytest.raises(WrongArgument) as error:
        EffectSettings(**{field: value}).check_effects()  # type: ignore[arg-type]
    assert str(error.value).startswith(f"{field} {value}: expected ") and "\n" not in str(error.value)

"""The values of the recipes are compared with the paper, the released code and Caffe's files."""

from __future__ import annotations

import pytest

from train.config.recipe import Plateau, Polynomial, recipe_fields
from train.config.recipes import CAFFE, LARGE, PAPER, RECIPES, RELEASED, recipe_note


def test_every_field_of_every_recipe_has_a_source() -> None:
    for recipe in RECIPES.values():
        assert set(recipe.sources) == set(recipe_fields()), recipe.name
        assert all(recipe.sources.values()), recipe.name


def test_the_recipe_paper_has_the_values_of_the_paper() -> None:
    assert (PAPER.batch_size, PAPER.lr, PAPER.momentum) == (128, 0.01, 0.9)
    assert (PAPER.weight_decay, PAPER.dropout) == (0.0005, 0.5)
    assert (PAPER.lrn.k, PAPER.lrn.size, PAPER.lrn.alpha, PAPER.lrn.beta) == (2, 5, 1e-4, 0.75)
    assert set(PAPER.init_std.values()) == {0.01} and not PAPER.norm_before_relu and PAPER.within_map is None
    assert isinstance(PAPER.schedule, Plateau) and (PAPER.schedule.factor, PAPER.schedule.drops) == (0.1, 3)
    assert RELEASED.lrn.alpha == pytest.approx(2e-5) and RELEASED.augmentation.divisor == 1.1
    assert set(RECIPES) == {"paper", "released", "caffe", "modern", "short", "large"}


def test_the_recipe_caffe_has_the_values_of_bvlc_alexnet() -> None:
    """The expected values are from train_val.prototxt and solver.prototxt of models/bvlc_alexnet."""
    assert (CAFFE.batch_size, CAFFE.momentum, CAFFE.weight_decay, CAFFE.dropout) == (256, 0.9, 0.0005, 0.5)
    assert {layer for layer, std in CAFFE.init_std.items() if std == 0.005} == {"fc6", "fc7"}
    assert CAFFE.init_bias == {**dict.fromkeys(PAPER.init_bias, 0.1)}
    assert (CAFFE.lrn.k, CAFFE.lrn.alpha) == (1, pytest.approx(2e-5)) and CAFFE.augmentation.colour == "off"
    assert CAFFE.dropout_scales_training and not CAFFE.decay_biases and CAFFE.augmentation.mean == "aligned"


def test_the_recipe_large_has_the_published_settings_of_alexnet_with_lars() -> None:
    """The expected values are from arXiv 1708.03888 and from the authors' solver files."""
    assert (LARGE.batch_size, LARGE.lr, LARGE.lars_trust, LARGE.epochs) == (8192, 10, 0.001, 100)
    assert (LARGE.momentum, LARGE.weight_decay, LARGE.decay_biases, LARGE.lr_bias_factor) == (0.9, 0.0005, True, 1)
    assert LARGE.schedule == Polynomial(warmup_epochs=5, start=0.1, power=2, end=1e-6)
    assert LARGE.lrn == CAFFE.lrn and LARGE.init_std == CAFFE.init_std and LARGE.init_bias == CAFFE.init_bias
    assert [LARGE.lr * LARGE.rate_factor(batch) for batch in (1024, 2048, 4096, 8192)] == [1.25, 2.5, 5, 10]
    assert {name for name in RECIPES if RECIPES[name].lars_trust is not None} == {"large"}
    assert "unproven on ImageNet" in str(recipe_note("large, lr=5")) and recipe_note("released") is None

"""Tests of the recipes' values against the paper, the released code and Caffe's files."""

from __future__ import annotations

import pytest

from train.config.recipe import Plateau, recipe_fields
from train.config.recipes import CAFFE, PAPER, RECIPES, RELEASED


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
    assert set(RECIPES) == {"paper", "released", "caffe", "modern", "short"}


def test_the_recipe_caffe_has_the_values_of_bvlc_alexnet() -> None:
    """The expected values are from train_val.prototxt and solver.prototxt of models/bvlc_alexnet."""
    assert (CAFFE.batch_size, CAFFE.momentum, CAFFE.weight_decay, CAFFE.dropout) == (256, 0.9, 0.0005, 0.5)
    assert {layer for layer, std in CAFFE.init_std.items() if std == 0.005} == {"fc6", "fc7"}
    assert CAFFE.init_bias == {**dict.fromkeys(PAPER.init_bias, 0.1)}
    assert (CAFFE.lrn.k, CAFFE.lrn.alpha) == (1, pytest.approx(2e-5)) and CAFFE.augmentation.colour == "off"
    assert CAFFE.dropout_scales_training and not CAFFE.decay_biases and CAFFE.augmentation.mean == "aligned"

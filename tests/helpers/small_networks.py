"""For tests of export and import: small networks, evaluation images, and a comparison of outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pipeline.augment import Augmentation
from pipeline.loader import eval_loader
from train.config.architecture import ALEXNET, JOINED, TORCHVISION, Architecture, Widths
from train.config.recipe import Recipe
from train.config.recipes import MODERN
from train.model.alexnet import AlexNet

WIDTHS = Widths(8, 12, 12, 16, 8, 20, 24)
SMALL = {architecture.name: replace(architecture, widths=WIDTHS) for architecture in (ALEXNET, JOINED, TORCHVISION)}
MODERN_SCALED_AT_TEST_TIME = replace(MODERN, dropout_scales_training=False, dropout=0.3)

MakeRun = Callable[[Architecture, Recipe], tuple[Path, AlexNet]]


def eval_images(store: Path, mean: str) -> torch.Tensor:
    """Return the center crops of the split val minus the mean, float32 (12, 3, 224, 224)."""
    with eval_loader(store, 12, augmentation=Augmentation(mean=mean)) as loader:
        return next(iter(loader)).images


def are_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether `actual` differs from `expected` by less than `tolerance` times the largest |value| of `expected`.

    Asserts that the values of `expected` vary, because constant outputs would hide an error.
    """
    assert expected.std() > 0.01
    return actual.shape == expected.shape and bool((actual - expected).abs().max() < tolerance * expected.abs().max())

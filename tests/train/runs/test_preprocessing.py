"""Tests of the mean image in a run folder. If the store is missing, commands prepare images with this mean image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from train.config.recipes import SHORT
from train.runs.preprocessing import save_mean_image


def test_a_mean_image_of_another_store_is_replaced(tmp_path: Path) -> None:
    """If a run without a checkpoint is started again with another store, it gets the mean image of the new store."""
    recipe = replace(SHORT, augmentation=replace(SHORT.augmentation, mean="image"))
    for value in (1.0, 2.0):
        save_mean_image(tmp_path, SimpleNamespace(mean_image=lambda: np.full((3, 4, 4), value)), recipe)  # noqa: B023
        assert (np.load(tmp_path / "mean_image.npy") == value).all()

"""Preprocessing metadata saved in the run folder. With the metadata, inference does not need the training store.

run.json holds the store's settings, sizes and colour statistics under "store". The run folder also has a file
`mean_image.npy` if the recipe subtracts a mean image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.still_image import EvalTransform
from prep.console import UserError
from prep.files import write_atomic
from prep.schema import ArrayShape, read_npy
from prep.store.manifest import ColorStats, Settings, Store
from train.config.recipe import Recipe
from train.runs.run_dir import read_description

MEAN_IMAGE = "mean_image.npy"
_NEED_MEAN_IMAGE = ("image", "aligned")  # values of Augmentation.mean


def store_facts(store: Store) -> dict[str, Any]:
    """Return the "store" part of run.json. Raises StoreError if the colour statistics are missing."""
    return {
        "fingerprint": store.fingerprint,
        "settings": store.settings.to_json(),
        "tools": dict(store.tools),
        "splits": {
            name: {"records": split.records, "bytes": split.bytes, "label_counts": list(split.label_counts)}
            for name, split in store.splits.items()
        },
        "colour": asdict(store.color_stats()),
    }


def save_mean_image(run_dir: Path, store: Store, recipe: Recipe) -> None:
    """Write the mean image of the training split to mean_image.npy, if the recipe subtracts a mean image.

    A mean_image.npy with other content is replaced. Such a file comes from an earlier run in this folder, which used
    another store and ended before its first checkpoint.
    """
    if recipe.augmentation.mean not in _NEED_MEAN_IMAGE:
        return
    content, path = io.BytesIO(), run_dir / MEAN_IMAGE
    np.save(content, store.mean_image())
    if not path.is_file() or path.read_bytes() != content.getvalue():
        write_atomic(path, content.getvalue())


def saved_color_stats(description: Mapping[str, Any]) -> ColorStats:
    """Return the colour statistics of the training store, from the content of run.json."""
    return ColorStats(**description["store"]["colour"])


def load_eval_transform(run_dir: Path, recipe: Recipe) -> EvalTransform:
    """Return the preprocessing of single images for evaluation with a run's network.

    Raises UserError if run.json cannot be read, or if the recipe needs a mean image that cannot be read.
    """
    mean, description = recipe.augmentation.mean, read_description(run_dir)
    settings = Settings.from_json(description["store"]["settings"])
    mean_image = _load_mean_image(run_dir, settings.side_px) if mean in _NEED_MEAN_IMAGE else None
    mean_rgb, divisor = saved_color_stats(description).mean_rgb, recipe.augmentation.divisor_in_evaluation
    return EvalTransform(settings, mean, mean_rgb, mean_image, divisor)


def _load_mean_image(run_dir: Path, side_px: int) -> npt.NDArray[np.float32]:
    path, advice = run_dir / MEAN_IMAGE, "The recipe needs this mean image."
    try:
        mean_image: npt.NDArray[np.float32] = read_npy(path, ArrayShape(("<f4",), (side_px, side_px, 3)), advice)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    if not (mean_image.min() >= 0 and mean_image.max() <= 255):  # a comparison with NaN is False
        raise UserError(f"{path} has values from {mean_image.min()} to {mean_image.max()}, expected 0 to 255. {advice}")
    return mean_image

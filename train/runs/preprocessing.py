"""What a run keeps of its training store, so that photographs can be shown to its network where the store is not.

run.json has under "store" settings, sizes and colour statistics; `mean_image.npy` beside it is written where the recipe
subtracts a mean image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.still_image import EvalTransform
from prep.console import UserError, say
from prep.files import write_atomic
from prep.store.manifest import ColorStats, Settings, Store, StoreError
from train.config.recipe import Recipe
from train.runs.checkpoint import Checkpoint
from train.runs.run_dir import read_description

MEAN_IMAGE = "mean_image.npy"
_WITH_IMAGE = ("image", "aligned")  # readings of the mean that need one


def store_facts(store: Store) -> dict[str, Any]:
    """What run.json says of a store. Raises StoreError where its colour statistics are missing."""
    return {
        "fingerprint": store.fingerprint,
        "settings": asdict(store.settings),
        "tools": dict(store.tools),
        "splits": {
            name: {"records": split.records, "bytes": split.bytes, "label_counts": list(split.label_counts)}
            for name, split in store.splits.items()
        },
        "colour": asdict(store.color_stats()),
    }


def save_mean_image(run_dir: Path, store: Store, recipe: Recipe) -> None:
    """Write the training split's mean image into the run folder where the recipe subtracts it.

    One that is there may be another store's: of a run that ended before its first checkpoint, which binds nobody.
    """
    if recipe.augmentation.mean not in _WITH_IMAGE:
        return
    content, path = io.BytesIO(), run_dir / MEAN_IMAGE
    np.save(content, store.mean_image())
    if not path.exists() or path.read_bytes() != content.getvalue():
        write_atomic(path, content.getvalue())


def saved_color_stats(told: Mapping[str, Any]) -> ColorStats:
    """The colour statistics of the training store, from a run.json."""
    return ColorStats(**told["store"]["colour"])


def load_eval_transform(run_dir: Path, recipe: Recipe) -> EvalTransform:
    """How this run's network was shown pictures; raises UserError where the run folder does not tell."""
    mean, told = recipe.augmentation.mean, read_description(run_dir)
    image = _kept_image(run_dir) if mean in _WITH_IMAGE else None
    return EvalTransform(Settings(**told["store"]["settings"]), mean, saved_color_stats(told).mean_rgb, image)


def _kept_image(run_dir: Path) -> Any:
    try:
        return np.load(run_dir / MEAN_IMAGE, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir / MEAN_IMAGE}: cannot be read ({error}), and the recipe subtracts it.") from None


def find_store(run_dir: Path, state: Checkpoint, store: Path | None) -> Store | None:
    """The store to look at: the one that is named, else the one that the run was trained on where it still is.

    Raises StoreError where the one that is named is none, UserError where its classes are others than the run's. Says
    so where it is another store than the training store.
    """
    fingerprint = state.identity["store_fingerprint"]
    if store is None:
        try:
            found = Store.open(read_description(run_dir)["settings"]["store"])
            return found if found.split("train").fingerprint == fingerprint else None
        except StoreError:
            return None
    named = Store.open(store)
    check_classes(run_dir, state.classes, named)
    if "train" not in named.splits or named.split("train").fingerprint != fingerprint:
        say(f"{store} is not the store that {run_dir} was trained on.")
    return named


def check_classes(run_dir: Path, classes: Sequence[str], store: Store) -> None:
    """Raise UserError where a store has other classes than the run was trained for."""
    if list(classes) != list(store.classes):
        raise UserError(
            f"{run_dir} knows {len(classes):,} classes ({classes[0]} …), {store.root} has {len(store.classes):,} "
            f"({store.classes[0]} …), not the same. Point --store at the one it was trained on."
        )

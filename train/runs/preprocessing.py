"""Preprocessing metadata saved in the run folder, and the check that a store has the classes of a run.

With the metadata, inference does not need the training store.

run.json holds the store's settings, sizes and colour statistics under "store". The run folder also has a file
`mean_image.npy` if the recipe subtracts a mean image.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.still_image import EvalTransform
from prep.console import UserError, path_of, say
from prep.files import write_atomic
from prep.schema import ArrayShape, read_npy
from prep.store.manifest import ColorStats, Settings, Store, StoreError
from train.config.recipe import Recipe
from train.runs.checkpoint import Checkpoint
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


def training_store(run_dir: Path, description: Mapping[str, Any]) -> Store | None:
    """Return the training store of a run, found by the paths in run.json. Three paths are tried in this order:

    1. the path as given to --store, relative to the working directory;
    2. the absolute path at the time when the run was created;
    3. DIR/STORE, if `run_dir` is now DIR/RUN, where STORE and RUN are the relative paths as given to --store and
       --run-dir. This path finds a store that was moved together with its runs.

    Returns None if no store at these paths has a training split with the fingerprint in run.json.
    """
    settings = description["settings"]
    given, saved_dir, folder = path_of(settings["store"]), path_of(settings["run_dir"]), run_dir.resolve()
    paths = [given, *(path_of(path) for path in [settings.get("store_absolute")] if path is not None)]
    depth = len(saved_dir.parts)
    if not saved_dir.is_absolute() and folder.parts[-depth:] == saved_dir.parts:
        paths.append(Path(*folder.parts[:-depth]) / given)
    for path in paths:
        try:
            store = Store.open(path)
            if store.split("train").fingerprint == description["identity"].get("store_fingerprint"):
                return store
        except StoreError:
            continue
    return None


def saved_store_path(description: Mapping[str, Any]) -> Path:
    """Return the absolute path of the training store, from run.json.

    run.json of version 0.1.0 contains only the path as given to --store. This path is then returned.
    """
    settings = description["settings"]
    return path_of(settings.get("store_absolute") or settings["store"])


def missing_store_text(run_dir: Path, store: Path) -> str:
    """Return the text of the error for a missing training store: its last known path, and what to do."""
    return f"{run_dir}: its training store {store} was moved, removed or rebuilt. Name a store with --store."


def find_store(run_dir: Path, state: Checkpoint, store: Path | None) -> Store | None:
    """Return the store that provides images for a run's network.

    store  folder of a store; None: the training store, found by the paths in run.json (`training_store`)

    Returns None if `store` is None and the training store is missing or has changed.

    Prints a message if `store` is not the training store. Raises StoreError if `store` is not a store. Raises UserError
    if the classes of `store` differ from the classes of the run.
    """
    fingerprint = state.identity["store_fingerprint"]
    if store is None:
        found = training_store(run_dir, read_description(run_dir))
        return found if found is not None and found.split("train").fingerprint == fingerprint else None
    opened = Store.open(store)
    check_classes(run_dir, state.classes, opened)
    if "train" not in opened.splits or opened.split("train").fingerprint != fingerprint:
        say(f"{store} is not the store that {run_dir} was trained on.")
    return opened


def check_classes(run_dir: Path, classes: Sequence[str], store: Store) -> None:
    """Raise UserError if the classes of a store differ from `classes`, the classes of a run."""
    if list(classes) != list(store.classes):
        raise UserError(
            f"{store.root} has {len(store.classes):,} classes ({store.classes[0]} …), not the same as the "
            f"{len(classes):,} classes ({classes[0]} …) of {run_dir}. Name the training store with --store."
        )

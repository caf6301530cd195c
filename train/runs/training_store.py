"""Finds the training store of a run, also after the store was moved, and checks that a store has the classes of a run.

The paths and the fingerprint of the training store are in run.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prep.console import UserError, path_of, say
from prep.store.manifest import Store, StoreError
from train.runs.checkpoint import Checkpoint
from train.runs.run_dir import read_description


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

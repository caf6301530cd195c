"""The nearest training pictures in the space of fc7 (the paper's figure 4, right), over an index that is built once.

`index-fc7-00000232.npz` in the run folder: fc7 of the training split's centre views by the checkpoint of step 232, with
keys and labels. An index of another checkpoint, store, size or precision is built anew, and the old one removed.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.records import Records
from prep.console import disk_error
from prep.files import atomic_file
from prep.store.manifest import Store
from train.config.choices import INDEX_RECORDS
from train.evaluation.features import split_activations
from train.model.alexnet import AlexNet
from train.runs.checkpoint import Checkpoint

LAYER = "fc7"


class Index(NamedTuple):
    """Features of the first N records of a split."""

    features: npt.NDArray[np.float32]  # (N, units)
    labels: npt.NDArray[np.int64]  # (N,)
    keys: npt.NDArray[np.bytes_]  # (N,), of 8 digits


class Neighbor(NamedTuple):
    """One training picture that is near."""

    number: int  # of the record
    key: str
    label: int
    distance: float  # Euclidean, in the units of fc7


def index_of(
    run_dir: Path,
    model: AlexNet,
    state: Checkpoint,
    store: Store,
    most: int = INDEX_RECORDS,
    precision: str = "fp32",
) -> Index:
    """The index of a run's checkpoint, read where it is there, else built and stored; raises as the loaders."""
    path = run_dir / f"index-{LAYER}-{state.step:08d}.npz"
    records = min(most, store.split("train").records)
    about = f"{state.digest} {store.split('train').fingerprint} {records} {precision}"
    index = _read(path, about)
    if index is None:
        features, filled = np.empty((records, 0), np.float32), 0
        for part in split_activations(model, store, "train", LAYER, records, precision):
            if not filled:
                features = np.empty((records, part.shape[1]), np.float32)  # once: there may be many gigabytes
            features[filled : filled + len(part)] = part
            filled += len(part)
        held = Records(store, "train")
        labels = np.array([held[k].label for k in range(records)], np.int64)
        index = Index(features, labels, np.array([held.key(k) for k in range(records)], "S8"))
        held.close()
        try:
            for old in run_dir.glob(f"index-{LAYER}-*.npz"):
                old.unlink()
            with atomic_file(path) as file:
                np.savez(file, about=np.array(about), **index._asdict())
        except OSError as error:
            raise disk_error(error, f"{path}: {error.strerror or error}.") from None
    return index


def _read(path: Path, about: str) -> Index | None:
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
            if str(held["about"]) != about:
                return None
            return Index(held["features"], held["labels"], held["keys"])
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None  # missing, or torn: it is built anew


def nearest(index: Index, queries: npt.NDArray[np.float32], count: int = 6) -> list[list[Neighbor]]:
    """For each query (Q, units) the `count` nearest pictures by Euclidean distance, the nearest first (section 6.1)."""
    from sklearn.neighbors import NearestNeighbors

    count = min(count, len(index.labels))
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(index.features)
    distances, places = search.kneighbors(queries)
    return [
        [
            Neighbor(int(place), index.keys[place].decode(), int(index.labels[place]), float(distance))
            for place, distance in zip(places[query], distances[query], strict=True)
        ]
        for query in range(len(queries))
    ]

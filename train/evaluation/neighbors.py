"""Nearest neighbors of an image: the training images with the nearest fc7 activations (figure 4, right).

An index holds keys, labels and fc7 activations (of the centre crops) of training images. The index for the checkpoint
of step 232 is saved as `index-fc7-00000232.npz` in the run folder. A saved index is reused if it was built from the
same checkpoint and training split, with the same number of records and the same precision. Otherwise, a new index
replaces the saved index.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.records import Records
from prep.console import UserError, disk_error
from prep.files import atomic_file
from prep.schema import ArrayShape, read_npz
from prep.store.manifest import Store
from train.config.choices import INDEX_RECORDS
from train.evaluation.features import iter_split_activations
from train.model.alexnet import AlexNet
from train.runs.checkpoint import Checkpoint

LAYER = "fc7"


class NeighborIndex(NamedTuple):
    """The index: fc7 activations, labels and keys of the first N records of the training split."""

    features: npt.NDArray[np.float32]  # (N, units)
    labels: npt.NDArray[np.int64]  # (N,)
    keys: npt.NDArray[np.bytes_]  # (N,), each key has 8 digits


class Neighbor(NamedTuple):
    """A record of the training split, and the distance between this record and the query image."""

    record: int  # index of the record in the training split
    key: str
    label: int
    distance: float  # Euclidean distance between fc7 activations


def load_or_build_index(
    run_dir: Path,
    network: AlexNet,
    checkpoint: Checkpoint,
    store: Store,
    max_records: int = INDEX_RECORDS,
    precision: str = "fp32",
) -> NeighborIndex:
    """Return the index of a checkpoint, with at most `max_records` records.

    The index comes from the run folder, or is newly built. Raises the errors of eval_loader. Also raises UserError if
    the index cannot be written.
    """
    path = run_dir / f"index-{LAYER}-{checkpoint.step:08d}.npz"
    records = min(max_records, store.split("train").records)
    about = f"{checkpoint.digest} {store.split('train').fingerprint} {records} {precision}"
    units = network.architecture.widths.fc7
    index = _read_index(path, about, (records, units), len(checkpoint.classes))
    if index is None:
        features, filled = np.empty((records, 0), np.float32), 0
        for batch in iter_split_activations(network, store, "train", LAYER, records, precision):
            if not filled:
                # This array is allocated only once, to save memory.
                features = np.empty((records, batch.shape[1]), np.float32)
            features[filled : filled + len(batch)] = batch
            filled += len(batch)
        stored = Records(store, "train")
        labels = np.array([stored.label(k) for k in range(records)], np.int64)
        index = NeighborIndex(features, labels, np.array([stored.key(k) for k in range(records)], "S8"))
        stored.close()
        try:
            for old in run_dir.glob(f"index-{LAYER}-*.npz"):
                old.unlink()
            with atomic_file(path) as file:
                np.savez(file, about=np.array(about), **index._asdict())
        except OSError as error:
            raise disk_error(error, f"{path}: {error.strerror or error}.") from None
    return index


def _read_index(path: Path, about: str, shape: tuple[int, int], classes: int) -> NeighborIndex | None:
    """Return the saved index of `shape` (records, units).

    Returns None if the file is missing or damaged, if the text `about` in the file is not the parameter `about`, or if
    an array has a wrong shape or invalid values.
    """
    records, units = shape
    formats = {
        "about": ArrayShape(("U",), ()),
        "features": ArrayShape(("<f4",), (records, units)),
        "labels": ArrayShape(("<i8",), (records,)),
        "keys": ArrayShape(("|S8",), (records,)),
    }
    try:
        arrays = read_npz(path, formats, path.stat().st_size, "The index is built again.")
    except (UserError, OSError):
        return None
    index = NeighborIndex(arrays["features"], arrays["labels"], arrays["keys"])
    is_valid = (
        str(arrays["about"]) == about
        and bool(np.isfinite(index.features).all())
        and bool(((index.labels >= 0) & (index.labels < classes)).all())
        and all(key.isdigit() for key in index.keys.tolist())
    )
    return index if is_valid else None


def nearest_neighbors(index: NeighborIndex, queries: npt.NDArray[np.float32], count: int = 6) -> list[list[Neighbor]]:
    """Return the `count` records at the smallest Euclidean distance from each query, nearest first (section 6.1).

    queries  fc7 activations (Q, units) of the query images
    """
    from sklearn.neighbors import NearestNeighbors

    count = min(count, len(index.labels))
    search = NearestNeighbors(n_neighbors=count, algorithm="brute").fit(index.features)
    distances, records = search.kneighbors(queries)  # both arrays have the shape (Q, count)
    return [
        [
            Neighbor(int(record), index.keys[record].decode(), int(index.labels[record]), float(distance))
            for record, distance in zip(records[query], distances[query], strict=True)
        ]
        for query in range(len(queries))
    ]

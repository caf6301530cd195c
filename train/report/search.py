"""Image search: the training images whose fc7 activations are nearest to the activations of given photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.still_image import StoredImages
from train.evaluation.neighbors import LAYER, load_or_build_index, nearest_neighbors
from train.evaluation.predict import image_features, load_photograph
from train.evaluation.trained_run import TrainedRun
from train.report.plots_images import ImageAndNeighbors


class SearchResult(NamedTuple):
    """The neighbors of a photograph."""

    row: ImageAndNeighbors  # what to draw in the photograph's row of the sheet
    nearest: list[dict[str, Any]]  # key, class, source and distance of each neighbor, for `alextrain search --json`


def search(trained: TrainedRun, images: Sequence[Path], count: int, index_records: int) -> list[SearchResult]:
    """Find the `count` training images nearest to each photograph, among at most `index_records` images.

    Raises UserError if there is no store or if a file is not an image, and StoreError if a record is damaged.
    """
    store = trained.require_store("train")
    squares = [load_photograph(path, trained.transform) for path in images]
    features = np.stack(
        [image_features(trained.network, trained.transform, square, LAYER, trained.precision) for square in squares]
    )
    index = load_or_build_index(
        trained.run_dir, trained.network, trained.checkpoint, store, index_records, trained.precision
    )
    results = []
    with StoredImages(store, "train") as training_images:
        for path, square, neighbors in zip(images, squares, nearest_neighbors(index, features, count), strict=True):
            shown = [(training_images[n.record], n.label, n.distance) for n in neighbors]
            nearest = [
                {
                    "key": n.key,
                    "class": trained.classes[n.label],
                    "source": training_images.records.source(n.record),
                    "distance": n.distance,
                }
                for n in neighbors
            ]
            results.append(SearchResult(ImageAndNeighbors(square, path.name, None, shown), nearest))
    return results

"""Image search: the training images whose fc7 activations are nearest to the activations of given photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.still_image import Pixels, StoredImages
from prep.console import UserError
from prep.images.limits import MAX_PIXELS
from train.evaluation.neighbors import LAYER, load_or_build_index, nearest_neighbors
from train.evaluation.predict import image_features, load_photographs
from train.evaluation.trained_run import TrainedRun
from train.report.plots_images import ImageAndNeighbors


class SearchResult(NamedTuple):
    """The neighbors of a photograph."""

    row: ImageAndNeighbors  # what to draw in the row of the photograph
    nearest: list[dict[str, Any]]  # key, class, source and distance of each neighbor, for `alextrain search --json`


def search(
    trained: TrainedRun, images: Sequence[Path], count: int, index_records: int, max_pixels: int = MAX_PIXELS
) -> tuple[dict[Path, SearchResult], dict[Path, UserError]]:
    """Find the `count` nearest training images of each photograph, among at most `index_records` training images.

    Returns a dict of the results, and a dict of the errors of files that cannot be used. Raises UserError if there is
    no store, and StoreError if a record is damaged.
    """
    store = trained.require_store("train")
    squares: dict[Path, Pixels] = {}
    errors: dict[Path, UserError] = {}
    for path, square in load_photographs(images, trained.transform, max_pixels):
        if isinstance(square, UserError):
            errors[path] = square
        else:
            squares[path] = square
    if not squares:
        return {}, errors
    network, transform = trained.network, trained.transform
    features = np.stack(
        [image_features(network, transform, square, LAYER, trained.precision) for square in squares.values()]
    )
    index = load_or_build_index(
        trained.run_dir, trained.network, trained.checkpoint, store, index_records, trained.precision
    )
    results = {}
    with StoredImages(store, "train") as training_images:
        all_neighbors = nearest_neighbors(index, features, count)
        for (path, square), neighbors in zip(squares.items(), all_neighbors, strict=True):
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
            results[path] = SearchResult(ImageAndNeighbors(square, path.name, None, shown), nearest)
    return results, errors

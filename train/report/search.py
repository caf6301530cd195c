"""The training pictures nearest to photographs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.still_image import StoredImages
from train.evaluation.neighbors import LAYER, load_or_build_index, nearest_neighbors
from train.evaluation.predict import image_features, load_photograph
from train.report.gallery import Trained
from train.report.plots_images import Row


def search(trained: Trained, images: Sequence[Path], count: int, most: int) -> list[tuple[Row, list[dict[str, Any]]]]:
    """Of each photograph the `count` nearest of at most `most` training pictures: to be drawn, and for programs.

    Raises UserError where there is no store, or a file is no picture; StoreError for a damaged record.
    """
    store = trained.looked_at("train")
    squares = [load_photograph(path, trained.eye) for path in images]
    units = [image_features(trained.model, trained.eye, square, LAYER, trained.precision) for square in squares]
    index = load_or_build_index(trained.run_dir, trained.model, trained.state, store, most, trained.precision)
    found = []
    with StoredImages(store, "train") as training:
        for path, square, near in zip(images, squares, nearest_neighbors(index, np.stack(units), count), strict=True):
            row = Row(square, path.name, None, [(training[n.record], n.label, n.distance) for n in near])
            told = [
                {
                    "key": n.key,
                    "class": trained.classes[n.label],
                    "source": training.records.source(n.record),
                    "distance": n.distance,
                }
                for n in near
            ]
            found.append((row, told))
    return found

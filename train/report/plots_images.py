"""Figures with images: top-5 predictions and nearest neighbors (the paper's figure 4), and feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.still_image import Pixels
from prep.console import escaped
from train.evaluation.predict import TopPredictions
from train.report.style import BLUE, ORANGE, scale_to_unit_range, shorten, show_image, tile_images

IMAGES_PER_ROW = 4  # number of images in a row of draw_predictions
FEATURE_MAPS_INCHES = (8.0, 5.0)
FEATURE_MAPS = 8  # number of maps that are drawn for each column and layer

_CLASS_CHARS = 26  # largest number of characters in the title of an image in draw_predictions
_GUESS_CHARS = 20  # largest number of characters of a class name beside its probability in draw_predictions
_QUERY_CHARS = 18  # largest number of characters in the title of the left image in draw_neighbors
_NEIGHBOR_CHARS = 12  # largest number of characters in the class name of a neighbor in draw_neighbors


class ImageAndPredictions(NamedTuple):
    """A test image and its most probable classes."""

    square: Pixels
    label: int
    predictions: TopPredictions


class ImageAndNeighbors(NamedTuple):
    """An image and the training images that are nearest to it, as a row of draw_neighbors."""

    square: Pixels
    title: str
    label: int | None  # label of the image; None if the class is unknown
    neighbors: Sequence[tuple[Pixels, int, float]]  # image, label and distance of each neighbor


def predictions_inches(images: int) -> tuple[float, float]:
    """Return the width and height of the figure that `draw_predictions` draws for this number of images."""
    return 8.0, 3.3 * -(-images // IMAGES_PER_ROW)


def draw_predictions(figure: Any, images: Sequence[ImageAndPredictions], names: Sequence[str]) -> None:
    """Draw images with bars for their most probable classes, the correct class in orange (figure 4, left).

    The probabilities are at the right of the bars.
    """
    rows = -(-len(images) // IMAGES_PER_ROW)
    grid = figure.subplots(2 * rows, IMAGES_PER_ROW, squeeze=False, height_ratios=[3, 1.7] * rows)
    for axes in grid.flat:
        axes.axis("off")
    for k, (square, label, predictions) in enumerate(images):
        row, column = divmod(k, IMAGES_PER_ROW)
        image, bars = grid[2 * row, column], grid[2 * row + 1, column]
        image.axis("on")
        show_image(image, square, shorten(names[label], _CLASS_CHARS))
        for rank, (predicted, p) in enumerate(zip(predictions.labels, predictions.probabilities, strict=True)):
            bars.barh(rank, p, color=ORANGE if predicted == label else BLUE, height=0.78, alpha=0.55)
            bars.text(0.02, rank, shorten(names[predicted], _GUESS_CHARS), va="center", fontsize=8, clip_on=True)
            bars.text(0.99, rank, f"{p:.1%}", va="center", ha="right", fontsize=8)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6))


def neighbors_inches(rows: int, neighbors: int) -> tuple[float, float]:
    """Return width and height of a figure of `draw_neighbors`, for `rows` images with `neighbors` neighbors."""
    side = 8.0 / (neighbors + 1.15)
    return 8.0, rows * (side + 0.24)


def draw_neighbors(figure: Any, rows: Sequence[ImageAndNeighbors], names: Sequence[str]) -> None:
    """Draw a row for each image: the image at the left, then its nearest training images (figure 4, right).

    The class name of a neighbor is orange if the neighbor has the same class as the image.
    """
    count = max(len(row.neighbors) for row in rows)
    grid = figure.subplots(len(rows), count + 2, squeeze=False, width_ratios=[1, 0.15, *[1] * count])
    for axes in grid.flat:
        axes.axis("off")
    for row, cells in zip(rows, grid, strict=True):
        title = escaped(row.title)
        show_image(cells[0], row.square, title if len(title) <= _QUERY_CHARS else "…" + title[1 - _QUERY_CHARS :])
        cells[0].title.set_fontsize(6.5)
        for axes, (square, label, distance) in zip(cells[2:], row.neighbors, strict=False):
            name = f"{shorten(names[label], _NEIGHBOR_CHARS)}  {distance:.3g}"
            show_image(axes, square, name, ORANGE if label == row.label else "0.4")
            axes.title.set_fontsize(6.5)


def draw_feature_maps(figure: Any, square: Pixels, maps: dict[str, list[npt.NDArray[np.float32]]]) -> None:
    """For one image, draw the feature maps with the highest activations in each convolutional layer and column.

    For each layer, `maps` has a list with one array (maps, height, width) per column of the network. Each map is scaled
    by its own minimum and maximum. The map with the highest activation comes first.
    """
    network_columns = max(len(parts) for parts in maps.values())
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.4, 3.6))
    show_image(top.subplots(), square)
    grid = bottom.subplots(len(maps), network_columns, squeeze=False)
    for cells, (layer, parts) in zip(grid, maps.items(), strict=True):
        for column, (axes, part) in enumerate(zip(cells, parts, strict=True)):
            strongest = np.argsort(-part.max((1, 2)), kind="stable")[:FEATURE_MAPS]
            scale = -(-110 // part.shape[1])
            show_image(axes, tile_images(scale_to_unit_range(part[strongest]), FEATURE_MAPS, scale, gap_px=6))
            if column == 0:
                axes.set_ylabel(f"{layer}\n{part.shape[1]}×{part.shape[2]}", fontsize=8.5)
            if layer == next(iter(maps)) and network_columns > 1:
                axes.set_title(f"column {column}")

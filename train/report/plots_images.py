"""Pictures with photographs in them: both halves of the paper's figure 4, a search's sheet, and feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.still_image import Pixels
from prep.console import one_line
from train.evaluation.predict import TopPredictions
from train.report.style import BLUE, ORANGE, shortened, show, stretched, tiled

ACROSS = 4  # pictures in a row of the left half
# Characters that fit
_GUESS = 26  # above a picture of the left half, and on a bar
_TITLE = 22  # above a picture of the right half
_NEAR = 12  # there, with the distance


class Guess(NamedTuple):
    """A test picture and what the network says of it."""

    square: Pixels
    label: int
    prediction: TopPredictions


class Row(NamedTuple):
    """A picture, and those that are nearest to it."""

    square: Pixels
    title: str
    label: int | None  # None where it is not known
    neighbors: Sequence[tuple[Pixels, int, float]]  # picture, label, distance


def guesses_size(count: int) -> tuple[float, float]:
    """Inches, of so many pictures."""
    return 8.0, 3.3 * -(-count // ACROSS)


def guesses(figure: Any, shown: Sequence[Guess], names: Sequence[str]) -> None:
    """Pictures with their five best labels as bars, the right one in another colour (figure 4, left)."""
    rows = -(-len(shown) // ACROSS)
    grid = figure.subplots(2 * rows, ACROSS, squeeze=False, height_ratios=[3, 1.7] * rows)
    for axes in grid.flat:
        axes.axis("off")
    for k, (square, label, prediction) in enumerate(shown):
        row, column = divmod(k, ACROSS)
        picture, bars = grid[2 * row, column], grid[2 * row + 1, column]
        picture.axis("on")
        show(picture, square, shortened(names[label], _GUESS))
        for place, (guess, p) in enumerate(zip(prediction.labels, prediction.probabilities, strict=True)):
            bars.barh(place, p, color=ORANGE if guess == label else BLUE, height=0.78, alpha=0.55)
            bars.text(0.02, place, shortened(names[guess], _GUESS), va="center", fontsize=8, clip_on=True)
        bars.set(xlim=(0, 1), ylim=(4.6, -0.6))


def rows_size(rows: int, neighbors: int) -> tuple[float, float]:
    """Inches, of so many rows."""
    side = 8.0 / (neighbors + 1.15)
    return 8.0, rows * (side + 0.24)


def nearest_rows(figure: Any, rows: Sequence[Row], names: Sequence[str]) -> None:
    """A picture at the left, and the training pictures that are nearest to it (figure 4, right).

    Those of its class have their names in another colour.
    """
    count = max(len(row.neighbors) for row in rows)
    grid = figure.subplots(len(rows), count + 2, squeeze=False, width_ratios=[1, 0.15, *[1] * count])
    for axes in grid.flat:
        axes.axis("off")
    for row, cells in zip(rows, grid, strict=True):
        title = one_line(row.title)
        show(cells[0], row.square, title if len(title) <= _TITLE else "…" + title[1 - _TITLE :])
        cells[0].title.set_fontsize(6.5)
        for axes, (square, label, distance) in zip(cells[2:], row.neighbors, strict=False):
            name = f"{shortened(names[label], _NEAR)}  {distance:.3g}"
            show(axes, square, name, ORANGE if label == row.label else "0.4")
            axes.title.set_fontsize(6.5)


MAPS_SIZE = (8.0, 5.0)
MAPS = 8  # of each column and layer


def feature_maps(figure: Any, square: Pixels, columns: dict[str, list[npt.NDArray[np.float32]]]) -> None:
    """The strongest maps of each convolutional layer for one picture: `columns` has one (maps, rows, columns) each.

    A map is stretched to its own range; the strongest come first.
    """
    many = max(len(parts) for parts in columns.values())
    picture, maps = figure.subfigures(2, 1, height_ratios=(1.4, 3.6))
    show(picture.subplots(), square)
    grid = maps.subplots(len(columns), many, squeeze=False)
    for cells, (layer, parts) in zip(grid, columns.items(), strict=True):
        for place, (axes, part) in enumerate(zip(cells, parts, strict=True)):
            strongest = np.argsort(-part.max((1, 2)), kind="stable")[:MAPS]
            scale = -(-110 // part.shape[1])
            show(axes, tiled(stretched(part[strongest]), MAPS, scale, gap=6))
            if place == 0:
                axes.set_ylabel(f"{layer}\n{part.shape[1]}×{part.shape[2]}", fontsize=8.5)
            if layer == next(iter(columns)) and many > 1:
                axes.set_title(f"column {place}")

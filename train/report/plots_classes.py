"""Figures of classification errors: the top-1 error of each class, and the confusion matrix of the worst classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from train.report.style import BLUE, ORANGE, shorten

WORST = 10  # largest number of classes that are drawn as rows of the confusion matrix
_NAMED = 20  # largest number of classes in the bar chart of errors
_NAME_CHARS = 20

ERRORS_INCHES = (8.0, 3.4)
CONFUSION_INCHES = (8.0, 5.0)


class Confusion(NamedTuple):
    """A confusion matrix: numbers of images by class and predicted class."""

    counts: npt.NDArray[np.int64]  # (classes, classes): [class, predicted class]

    @property
    def images(self) -> npt.NDArray[np.int64]:
        """(classes,): number of images of each class."""
        return np.asarray(self.counts.sum(1))

    @property
    def errors(self) -> npt.NDArray[np.float64]:
        """(classes,): top-1 error of each class in 0..1; 0 for a class without images."""
        correct = np.diag(self.counts)
        return np.asarray((self.images - correct) / np.maximum(self.images, 1))

    def worst(self, count: int = WORST) -> list[int]:
        """Return the `count` classes with the highest errors, the highest error first.

        Classes without errors are left out.
        """
        order = np.argsort(-self.errors, kind="stable")[:count]
        return [int(k) for k in order if self.errors[k] > 0]


def confusion_matrix(probabilities: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Confusion:
    """Return the confusion matrix for labels (N,) and probabilities (N, classes).

    The predicted class of an image is its most probable class.
    """
    classes = probabilities.shape[1]
    cells = labels * classes + probabilities.argmax(1)
    return Confusion(np.bincount(cells, minlength=classes**2).reshape(classes, classes))


def draw_class_errors(figure: Any, confusion: Confusion, names: Sequence[str]) -> None:
    """Draw the top-1 error of each class, the worst class first.

    The 20 worst classes are drawn as bars. If there are more classes, a curve shows the errors of all classes. `names`
    are the names of the classes in the order of the labels.
    """
    errors, images = 100 * confusion.errors, confusion.images
    classes = [int(k) for k in np.argsort(-errors, kind="stable") if images[k]]
    named = classes[:_NAMED]
    overall = 100 * (1 - np.trace(confusion.counts) / max(images.sum(), 1))
    panels = figure.subplots(1, 2 if len(classes) > _NAMED else 1, squeeze=False).flat
    bars = panels[-1]
    if len(classes) > _NAMED:
        panels[0].fill_between(range(len(classes)), errors[classes], step="mid", color=BLUE, alpha=0.8, lw=0)
        panels[0].axhline(overall, color=ORANGE, lw=1)
        panels[0].set(xlabel=f"{len(classes):,} classes, the worst first", ylabel="top-1 error, %", ylim=(0, 100))
        panels[0].set_xlim(0, len(classes) - 1)
    bars.bar(range(len(named)), errors[named], color=BLUE, width=0.7)
    for x, k in enumerate(named):
        bars.text(x, errors[k], f"{images[k] - confusion.counts[k, k]}", ha="center", va="bottom", fontsize=8)
    bars.axhline(overall, color=ORANGE, lw=1, label=f"all: {overall:.1f} %")
    _set_class_ticks(bars.set_xticks, named, names, rotation=60, ha="right")
    bars.set(ylabel="top-1 error, %\nabove a bar: wrong predictions")
    bars.legend()


def _set_class_ticks(set_ticks: Any, classes: Sequence[int], names: Sequence[str], **text_options: Any) -> None:
    labels = [shorten(names[k], _NAME_CHARS) for k in classes]
    set_ticks(range(len(classes)), labels, fontsize=8, **text_options)


def draw_confusion_matrix(figure: Any, confusion: Confusion, names: Sequence[str]) -> None:
    """Draw the confusion matrix of the worst classes.

    Each row is one of the worst classes, and each column is a predicted class. The columns are the worst classes, and
    the classes that are most often wrongly predicted for images of the worst classes. A cell has the number of images
    of the row's class for which the column's class is predicted. The shade is the share of these images in the row's
    class. The scale of the shades is at the right.
    """
    from matplotlib.patches import Rectangle

    rows = confusion.worst()
    if not rows:
        figure.text(0.5, 0.5, "no errors", ha="center")
        return
    mistakes = confusion.counts.copy()
    np.fill_diagonal(mistakes, 0)
    order = np.argsort(-mistakes[rows].sum(0), kind="stable")
    predicted = [int(k) for k in order if mistakes[rows, k].any()]
    columns = sorted({*rows, *predicted[:WORST]})
    rows = sorted(rows)
    shares = 100 * confusion.counts[np.ix_(rows, columns)] / np.maximum(confusion.images[rows], 1)[:, None]
    axes = figure.subplots()
    shades = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    scale = figure.colorbar(shades, ax=axes, label="share of the images of the class, %", pad=0.02)
    scale.outline.set_visible(False)
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            count = confusion.counts[row, column]
            if count:
                color = "white" if shares[y, x] > 60 else "0.15"
                axes.text(x, y, f"{count}", ha="center", va="center", color=color, fontsize=8.5)
            if row == column:
                axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, ec=ORANGE, lw=1.3))
    _set_class_ticks(axes.set_xticks, columns, names, rotation=60, ha="right")
    _set_class_ticks(axes.set_yticks, rows, names)
    axes.set(xlabel="predicted class", ylabel="class")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)

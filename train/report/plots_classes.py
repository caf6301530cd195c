"""Pictures of where a network errs: errors per class, and what the worst classes are taken for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from train.report.style import BLUE, ORANGE, shortened

WORST = 10  # classes whose confusion is drawn
_NAMED = 20  # classes whose bars have names
_NAME = 20  # characters of a name


class Confusion(NamedTuple):
    """Which classes were taken for which."""

    counts: npt.NDArray[np.int64]  # (classes, classes): [is, was taken for]

    @property
    def images(self) -> npt.NDArray[np.int64]:
        """(classes,): images of each."""
        return np.asarray(self.counts.sum(1))

    @property
    def errors(self) -> npt.NDArray[np.float64]:
        """(classes,): the share of each class' images that was taken for another; 0 where it has none."""
        right = np.diag(self.counts)
        return np.asarray((self.images - right) / np.maximum(self.images, 1))

    def worst(self, most: int = WORST) -> list[int]:
        """The classes with the highest errors, the worst first; none that has no error."""
        order = np.argsort(-self.errors, kind="stable")[:most]
        return [int(k) for k in order if self.errors[k] > 0]


def confusion_of(probabilities: npt.NDArray[Any], labels: npt.NDArray[np.int64]) -> Confusion:
    """The confusion by the best guess, of probabilities (N, classes)."""
    classes = probabilities.shape[1]
    places = labels * classes + probabilities.argmax(1)
    return Confusion(np.bincount(places, minlength=classes**2).reshape(classes, classes))


ERRORS_SIZE = (8.0, 3.4)


def class_errors(figure: Any, confusion: Confusion, names: Sequence[str]) -> None:
    """Top-1 error of each class, the worst first; of many classes all as one curve, and the worst by name."""
    errors, images = 100 * confusion.errors, confusion.images
    there = [int(k) for k in np.argsort(-errors, kind="stable") if images[k]]
    named = there[:_NAMED]
    overall = 100 * (1 - np.trace(confusion.counts) / max(images.sum(), 1))
    panels = figure.subplots(1, 2 if len(there) > _NAMED else 1, squeeze=False).flat
    bars = panels[-1]
    if len(there) > _NAMED:
        panels[0].fill_between(range(len(there)), errors[there], step="mid", color=BLUE, alpha=0.8, lw=0)
        panels[0].axhline(overall, color=ORANGE, lw=1)
        panels[0].set(xlabel=f"{len(there):,} classes, the worst first", ylabel="top-1 error, %", ylim=(0, 100))
        panels[0].set_xlim(0, len(there) - 1)
    bars.bar(range(len(named)), errors[named], color=BLUE, width=0.7)
    for place, k in enumerate(named):
        bars.text(place, errors[k], f"{images[k] - confusion.counts[k, k]}", ha="center", va="bottom", fontsize=8)
    bars.axhline(overall, color=ORANGE, lw=1, label=f"all: {overall:.1f} %")
    _name(bars.set_xticks, named, names, rotation=60, ha="right")
    bars.set(ylabel="top-1 error, %\nabove: images missed")
    bars.legend()


def _name(set_ticks: Any, classes: Sequence[int], names: Sequence[str], **how: Any) -> None:
    set_ticks(range(len(classes)), [shortened(names[k], _NAME) for k in classes], fontsize=8, **how)


CONFUSION_SIZE = (8.0, 5.0)


def confusion_matrix(figure: Any, confusion: Confusion, names: Sequence[str]) -> None:
    """What the worst classes were taken for: a row for each, shaded by the share of its images."""
    from matplotlib.patches import Rectangle

    rows = confusion.worst()
    if not rows:
        figure.text(0.5, 0.5, "no errors", ha="center")
        return
    wrong = confusion.counts.copy()
    np.fill_diagonal(wrong, 0)
    mistaken = [int(k) for k in np.argsort(-wrong[rows].sum(0), kind="stable") if wrong[rows, k].any()]
    columns = sorted({*rows, *mistaken[:WORST]})
    rows = sorted(rows)
    shares = 100 * confusion.counts[np.ix_(rows, columns)] / np.maximum(confusion.images[rows], 1)[:, None]
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    for y, row in enumerate(rows):
        for x, column in enumerate(columns):
            count = confusion.counts[row, column]
            if count:
                colour = "white" if shares[y, x] > 60 else "0.15"
                axes.text(x, y, f"{count}", ha="center", va="center", color=colour, fontsize=8.5)
            if row == column:
                axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, ec=ORANGE, lw=1.3))
    _name(axes.set_xticks, columns, names, rotation=60, ha="right")
    _name(axes.set_yticks, rows, names)
    axes.set(xlabel="taken for", ylabel="is")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)

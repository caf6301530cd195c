"""Figures of a run that need no images: learning curve, kernels of conv1, principal color axes of the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch import Tensor

from prep.store.manifest import ColorStats
from train.report.style import BLUE, GRAY, ORANGE, plot_curve, scale_to_unit_range, show_image, tile_images
from train.runs.run_dir import shown_errors

_KERNELS_PER_ROW = 16
# If a learning rate is below _DROP_FACTOR times the rate of the previous training line, the change is marked as a drop.
# Between two training lines, a cosine schedule lowers the rate too little to be marked.
_DROP_FACTOR = 0.6
_STEPS = (-3, -2, -1, 0, 1, 2, 3)  # ticks of the color axes, in standard deviations

LEARNING_CURVE_INCHES = (8.0, 3.4)
COLOR_AXES_INCHES = (8.0, 2.6)


def draw_learning_curve(figure: Any, lines: Sequence[Mapping[str, Any]], classes: int = 1000) -> None:
    """Draw loss, top-1 error and top-5 error of training batches and of validation over the epochs.

    Vertical lines mark drops of the learning rate. `lines` are the lines of metrics.jsonl. With five `classes` or
    fewer, the top-5 error is always 0 and is left out.
    """
    metrics = dict(zip((key for _, key in shown_errors(classes)), ("-", ":"), strict=False))
    loss, error = figure.subplots(1, 2)
    lines_of = {kind: [line for line in lines if line["kind"] == kind] for kind in ("train", "val")}
    styles: dict[str, dict[str, Any]] = {"train": {"color": GRAY}, "val": {"color": BLUE, "marker": "o", "ms": 3.5}}
    labels = {"train": "training batches", "val": "validation, centre view"}
    for kind, style in styles.items():
        epochs = [line["epoch"] for line in lines_of[kind]]
        plot_curve(loss, epochs, [line["loss"] for line in lines_of[kind]], **style)
        for key, dashes in metrics.items():
            label = labels[kind] if key == "top1_error" else None
            style = {**style, "mfc": style["color"] if key == "top1_error" else "white"}
            plot_curve(error, epochs, [100 * line[key] for line in lines_of[kind]], ls=dashes, label=label, **style)
    drops = learning_rate_drops(lines_of["train"])
    error_name = "error, %: top-1; top-5 with hollow markers" if len(metrics) > 1 else "top-1 error, %"
    for axes, name in ((loss, "loss, nats"), (error, error_name)):
        for epoch, lr in drops:
            axes.axvline(epoch, color="0.85", lw=1, zorder=0)
            if axes is loss:
                transform = axes.get_xaxis_transform()
                axes.text(epoch, 0.99, f" lr {lr:g}", transform=transform, fontsize=8, color="0.45", va="top")
        axes.set(xlabel="epochs", ylabel=name)
        axes.set_ylim(bottom=0)
    error.legend()


def learning_rate_drops(lines: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Return (epoch, new rate) of each sudden drop of the learning rate.

    The epoch is the epoch of the last line before the drop.
    """
    pairs = pairwise((line["epoch"], line["lr"]) for line in lines)
    return [(epoch, lr) for (epoch, before), (_, lr) in pairs if lr < _DROP_FACTOR * before]


def kernels_inches(parameters: Mapping[str, Tensor], columns: int) -> tuple[float, float]:
    """Return the width and height of the figure that `draw_kernels` draws."""
    rows = -(-len(parameters["conv1.weight"]) // columns // _KERNELS_PER_ROW)
    return 8.0, columns * (0.5 * rows + 0.25)


def draw_kernels(figure: Any, parameters: Mapping[str, Tensor], columns: int) -> None:
    """Draw the 11×11×3 kernels of conv1 (figure 3), each scaled by its own minimum and maximum.

    Column 0 is drawn above column 1. `parameters` are the joined parameters (AlexNet.joined_tensors) by name.
    """
    images = scale_to_unit_range(parameters["conv1.weight"].permute(0, 2, 3, 1).numpy())  # shape (96, 11, 11, 3)
    kernels = len(images) // columns  # number of kernels in each column
    for column, axes in enumerate(figure.subplots(columns, 1, squeeze=False).flat):
        shown = images[column * kernels :][:kernels]
        show_image(axes, tile_images(shown, min(_KERNELS_PER_ROW, kernels), scale=6, gap_px=6))
        if columns > 1:
            axes.set_title(f"column {column}", loc="left")


def draw_color_axes(figure: Any, stats: ColorStats) -> None:
    """Draw the principal components of training pixels (section 4.1).

    Left: the mean color, moved along each component. Right: the standard deviation σ of each component.
    """
    strips, spectrum = figure.subplots(1, 2, width_ratios=(5.5, 2.5))
    steps = np.linspace(_STEPS[0], _STEPS[-1], 241)[:, None]
    sigma_v = np.array(stats.eigenvectors) * np.array(stats.stdevs)  # column j is eigenvector j times its σ
    moved = np.stack([np.array(stats.mean_rgb) + steps * sigma_v[:, k] for k in range(3)])  # (3, 241, 3)
    image = np.clip(np.rint(moved), 0, 255).astype(np.uint8)
    strips.imshow(image, aspect="auto", extent=(_STEPS[0], _STEPS[-1], 3, 0), interpolation="nearest")
    strips.hlines((1, 2), _STEPS[0], _STEPS[-1], color="white", lw=5)
    strips.set_xticks(_STEPS, [f"{k:+d} σ".replace("-", "−") if k else "mean" for k in _STEPS])
    strips.set_yticks((0.5, 1.5, 2.5), [f"PC {k + 1}" for k in range(3)])
    strips.tick_params(axis="y", length=0)
    strips.spines[:].set_visible(False)
    strips.set_title("the mean colour, moved along each component", loc="left")
    total = sum(stats.eigenvalues) or 1.0
    spectrum.bar(range(3), stats.stdevs, width=0.55, color=[BLUE, GRAY, ORANGE])
    for k, (stdev, variance) in enumerate(zip(stats.stdevs, stats.eigenvalues, strict=True)):
        spectrum.text(k, stdev, f"{stdev:.1f}\n{variance / total:.1%}", ha="center", va="bottom", fontsize=8.5)
    spectrum.set_xticks(range(3), [f"PC {k + 1}" for k in range(3)])
    spectrum.set_ylim(0, 1.35 * max(*stats.stdevs, 1e-9))
    spectrum.set_title("σ, and share of the variance", loc="left")
    spectrum.set_ylabel("grey levels")

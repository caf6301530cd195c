"""Pictures of a run: its learning curve, and the kernels of the first layer (the paper's figure 3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from prep.console import UserError

_ACROSS = 16  # kernels in a row


def _figure(**options: Any) -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("Figures need matplotlib. Install it with: pip install 'alexnet[figures]'") from None
    return Figure(layout="constrained", **options)


def _save(figure: Any, out: Path) -> None:
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: {error}.") from None


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; raises UserError where there are none."""
    try:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{run_dir / 'metrics.jsonl'}: cannot be read ({error}).") from None
    if not lines:
        raise UserError(f"{run_dir / 'metrics.jsonl'}: empty. Train first: alextrain run --run-dir {run_dir}")
    return lines


def draw_learning_curve(run_dir: Path, out: Path) -> None:
    """Loss and top-1 error over epochs, of training batches and of validation, drops of the rate marked."""
    lines = read_metrics(run_dir)
    figure = _figure(figsize=(9, 3.6))
    loss, error = figure.subplots(1, 2)
    for kind, style in (("train", {"color": "0.6", "lw": 1.2}), ("val", {"color": "C0", "marker": "o", "ms": 4})):
        mine = [line for line in lines if line["kind"] == kind]
        epochs = [line["epoch"] for line in mine]
        label = "training batches" if kind == "train" else "validation, centre view"
        loss.plot(epochs, [line["loss"] for line in mine], label=label, **style)
        error.plot(epochs, [100 * line["top1_error"] for line in mine], label=label, **style)
    rates = [(line["epoch"], line["lr"]) for line in lines if line["kind"] == "train"]
    drops = [before for (before, lr), (_, next_lr) in pairwise(rates) if next_lr != lr]
    for axes, name in ((loss, "loss, nats"), (error, "top-1 error, %")):
        for epoch in drops:
            axes.axvline(epoch, color="0.85", lw=1, zorder=0)
        axes.set(xlabel="epochs", ylabel=name)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    error.legend(frameon=False)
    _save(figure, out)


def draw_kernels(parameters: Mapping[str, Tensor], out: Path, columns: int) -> None:
    """The 11×11×3 kernels of conv1, column 0's above column 1's where there are two; each stretched to its own range,
    as figure 3 of the paper.
    """
    kernels = parameters["conv1.weight"].permute(0, 2, 3, 1)  # (96, 11, 11, 3)
    low, high = kernels.amin((1, 2, 3), keepdim=True), kernels.amax((1, 2, 3), keepdim=True)
    images = ((kernels - low) / (high - low).clamp_min(1e-12)).numpy()
    share = len(images) // columns
    rows = -(-share // _ACROSS)
    figure = _figure(figsize=(9, 0.6 * columns * rows + 0.5))
    for column, part in enumerate(figure.subfigures(columns, 1, squeeze=False).flat):
        if columns > 1:
            part.suptitle(f"column {column}", fontsize=9, x=0.01, ha="left")
        for axes in part.subplots(rows, _ACROSS, squeeze=False).flat:
            axes.axis("off")
        for axes, image in zip(part.axes, images[column * share :][:share], strict=False):
            axes.imshow(image, interpolation="nearest")
    _save(figure, out)

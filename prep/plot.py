"""A picture of the colour components: what each does to the mean colour, and how far the pixels spread along it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prep.console import UserError
from prep.manifest import ColourStats


def plot_colour(stats: ColourStats, out: Path) -> None:
    """Draw the mean colour moved by −3 to +3 standard deviations along each component, and the spectrum, to a file.

    Raises UserError where matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("--plot needs matplotlib. Install it with: pip install 'alexnet[figures]'") from None

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(3, 1))
    steps = np.linspace(-3, 3, 241)
    vectors, mean = np.array(stats.eigenvectors), np.array(stats.mean_rgb)
    for component in range(3):
        colours = mean + steps[:, None] * stats.stdevs[component] * vectors[:, component]
        strip = figure.add_subplot(grid[component, 0])
        strip.imshow(np.clip(colours, 0, 255)[None].astype(np.uint8), aspect="auto", extent=(-3, 3, 0, 1))
        strip.set_yticks([])
        r, g, b = vectors[:, component]
        strip.set_ylabel(f"PC {component + 1}", rotation=0, ha="right", va="center")
        strip.set_title(f"({r:+.3f}, {g:+.3f}, {b:+.3f}), σ = {stats.stdevs[component]:.1f} grey levels", fontsize=9)
        if component == 2:
            strip.set_xlabel("mean colour moved by standard deviations")
        else:
            strip.set_xticks([])
    bars = figure.add_subplot(grid[:, 1])
    bars.bar(["PC 1", "PC 2", "PC 3"], stats.stdevs, color="0.35")
    bars.set_title("standard deviation, grey levels", fontsize=9)
    bars.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(out, dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {out}: {error}.") from None

"""Building blocks of figures: colors, image axes, contrast, tiles, short names, and saving to a file.

The matplotlib style and the rendering to PNG or SVG are in prep/plot_style.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.console import disk_error, escaped
from prep.files import write_atomic
from prep.plot_style import TEXT_GRAY, DrawFunction

BLUE, ORANGE, GRAY = "#3b6ea5", "#d1662f", "0.72"  # ORANGE marks correct classes

Inches = tuple[float, float]  # width and height of a figure
Image = npt.NDArray[Any]  # (H, W, 3), or (H, W) in grey levels; uint8, or floats in 0..1


def save_figure(content: bytes, out: Path) -> None:
    """Write a figure's file atomically. Raises UserError if the file cannot be written."""
    try:
        write_atomic(out, content)
    except OSError as error:
        raise disk_error(error, f"{out}: {error.strerror or error}. Name a folder in which you can write.") from None


def shorten(name: str, max_chars: int) -> str:
    """Return `name` with escaped control characters, and with at most `max_chars` characters.

    A name that was cut ends with ….
    """
    text = escaped(name)
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def plot_curve(axes: Any, x: Sequence[float], y: Sequence[float], single: str = "o", **style: Any) -> None:
    """Plot a line.

    A line with only one point is drawn as the opaque marker `single`, because a line without length is invisible.
    """
    if len(x) == 1:
        style = {"marker": single, "ms": 4, **style, "alpha": 1}
    axes.plot(x, y, **style)


def with_caption(draw: DrawFunction, size_inches: tuple[float, float], caption: str) -> tuple[DrawFunction, Inches]:
    """Return `draw` with a caption below the figure, and the size of the figure with the caption.

    The caption is for a figure that is saved as a single file.
    """
    lines = wrap(escaped(caption), round(15 * size_inches[0]))

    def draw_captioned(figure: Any) -> None:
        draw(figure)
        figure.supxlabel("\n".join(lines), x=0.01, ha="left", fontsize=8, color="0.35")

    return draw_captioned, (size_inches[0], size_inches[1] + 0.2 + 0.16 * len(lines))


def show_image(axes: Any, image: Image, title: str = "", color: str = TEXT_GRAY) -> None:
    """Draw an image into `axes`, without ticks or frame."""
    axes.imshow(image, cmap="gray" if image.ndim == 2 else None, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, color=color, fontsize=8.5, pad=3)


def scale_to_unit_range(images: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Scale each of N images (N, H, W, …) to 0..1 by its own minimum and maximum. Uniform images become 0."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    low, high = flat.min(1, keepdims=True), flat.max(1, keepdims=True)
    scaled: npt.NDArray[np.float64] = ((flat - low) / np.maximum(high - low, 1e-12)).reshape(images.shape)
    return scaled


def tile_images(images: npt.NDArray[np.float64], per_row: int, scale: int, gap_px: int = 2) -> npt.NDArray[np.float64]:
    """Return a white sheet with rows of images (N, H, W) or (N, H, W, 3), in 0..1.

    Each image is enlarged by `scale`.
    """
    count, height, width, *rest = images.shape
    rows = -(-count // per_row)
    cell_h, cell_w = height * scale + gap_px, width * scale + gap_px
    sheet = np.ones((rows * cell_h - gap_px, per_row * cell_w - gap_px, *rest))
    for k, image in enumerate(images):
        y, x = k // per_row * cell_h, k % per_row * cell_w
        sheet[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet

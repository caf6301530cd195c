"""How our pictures are drawn: one quiet style, PNG or SVG, the same bytes each time."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.console import UserError, disk_error, one_line
from prep.files import write_atomic
from train.config.choices import FIGURE_FORMATS

BLUE, ORANGE, GREY, INK = "#3b6ea5", "#d1662f", "0.72", "0.15"  # the second: what is right, or what is meant

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 9.5,
    "axes.edgecolor": "0.55",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "alexnet",  # else the names inside an SVG are random
    "text.parse_math": False,  # a class or a photograph may have a name with two $
    "figure.constrained_layout.use": True,
}

Draw = Callable[[Any], None]  # draws into an empty matplotlib Figure
Image = npt.NDArray[Any]  # (H, W, 3), or (H, W) grey; uint8, or 0..1


def rendered(draw: Draw, size: tuple[float, float], format: str = "png") -> bytes:
    """A picture of `size` inches as a file's bytes. Raises UserError where matplotlib is missing."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("Figures need matplotlib. Install it with: pip install 'alexnet[figures]'") from None
    with rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # it is drawn as a box
        figure, buffer = Figure(figsize=size), io.BytesIO()
        draw(figure)
        figure.savefig(buffer, format=format, dpi=150, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def save(content: bytes, out: Path) -> None:
    """Write a picture, whole or not at all; raises UserError where it cannot be written."""
    try:
        write_atomic(out, content)
    except OSError as error:
        raise disk_error(error, f"{out}: {error.strerror or error}. Name a folder that you may write to.") from None


def format_of(out: Path) -> str:
    """The format that a file's name asks for; raises UserError for others."""
    format = out.suffix.lower().removeprefix(".")
    if format not in FIGURE_FORMATS:
        raise UserError(f"{out}: a picture is .{' or .'.join(FIGURE_FORMATS)}. Name it {out.with_suffix('.png').name}.")
    return format


def shortened(name: str, most: int) -> str:
    """A name as it is drawn: control characters written out, of a long one its beginning."""
    text = one_line(name)
    return text if len(text) <= most else text[: most - 1] + "…"


def show(axes: Any, image: Image, title: str = "", colour: str = INK) -> None:
    """An image without axes around it."""
    axes.imshow(image, cmap="gray" if image.ndim == 2 else None, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    if title:
        axes.set_title(title, color=colour, fontsize=8.5, pad=3)


def stretched(images: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Each of N images (N, H, W, …) by itself to the range 0..1; one without contrast becomes 0."""
    flat = images.reshape(len(images), -1).astype(np.float64)
    low, high = flat.min(1, keepdims=True), flat.max(1, keepdims=True)
    scaled: npt.NDArray[np.float64] = ((flat - low) / np.maximum(high - low, 1e-12)).reshape(images.shape)
    return scaled


def tiled(images: npt.NDArray[np.float64], across: int, scale: int, gap: int = 2) -> npt.NDArray[np.float64]:
    """N images (N, H, W) or (N, H, W, 3), 0..1, side by side, `across` in a row, on white; a pixel is `scale` wide."""
    count, height, width, *rest = images.shape
    rows = -(-count // across)
    cell_h, cell_w = height * scale + gap, width * scale + gap
    sheet = np.ones((rows * cell_h - gap, across * cell_w - gap, *rest))
    for k, image in enumerate(images):
        y, x = k // across * cell_h, k % across * cell_w
        sheet[y : y + height * scale, x : x + width * scale] = image.repeat(scale, 0).repeat(scale, 1)
    return sheet

"""matplotlib style and rendering of figures, shared by alexprep and alextrain.

A figure is rendered as PNG or SVG. Rendering a figure again gives the same bytes. matplotlib is optional (pip extra
`figures`), and only `render_figure` imports it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prep.console import UserError
from prep.files import check_extension
from prep.version import pip_command

FORMATS = ("png", "svg")
TEXT_GRAY = "0.15"  # color of text and ticks; the grays of matplotlib go from 0 (black) to 1 (white)

_PNG_DPI = 150
_STYLE: dict[Any, Any] = {
    "text.color": TEXT_GRAY,
    "axes.labelcolor": TEXT_GRAY,
    "axes.edgecolor": "0.55",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT_GRAY,
    "ytick.color": TEXT_GRAY,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "alexnet",  # without this setting, the ids inside an SVG are random
    "text.parse_math": False,  # with True, a class name with two $ would be drawn as a formula
}

DrawFunction = Callable[[Any], None]  # a function that draws into an empty matplotlib Figure


def render_figure(
    draw: DrawFunction, size_inches: tuple[float, float], format: str = "png", font_size_pt: float = 9.5
) -> bytes:
    """Call `draw` with a Figure of `size_inches`, and return the figure as the bytes of an image file.

    `format` is one of FORMATS. A PNG has 150 dpi. The file contains no creation date. matplotlib's global settings are
    not changed. Raises UserError if matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError(f"Figures need matplotlib. Install matplotlib with: {pip_command('figures')}") from None
    sizes: dict[Any, Any] = {"font.size": font_size_pt, "axes.titlesize": font_size_pt}
    with rc_context({**_STYLE, **sizes}), warnings.catch_warnings():
        # A missing glyph is drawn as a box, without a warning.
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        figure, buffer = Figure(figsize=size_inches), io.BytesIO()
        draw(figure)
        figure.savefig(buffer, format=format, dpi=_PNG_DPI, metadata={"Date": None} if format == "svg" else None)
    return buffer.getvalue()


def figure_format(path: Path, option: str) -> str:
    """Return the format named by the extension of `path`.

    Raises UserError, with `option` in its message, if the format is unknown.
    """
    check_extension(path, option, [f".{format}" for format in FORMATS], "a figure is")
    return path.suffix.lower().removeprefix(".")

"""Draw docs/alexnet.svg: the two columns and where they see each other, from the network itself.

python -m tools.docs.draw_alexnet docs/alexnet.svg
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from train.model.summary import LayerRow, summarize

WIDTH, HEIGHT = 1180, 516
ROWS = 150, 360  # y of the two columns' middles
INK, QUIET = "#222222", "#777777"
FILLS = ("#7fa6c9", "#e0a96d")  # of column 0 and column 1
KERNELS = {  # and what follows a layer: from train.model.alexnet, which does not say them in a form to be read
    "conv1": "11×11, stride 4",
    "conv2": "5×5",
    "conv3": "3×3",
    "conv4": "3×3",
    "conv5": "3×3",
}
AFTER = {"conv1": "LRN, pool", "conv2": "LRN, pool", "conv5": "pool", "fc6": "dropout", "fc7": "dropout"}


@dataclass(frozen=True)
class Box:
    """A layer's maps in one column as a slab: its front is high as the maps' side, its depth tells their number."""

    x: float
    y: float  # of its middle
    high: float
    deep: float  # to the right and up
    fill: str

    @property
    def left(self) -> tuple[float, float]:
        return self.x, self.y

    @property
    def right(self) -> tuple[float, float]:
        return self.x + 10 + self.deep, self.y - self.deep / 4

    def svg(self) -> str:
        """Front, top and side."""
        x, top, w, up = self.x, self.y - self.high / 2, 10.0, self.deep / 2
        far = x + w + self.deep
        front = f"{x},{top} {x + w},{top} {x + w},{top + self.high} {x},{top + self.high}"
        lid = f"{x},{top} {x + self.deep},{top - up} {far},{top - up} {x + w},{top}"
        side = f"{x + w},{top} {far},{top - up} {far},{top - up + self.high} {x + w},{top + self.high}"
        faces = ((lid, 0.55), (side, 0.8), (front, 1.0))
        return "".join(
            f'<polygon points="{points}" fill="{self.fill}" fill-opacity="{opacity}" stroke="{INK}" stroke-width=".8"/>'
            for points, opacity in faces
        )


def boxes(rows: list[LayerRow]) -> list[list[Box]]:
    """Of each layer, one box for each of its columns, left to right as the data flows."""
    drawn, x = [], 160.0
    for row in rows:
        maps, *sides = row.output_per_column
        high = 20 + 2.1 * sides[0] if sides else 20 + maps / 24
        deep = maps / 4 if sides else 0.0
        drawn.append([Box(x, ROWS[column], high, deep, FILLS[column]) for column in range(row.columns)])
        x += 104 + deep
    return drawn


def arrow(start: tuple[float, float], end: tuple[float, float], crossing: bool) -> str:
    """A line from one box to the next, broken where it crosses between columns."""
    dash = ' stroke-dasharray="5 4"' if crossing else ""
    return (
        f'<line x1="{start[0] + 3:.1f}" y1="{start[1]:.1f}" x2="{end[0] - 5:.1f}" y2="{end[1]:.1f}" '
        f'stroke="{INK}" stroke-width="1.1"{dash} marker-end="url(#head)"/>'
    )


def text(x: float, y: float, words: str, fill: str = INK, anchor: str = "middle", size: int = 12) -> str:
    """Words at a place."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{words}</text>'


def picture(classes: int = 1000) -> str:
    """The SVG file."""
    rows = summarize(classes)
    drawn = boxes(rows)
    image = Box(40, sum(ROWS) / 2, 130, 6, "#cccccc")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,1 L7,4 L0,7" fill="none" stroke="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        image.svg(),
        text(48, image.y + 88, "image"),
        text(48, image.y + 104, "224×224×3", QUIET),
    ]
    before = [image]
    for row, layer in zip(rows, drawn, strict=True):
        for column, box in enumerate(layer):
            for source, start in enumerate(before):
                crosses = len(before) > 1 and source != column
                if not crosses or row.sees == "both columns":
                    parts.append(arrow(start.right, box.left, crosses))
        before = layer
    for row, layer in zip(rows, drawn, strict=True):
        parts += [box.svg() for box in layer]
        maps, *sides = row.output_per_column
        middle = layer[0].x + 5 + layer[0].deep / 2
        shape = f"{sides[0]}×{sides[0]}×{maps}" if sides else f"{maps:,}"
        parts += [text(middle, 448, row.layer, size=14), text(middle, 466, shape, QUIET)]
        parts += [
            text(middle, 482, KERNELS.get(row.layer, ""), QUIET),
            text(middle, 498, AFTER.get(row.layer, ""), QUIET),
        ]
    for column, first in enumerate(drawn[0]):
        parts.append(text(first.x + 40, first.y - 58, f"column {column}", FILLS[column], "start", 14))
    key = WIDTH - 240
    parts += [arrow((key, 36), (key + 50, 36), True), text(key + 58, 40, "crosses between the columns", QUIET, "start")]
    return "\n".join([*parts, "</svg>", ""])


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Draw the two columns into OUT, an SVG file."""
    out.write_text(picture())


if __name__ == "__main__":
    main()

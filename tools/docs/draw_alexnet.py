"""Draw docs/alexnet.svg: the layers of the two columns, and the connections between layers.

python -m tools.docs.draw_alexnet docs/alexnet.svg        # tests/test_docs.py fails if the file is not up to date
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import click

from train.model.summary import LayerRow, summarize

WIDTH, HEIGHT = 1180, 516
COLUMN_Y = 150, 360  # y coordinate of the middle of column 0 and of column 1
DARK, GRAY = "#222222", "#777777"
FILLS = ("#7fa6c9", "#e0a96d")  # fill colours of column 0 and column 1
# Kernel sizes, and the operations after each layer. KERNELS and AFTER are copied from train.model.alexnet, because no
# object of that module lists kernel sizes and operations.
KERNELS = {
    "conv1": "11×11, stride 4",
    "conv2": "5×5",
    "conv3": "3×3",
    "conv4": "3×3",
    "conv5": "3×3",
}
AFTER = {"conv1": "LRN, pool", "conv2": "LRN, pool", "conv5": "pool", "fc6": "dropout", "fc7": "dropout"}


@dataclass(frozen=True)
class Box:
    """A slab that shows one column of a layer.

    The height grows with the side of the maps. The depth grows with the number of maps. For a fully connected layer,
    the height grows with the number of units, and the depth is 0.
    """

    x: float  # x coordinate of the left edge of the front
    y: float  # y coordinate of the middle
    height: float
    depth: float  # length of the edges that run to the back, which are drawn to the right and up
    fill: str

    @property
    def inlet(self) -> tuple[float, float]:
        """Return the point at which connections from the previous layer end."""
        return self.x, self.y

    @property
    def outlet(self) -> tuple[float, float]:
        """Return the point at which connections to the next layer start."""
        return self.x + 10 + self.depth, self.y - self.depth / 4

    def svg(self) -> str:
        """Return the three visible faces of the slab as polygons: front, top and side."""
        x, y, w, up = self.x, self.y - self.height / 2, 10.0, self.depth / 2
        far = x + w + self.depth
        front = f"{x},{y} {x + w},{y} {x + w},{y + self.height} {x},{y + self.height}"
        top = f"{x},{y} {x + self.depth},{y - up} {far},{y - up} {x + w},{y}"
        side = f"{x + w},{y} {far},{y - up} {far},{y - up + self.height} {x + w},{y + self.height}"
        faces = ((top, 0.55), (side, 0.8), (front, 1.0))
        return "".join(
            f'<polygon points="{points}" fill="{self.fill}" fill-opacity="{opacity}" stroke="{DARK}" '
            'stroke-width=".8"/>'
            for points, opacity in faces
        )


def layer_boxes(rows: list[LayerRow]) -> list[list[Box]]:
    """Return the boxes of each layer, from left to right: one box for each column that the layer has."""
    layers, x = [], 160.0
    for row in rows:
        maps, *sides = row.output_per_column
        height = 20 + 2.1 * sides[0] if sides else 20 + maps / 24
        depth = maps / 4 if sides else 0.0
        layers.append([Box(x, COLUMN_Y[column], height, depth, FILLS[column]) for column in range(row.columns)])
        x += 104 + depth
    return layers


def arrow(start: tuple[float, float], end: tuple[float, float], crossing: bool) -> str:
    """Return an arrow from a box to a box of the next layer.

    The arrow is dashed if the boxes are in different columns.
    """
    dash = ' stroke-dasharray="5 4"' if crossing else ""
    return (
        f'<line x1="{start[0] + 3:.1f}" y1="{start[1]:.1f}" x2="{end[0] - 5:.1f}" y2="{end[1]:.1f}" '
        f'stroke="{DARK}" stroke-width="1.1"{dash} marker-end="url(#head)"/>'
    )


def text(x: float, y: float, content: str, fill: str = DARK, anchor: str = "middle", size: int = 12) -> str:
    """Return a text element. `anchor` is SVG's text-anchor."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" text-anchor="{anchor}" font-size="{size}">{content}</text>'


def draw_network(classes: int = 1000) -> str:
    """Return the drawing, as the text of an SVG file."""
    rows = summarize(classes)
    layers = layer_boxes(rows)
    image = Box(40, sum(COLUMN_Y) / 2, 130, 6, "#cccccc")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, sans-serif">',
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,1 L7,4 L0,7" fill="none" stroke="{DARK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        image.svg(),
        text(48, image.y + 88, "image"),
        text(48, image.y + 104, "224×224×3", GRAY),
    ]
    previous = [image]
    for row, layer in zip(rows, layers, strict=True):
        for column, box in enumerate(layer):
            for source, start in enumerate(previous):
                crosses = len(previous) > 1 and source != column
                if not crosses or row.sees == "both columns":
                    parts.append(arrow(start.outlet, box.inlet, crosses))
        previous = layer
    for row, layer in zip(rows, layers, strict=True):
        parts += [box.svg() for box in layer]
        maps, *sides = row.output_per_column
        middle = layer[0].x + 5 + layer[0].depth / 2
        shape = f"{sides[0]}×{sides[0]}×{maps}" if sides else f"{maps:,}"
        parts += [text(middle, 448, row.layer, size=14), text(middle, 466, shape, GRAY)]
        parts += [
            text(middle, 482, KERNELS.get(row.layer, ""), GRAY),
            text(middle, 498, AFTER.get(row.layer, ""), GRAY),
        ]
    for column, first in enumerate(layers[0]):
        parts.append(text(first.x + 40, first.y - 58, f"column {column}", FILLS[column], "start", 14))
    key = WIDTH - 240
    parts += [arrow((key, 36), (key + 50, 36), True), text(key + 58, 40, "crosses between the columns", GRAY, "start")]
    return "\n".join([*parts, "</svg>", ""])


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    """Draw the two columns of the network, and write the drawing to OUT, an SVG file."""
    out.write_text(draw_network())


if __name__ == "__main__":
    main()

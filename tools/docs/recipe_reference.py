"""Write docs/recipes.md: every setting of every recipe, with its source.

python -m tools.docs.recipe_reference            # tests/test_docs.py fails if the page is not up to date
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import click

from train.config.recipe import Recipe, recipe_fields
from train.config.recipe_table import HEADINGS, has_parts, recipe_rows
from train.config.recipes import RECIPES

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"

INTRODUCTION = """\
# Recipes

<!-- Written by `python -m tools.docs.recipe_reference`; tests/test_docs.py compares it with the code. -->

A recipe is the list of all hyperparameters of a training run, each with its source. `alextrain run --recipe NAME`
trains with a recipe. `alextrain recipe NAME` prints a recipe. `--set FIELD=VALUE` changes one hyperparameter, for
example `--set lr=0.02 --set lrn.k=1`. The first column of the tables has the names of the fields. Every network
(`--model`) can be trained with every recipe.

| recipe | what it is |
| --- | --- |
| `paper` | the values that the text of the paper gives; training starts slowly (see [Measurements](measurements.md)) |
| `released` | the default: the values in the authors' code and parameter files, net #145 of AlexNet-Source-Code |
| `caffe` | the values of models/bvlc_alexnet in BVLC's Caffe |
| `modern` | the same network with present-day initialization and schedule |
| `short` | for a training that takes a few minutes on a CPU, with small batches |
| `large` | for batches of 1,024 to 8,192 images, with LARS; [unproven on ImageNet](guides/many-gpus.md#large-batches) |

In the sources, "section" is a section of the paper. L145 and P145 with line numbers are layers/layers-145.cfg and
layers/layer-params-145.cfg of the authors' code. Other files with line numbers belong to the authors' code or, in the
recipe `caffe`, to Caffe. Files of fb.resnet.torch are named with their repository. In the recipe `large`, the folders
bvlc_alexnet and alexnet_bn are in models/ of borisgin/nvcaffe, the Caffe fork of an author of arXiv 1708.03888. "ours"
marks a choice of this project. Epochs are counted from the start of the training.
"""


def page() -> str:
    """Return the text of docs/recipes.md: the values of all recipes side by side, then each recipe with its sources."""
    parts = [INTRODUCTION, "## Side by side\n", _side_by_side(RECIPES)]
    for recipe in RECIPES.values():
        parts += [f"## {recipe.name}\n", _sourced(recipe)]
    return "\n".join(parts)


def _side_by_side(recipes: Mapping[str, Recipe]) -> str:
    """Return a table of all recipes. A field with parts, such as `lrn.k`, has a row for each part."""
    by_recipe = {
        name: {field: _cells(rows) for field, rows in recipe_rows(recipe).items()} for name, recipe in recipes.items()
    }
    lines = [_row("field", *(f"`{name}`" for name in recipes)), _row(*["---"] * (len(recipes) + 1))]
    for field in recipe_fields():
        cells = [fields[field] for fields in by_recipe.values()]
        for name in dict.fromkeys(name for values in cells for name in values):
            lines.append(_row(f"`{name}`", *(values.get(name, "") for values in cells)))
    return "\n".join(lines) + "\n"


def _sourced(recipe: Recipe) -> str:
    """Return a table of all fields of a recipe with their sources, and with the headings of `alextrain recipe`."""
    lines = [_row("field", "value", "source"), _row("---", "---", "---")]
    for field, rows in recipe_rows(recipe).items():
        if field in HEADINGS:
            lines.append(_row(f"**{HEADINGS[field]}**", "", ""))
        source = _escaped(recipe.sources[field])
        if has_parts(rows):
            lines.append(_row(f"`{field}`", "", source))
            source = ""
        lines += [_row(f"`{name}`", value, source) for name, value in _cells(rows).items()]
    return "\n".join(lines) + "\n"


def _cells(rows: list[tuple[str, str]]) -> dict[str, str]:
    """Return {name of a field or of its part: value as Markdown}. A row without a name continues the previous row."""
    cells: dict[str, str] = {}
    for name, value in rows:
        if name:
            last, cells[name] = name, _escaped(value)
        else:
            between = " " if cells[last].endswith(",") else "<br>"
            cells[last] += between + _escaped(value)
    return cells


def _escaped(text: str) -> str:
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


@click.command()
def main() -> None:
    """Write docs/recipes.md."""
    PAGE.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()

"""A recipe as a table that one can read beside the paper: number, value, source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from train.config.recipe import Recipe, ScheduleChange, recipe_fields

HEADINGS = {  # above the field
    "batch_size": "What the network is shown",
    "activation": "What it computes",
    "init": "Where it begins",
    "label_smoothing": "How it learns",
}
_WIDTH = 120


def recipe_lines(recipe: Recipe) -> list[str]:
    """The table, its columns aligned; names are those that `--set` takes."""
    parts = recipe_rows(recipe)
    name_width, value_width = (max(len(row[k]) for rows in parts.values() for row in rows) for k in (0, 1))
    source_width = _WIDTH - name_width - value_width - 6
    lines = [f"recipe {recipe.name}"]
    for field, rows in parts.items():
        if field in HEADINGS:
            lines += ["", HEADINGS[field]]
        for row, source in zip_longest(rows, wrap(recipe.sources[field], source_width, break_on_hyphens=False)):
            name, value = row or ("", "")
            lines.append(f"  {name:{name_width}}  {value:{value_width}}  {source or ''}".rstrip())
    return lines


def recipe_rows(recipe: Recipe) -> dict[str, list[tuple[str, str]]]:
    """Of each field its rows of (name, value): a name is empty where the row goes on."""
    return {field: _rows(field, getattr(recipe, field)) for field in recipe_fields()}


def _rows(field: str, value: Any) -> list[tuple[str, str]]:
    """(name, value) of a field, a row for each of its parts."""
    if is_dataclass(value) and not isinstance(value, type):
        return [(f"{field}.{part.name}", _text(getattr(value, part.name))) for part in fields(value)]
    if isinstance(value, Mapping):
        layers = {number: [name for name in value if value[name] == number] for number in value.values()}
        lines = [line for number in layers for line in wrap(f"{number:g} in {', '.join(layers[number])}", 30)] or ["0"]
    elif isinstance(value, tuple):
        lines = [f"after {change.after_epochs:g}: {_change_text(change)}" for change in value] or ["none: one rate"]
    else:
        lines = [_text(value)]
    return [(field if k == 0 else "", line) for k, line in enumerate(lines)]


def _change_text(change: ScheduleChange) -> str:
    parts = [f"{name} {_text(value)}" for name, value in vars(change).items() if name != "after_epochs"]
    return ", ".join(part for part in parts if not part.endswith(" none"))


def _text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)

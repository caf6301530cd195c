"""Text table of a recipe, for `alextrain recipe` and the documentation: name, value and source of every field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from textwrap import wrap
from typing import Any

from prep.console import count_noun
from train.config.recipe import Cosine, Polynomial, Recipe, ScheduleChange, insensitive_at_init, recipe_fields

HEADINGS = {  # {first field of a group: heading of the group}
    "batch_size": "Data",
    "activation": "Network",
    "init": "Initialization",
    "label_smoothing": "Optimization",
}
_WIDTH = 120  # characters
_EXAMPLE_BATCHES = (1024, 2048, 4096, 8192)  # batch sizes whose learning rates `rate_lines` lists


def recipe_lines(recipe: Recipe) -> list[str]:
    """Return the table as aligned lines of at most 120 characters. `--set` accepts the names in the first column.

    The source of a field is in the same row as the field. A field that has parts gets a row of its own, above the rows
    of its parts.
    """
    rows_by_field = recipe_rows(recipe)
    all_rows = [row for rows in rows_by_field.values() for row in rows]
    name_width, value_width = (max(len(row[k]) for row in all_rows) for k in (0, 1))
    source_width = _WIDTH - name_width - value_width - 6
    lines = [f"recipe {recipe.name}"]
    for field, rows in rows_by_field.items():
        if field in HEADINGS:
            lines += ["", HEADINGS[field]]
        sources = wrap(recipe.sources[field], source_width, break_on_hyphens=False)
        sourced, parts = ([(field, "")], rows) if has_parts(rows) else (rows, [])
        for row, source in [*zip_longest(sourced, sources), *((row, "") for row in parts)]:
            name, value = row or ("", "")
            lines.append(f"  {name:{name_width}}  {value:{value_width}}  {source or ''}".rstrip())
    return lines


def rate_lines(recipe: Recipe, batch_size: int | None = None) -> list[str]:
    """Return a line with the learning rate for a batch size. If the recipe has no `lr_batch`, return no line.

    batch_size  number of images in a step; None: the line lists the learning rates for several batch sizes
    """
    if recipe.lr_batch is None:
        return []
    batches = _EXAMPLE_BATCHES if batch_size is None else (batch_size,)
    rates = ", ".join(f"{recipe.lr * recipe.rate_factor(images):g} at {images}" for images in batches)
    return [f"learning rate before the schedule, lr · batch / {recipe.lr_batch}: {rates}"]


def advice_lines(recipe: Recipe, epochs: int) -> list[str]:
    """Return a line of advice for each setting with which a run of `epochs` epochs learns late or slowly."""
    lines = []
    if insensitive_at_init(recipe):
        lines.append(
            f"recipe {recipe.name}: with weights of standard deviation 0.01 and biases of 1, the output hardly depends "
            "on the image at first, so learning starts late. --recipe released, from the authors' code, learns sooner."
        )
    if isinstance(recipe.schedule, Cosine | Polynomial) and recipe.schedule.warmup_epochs >= epochs:
        lines.append(
            f"recipe {recipe.name}: the warm-up takes {recipe.schedule.warmup_epochs:g} epochs, and the run ends after "
            f"{count_noun(epochs, 'epoch')}, so the learning rate never reaches lr. Pass more --epochs, or a shorter "
            "--set schedule.warmup_epochs=EPOCHS."
        )
    return lines


def has_parts(rows: Sequence[tuple[str, str]]) -> bool:
    """Return whether the rows of a field are rows of its parts, such as `lrn.alpha`."""
    return "." in rows[0][0]


def recipe_rows(recipe: Recipe) -> dict[str, list[tuple[str, str]]]:
    """Return {name of a field: its rows}, in which a row is (name, value).

    A row with an empty name continues the row above it.
    """
    return {field: _field_rows(field, getattr(recipe, field)) for field in recipe_fields()}


def _field_rows(field: str, value: Any) -> list[tuple[str, str]]:
    """Return the rows of one field, each as (name, value).

    A field whose value is a dataclass has one row per part. The text of a mapping or a schedule may take several rows.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return [(f"{field}.{part.name}", _value_text(getattr(value, part.name))) for part in fields(value)]
    if isinstance(value, Mapping):
        layers = {number: [name for name in value if value[name] == number] for number in value.values()}
        lines = [line for number in layers for line in wrap(f"{number:g} in {', '.join(layers[number])}", 30)] or ["0"]
    elif isinstance(value, tuple):
        lines = [f"after {change.after_epochs:g}: {_change_text(change)}" for change in value] or ["none: constant lr"]
    else:
        lines = [_value_text(value)]
    return [(field if k == 0 else "", line) for k, line in enumerate(lines)]


def _change_text(change: ScheduleChange) -> str:
    parts = [f"{name} {_value_text(value)}" for name, value in vars(change).items() if name != "after_epochs"]
    return ", ".join(part for part in parts if not part.endswith(" none"))


def _value_text(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)

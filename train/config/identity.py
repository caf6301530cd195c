"""What makes a run the same run: the numbers that decide its result, and where two runs' differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from prep.console import UserError
from prep.store.manifest import Store
from train.config.architecture import numbers_of
from train.config.recipe import Recipe

if TYPE_CHECKING:
    from train.config.run_config import RunConfig


class Difference(NamedTuple):
    """One number in which two runs differ, by its name: `batch_size`, `recipe.lrn.alpha`, `model.widths.fc7`."""

    name: str
    there: Any
    here: Any


def identity(config: RunConfig, store: Store) -> dict[str, Any]:
    """What must agree for a checkpoint to be continued, as JSON has it; of recipe and model the numbers count."""
    return {
        "store_fingerprint": store.split("train").fingerprint,
        "classes": len(store.classes),
        "model": config.model.name,
        "model_numbers": plain({k: v for k, v in numbers_of(config.model).items() if k != "name"}),
        "recipe": config.recipe.name,
        "recipe_numbers": recipe_numbers(config.recipe),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "seed": config.seed,
        "precision": config.precision,
    }


def recipe_numbers(recipe: Recipe) -> dict[str, Any]:
    """What a recipe decides: name and sources left out."""
    numbers: dict[str, Any] = plain({k: v for k, v in asdict(recipe).items() if k not in ("name", "sources")})
    return numbers


def plain(data: Any) -> Any:
    """Data as they come back from JSON: lists for tuples, plain dicts."""
    return json.loads(json.dumps(data))


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[Difference]:
    """Where two identities differ, in their order; names of recipe and model aside, which decide nothing."""
    found = []
    for name, mine in here.items():
        if f"{name}_numbers" not in here:
            found += list(_leaves(name.removesuffix("_numbers"), there.get(name), mine))
    return found


def check_identity(state: Mapping[str, Any], mine: Mapping[str, Any], run_dir: Path) -> None:
    """Raise UserError naming the first thing in which a checkpoint's run differs from this one, with both values."""
    there = state["identity"]
    found = differences(there, mine)
    if not found:
        return
    what, _, number = found[0].name.partition(".")
    values = f"{_shown(found[0].there)}, here {_shown(found[0].here)}"
    names = "" if there.get(what) == mine[what] else f" ({there.get(what)}, here {mine[what]})"
    said = f"{what}{names}: {number} is {values}" if number else f"{what.replace('_', ' ')} ({values})"
    raise UserError(
        f"{run_dir} was trained with another {said}. Give the settings it began with, start a new --run-dir, or begin "
        "a new run from its newest checkpoint with --fork NEW_DIR."
    )


def _leaves(name: str, there: Any, here: Any) -> Iterator[Difference]:
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**here, **there}:
            yield from _leaves(f"{name}.{key}", there.get(key), here.get(key))
    elif isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for place, pair in enumerate(zip(there, here, strict=True)):
            yield from _leaves(f"{name}.{place}", *pair)
    elif there != here:
        yield Difference(name, there, here)


def _shown(value: Any) -> str:
    return str(value)[:60]

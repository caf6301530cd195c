"""`--set FIELD=VALUE`: a recipe with some of its numbers changed, which says so.

Fields are named as `alextrain recipe` prints them, a part of one behind a dot. Words by type:

    a number, true or false, a word   lr=0.02   crossing=false   activation=tanh   lr_bias=none
    lrn, within_map, augmentation     lrn=none, lrn=5,1e-4,0.75,2 in the order of the fields, lrn.alpha=1e-4
    init_std, init_bias               a number for all layers, none for no biases, init_std.conv3=0.01 for one
    schedule                          plateau, cosine, steps (a tenth after each third of the epochs), none (one rate),
                                      25,51,79 (a tenth after each), 25:1e-3,51:1e-4 (these rates), schedule.drops=2

Each is applied once, in alphabetical order, the later of two for the same field: what a recipe becomes, and its name,
do not depend on the order in which they are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from difflib import get_close_matches
from itertools import pairwise
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from prep.console import UserError
from train.config.architecture import LAYERS
from train.config.recipe import Cosine, Plateau, Recipe, ScheduleChange, ScheduleSpec, recipe_fields
from train.config.recipes import recipe_named

SET = "set on the command line"
PLATEAU = Plateau(factor=0.1, patience_epochs=5, drops=3)
COSINE = Cosine(warmup_epochs=5, start=0.1, end=0.001)
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


class _Unfit(Exception):
    """A value that its field cannot have; the text is what is expected."""


def recipe_with_overrides(name: str, settings: Sequence[str], epochs: int | None = None) -> Recipe:
    """The recipe `name` with `settings`; raises UserError as apply_overrides and recipe_named.

    A run of `epochs` changes a recipe only where its rates are drawn over all of them: a cosine, or `schedule=steps`.
    """
    recipe = apply_overrides(recipe_named(name), settings)
    drawn = isinstance(recipe.schedule, Cosine) or "schedule=steps" in settings
    return apply_overrides(recipe_named(name), [*settings, f"epochs={epochs}"]) if epochs and drawn else recipe


def apply_overrides(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """The recipe with each FIELD=VALUE of `settings`, named and sourced accordingly.

    Raises UserError naming field, value and what is expected.
    """
    wanted = {}
    for text in settings:
        path, equals, value = (part.strip() for part in text.partition("="))
        if not equals:
            raise UserError(f"--set {text}: expected FIELD=VALUE, as in lr=0.02.")
        wanted[path] = value
    for path, value in sorted(wanted.items()):
        recipe = _set(recipe, path, value)
    return recipe


def _set(recipe: Recipe, path: str, value: str) -> Recipe:
    field, *parts = path.split(".")
    said = f"--set {path}={value}"
    _check_name(said, field, recipe_fields())
    before = getattr(recipe, field)
    try:
        whole = field == "schedule" and not parts
        hint = get_type_hints(Recipe)[field]
        after: Any = _plan(value, recipe) if whole else _changed(said, before, hint, parts, value)
        if after == before:
            return recipe
        source = f"{'.'.join(parts)} {SET}; else: {recipe.sources[field]}" if parts else SET
        named = f"{recipe.name}, {path}={_text(after, value) if not parts else value}"
        return replace(recipe, **{field: after}, name=named, sources={**recipe.sources, field: source})
    except _Unfit as error:
        raise UserError(f"{said}: expected {error}.") from None
    except UserError as error:
        raise error if str(error).startswith("--set") else UserError(f"{said}: {error}") from None


def _changed(said: str, before: Any, hint: Any, parts: Sequence[str], value: str) -> Any:
    """`before`, or the part of it that `parts` lead to, replaced by `value` as its type reads it."""
    if not parts:
        return _parsed(hint, value)
    part, *deeper = parts
    if is_dataclass(before) and not isinstance(before, type):
        _check_name(said, part, [field.name for field in fields(before)])
        hints = get_type_hints(type(before))
        return replace(before, **{part: _changed(said, getattr(before, part), hints[part], deeper, value)})
    if isinstance(before, Mapping) and not deeper:
        _check_name(said, part, LAYERS)
        return {**before, part: _parsed(float, value)}
    raise _Unfit(f"a value for it as a whole, for it is {_text(before, 'a table')} and has no part {part}")


def _check_name(said: str, name: str, names: Sequence[str]) -> None:
    if name not in names:
        near = get_close_matches(name, names, 3, 0.5)
        raise UserError(f"{said}: there is no {name}. " + (f"Near: {', '.join(near)}." if near else _one_of(names)))


def _one_of(names: Sequence[str]) -> str:
    return f"Expected one of {', '.join(names)}."


def _parsed(hint: Any, text: str) -> Any:
    """`text` as the type `hint` reads it; raises _Unfit."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint):
        if text == "none":
            return None
        try:
            return _parsed(kinds[0], text)
        except _Unfit as error:
            raise _Unfit(f"{error}, or none") from None
    if is_dataclass(hint):
        names, hints = [field.name for field in fields(hint)], get_type_hints(hint)
        words = text.split(",")
        if len(words) != len(names):
            raise _Unfit(f"{','.join(names).upper()}")
        kind: Any = hint
        return kind(*(_parsed(hints[name], word.strip()) for name, word in zip(names, words, strict=True)))
    if get_origin(hint) is Mapping:
        return {} if text == "none" else dict.fromkeys(LAYERS, _parsed(float, text))
    if hint is bool and text in ("true", "false"):
        return text == "true"
    if hint is str:
        return text
    try:
        number = int(text) if hint is int else float(text) if hint is float else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _Unfit(_EXPECTED[hint])
    return number


def _plan(text: str, recipe: Recipe) -> ScheduleSpec:
    """A schedule by its words; `steps` goes by the recipe's rate and epochs, so that these are to be set before."""
    if text == "none":
        return ()
    if text == "plateau":
        return PLATEAU
    if text == "cosine":
        return COSINE
    words = text.split(",")
    if text == "steps":
        words = [f"{recipe.epochs * third / 3:g}" for third in (1, 2)]
    changes = []
    for drop, word in enumerate(words, 1):
        after, _, lr = word.partition(":")
        try:
            epochs, rate = float(after), float(f"{recipe.lr / 10**drop:.6g}") if not lr else float(lr)
        except ValueError:
            raise _Unfit("plateau, cosine, steps, none, or epochs as in 25,51,79 or 25:1e-3,51:1e-4") from None
        if not (0 <= epochs < math.inf and 0 < rate < math.inf):
            raise _Unfit("epochs of at least 0, and rates of more than 0")
        changes.append(ScheduleChange(epochs, rate))
    if any(later.after_epochs <= change.after_epochs for change, later in pairwise(changes)):
        raise _Unfit("epochs that rise")
    return tuple(changes)


def _text(value: Any, given: str) -> str:
    """A value as it is written: one way for each, and `given` for what has parts."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else value if isinstance(value, str) else given

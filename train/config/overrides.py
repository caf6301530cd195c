"""Recipe overrides: `--set FIELD=VALUE` changes one field of a recipe.

In the changed recipe, the fields `name` and `sources` mention each override.

`alextrain recipe` prints the names of the fields. A dot separates the name of a field from the name of one of its
parts. The syntax of a value depends on the type of the field:

    number, true or false, word       lr=0.02   crossing=false   activation=tanh   lr_bias=none
    lrn, within_map, augmentation     lrn=none; lrn=5,1e-4,0.75,2 (all parts, in their order); lrn.alpha=1e-4
    init_std, init_bias               a number for all layers; init_std.conv3=0.01 for one layer;
                                      init_bias=none (all biases start at 0)
    schedule                          plateau; cosine; polynomial; none (constant lr);
                                      steps (lr divided by 10 after 1/3 and after 2/3 of the epochs);
                                      25,51,79 (lr divided by 10 after each of these epochs);
                                      25:1e-3,51:1e-4 (lr 1e-3 after epoch 25, 1e-4 after epoch 51); schedule.drops=2

`augmentation.divisor` sets the divisor of both training and evaluation images. To divide only training images, as the
authors' code does, also set `augmentation.eval_divisor=1`. If all parts of `augmentation` are given in one value,
eval_divisor may be left out.

Overrides are applied in alphabetical order of their fields. The order of the fields on the command line therefore
changes neither the recipe nor its name. If a field has two overrides, the last override on the command line is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from prep.console import UserError, WrongArgument, did_you_mean
from train.config.architecture import LAYERS
from train.config.recipe import Cosine, Plateau, Polynomial, Recipe, ScheduleChange, ScheduleSpec, recipe_fields
from train.config.recipes import recipe_named

OVERRIDE_SOURCE = "set on the command line"
PLATEAU = Plateau(factor=0.1, patience_epochs=5, drops=3)  # the schedule that schedule=plateau sets
COSINE = Cosine(warmup_epochs=5, start=0.1, end=0.001)  # the schedule that schedule=cosine sets
POLYNOMIAL = Polynomial(warmup_epochs=5, start=0.1, power=2, end=1e-6)  # the schedule that schedule=polynomial sets
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}


class _InvalidValue(Exception):
    """Raised for a value that is invalid for its field. The text of the exception describes the valid values."""


def recipe_with_overrides(name: str, settings: Sequence[str], epochs: int | None = None) -> Recipe:
    """Return the recipe `name` with the overrides `settings`, each FIELD=VALUE, for a run of `epochs` epochs.

    epochs  number of epochs of the run; None: the recipe's `epochs`. This argument changes the recipe only if the
            schedule is a cosine, a polynomial or `schedule=steps`. Only these schedules depend on the number of epochs

    Raises UserError for an unknown recipe and for an invalid override.
    """
    return override(recipe_named(name), settings, epochs)


def override(base: Recipe, settings: Sequence[str], epochs: int | None = None) -> Recipe:
    """Return the recipe `base` with overrides, for a run of `epochs` epochs, as `recipe_with_overrides` describes."""
    recipe = apply_overrides(base, settings)
    spans_all_epochs = isinstance(recipe.schedule, Cosine | Polynomial) or "schedule=steps" in settings
    if epochs and spans_all_epochs:
        return apply_overrides(base, [*settings, f"epochs={epochs}"])
    return recipe


def apply_overrides(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """Return the recipe with each FIELD=VALUE of `settings` applied.

    The `name` and `sources` of the returned recipe mention each override. Raises UserError for an invalid override. The
    message names the field, the value and the expected values.
    """
    values = {}
    for setting in settings:
        path, equals, value = (part.strip() for part in setting.partition("="))
        if not equals:
            raise WrongArgument(f"--set {setting}: expected FIELD=VALUE, as in lr=0.02.")
        values[path] = value
    for path, value in sorted(values.items()):
        recipe = _apply(recipe, path, value)
    return recipe


def _apply(recipe: Recipe, path: str, value: str) -> Recipe:
    field, *parts = path.split(".")
    option = f"--set {path}={value}"
    _check_name(option, field, recipe_fields())
    before = getattr(recipe, field)
    try:
        if field == "schedule" and not parts:
            after: Any = _parse_schedule(value, recipe)
        else:
            after = _replace_part(option, before, get_type_hints(Recipe)[field], parts, value)
        if after == before:
            return recipe
        if path == "augmentation.divisor" and after.divisor != 1:
            # With None, evaluation images are divided by the same divisor as training images.
            after = replace(after, eval_divisor=None)
        source = OVERRIDE_SOURCE
        if parts:
            source = f"{'.'.join(parts)} {OVERRIDE_SOURCE}; else: {recipe.sources[field]}"
        name = f"{recipe.name}, {path}={value if parts else _canonical_text(after, value)}"
        return replace(recipe, **{field: after}, name=name, sources={**recipe.sources, field: source})
    except _InvalidValue as error:
        raise WrongArgument(f"{option}: expected {error}.") from None
    except UserError as error:
        raise error if str(error).startswith("--set") else WrongArgument(f"{option}: {error}") from None


def _replace_part(option: str, before: Any, hint: Any, parts: Sequence[str], value: str) -> Any:
    """Return `before` with one part replaced by the parsed `value`.

    parts  path to the part: names of nested fields, or the name of a layer. If the path is empty, `value` replaces all
           of `before`
    """
    if not parts:
        return _parse(hint, value)
    part, *deeper = parts
    if is_dataclass(before) and not isinstance(before, type):
        _check_name(option, part, [field.name for field in fields(before)])
        part_hint = get_type_hints(type(before))[part]
        return replace(before, **{part: _replace_part(option, getattr(before, part), part_hint, deeper, value)})
    if isinstance(before, Mapping) and not deeper:
        _check_name(option, part, LAYERS)
        return {**before, part: _parse(float, value)}
    present = _canonical_text(before, "a list of changes" if isinstance(before, tuple) else "a table by layer")
    raise WrongArgument(f"{option}: the present value, {present}, has no part {part}. Set the entire field.")


def _check_name(option: str, name: str, names: Sequence[str]) -> None:
    if name in names:
        return
    hint = did_you_mean(name, names) or f" Expected one of {', '.join(names)}."
    raise WrongArgument(f"{option}: there is no {name}.{hint}")


def _parse(hint: Any, text: str) -> Any:
    """Convert `text` to a value of the type `hint`. Raises _InvalidValue if `text` is not valid for this type."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint):
        if text == "none":
            return None
        try:
            return _parse(kinds[0], text)
        except _InvalidValue as error:
            raise _InvalidValue(f"{error}, or none") from None
    if is_dataclass(hint):
        names, hints = [field.name for field in fields(hint)], get_type_hints(hint)
        values = text.split(",")
        if len(values) not in (len(names), len(names) - (fields(hint)[-1].default is None)):
            raise _InvalidValue(f"{','.join(names).upper()}")
        kind: Any = hint
        return kind(*(_parse(hints[name], value.strip()) for name, value in zip(names, values, strict=False)))
    if get_origin(hint) is Mapping:
        return {} if text == "none" else dict.fromkeys(LAYERS, _parse(float, text))
    if hint is bool and text in ("true", "false"):
        return text == "true"
    if hint is str:
        return text
    try:
        number = int(text) if hint is int else float(text) if hint is float else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _InvalidValue(_EXPECTED[hint])
    return number


def _parse_schedule(text: str, recipe: Recipe) -> ScheduleSpec:
    """Return the schedule that `text` describes.

    In a list of epochs, such as `25,51,79`, the learning rates are computed from the recipe's `lr`. In the schedule
    `steps`, the changes are computed from the recipe's `epochs` and `lr`. `recipe` already has the overrides of
    `epochs` and `lr`, because overrides are applied in alphabetical order.
    """
    if text == "none":
        return ()
    if text == "plateau":
        return PLATEAU
    if text == "cosine":
        return COSINE
    if text == "polynomial":
        return POLYNOMIAL
    entries = text.split(",")
    if text == "steps":
        entries = [f"{recipe.epochs * third / 3:g}" for third in (1, 2)]
    changes = []
    for drop, entry in enumerate(entries, 1):
        epochs_text, _, lr_text = entry.partition(":")
        try:
            epochs = float(epochs_text)
            lr = float(lr_text) if lr_text else float(f"{recipe.lr / 10**drop:.6g}")
        except ValueError:
            raise _InvalidValue(
                "plateau, cosine, polynomial, steps, none, or epochs as in 25,51,79 or 25:1e-3,51:1e-4"
            ) from None
        if not (0 <= epochs < math.inf and 0 < lr < math.inf):
            raise _InvalidValue("epochs of at least 0, and learning rates of more than 0")
        changes.append(ScheduleChange(epochs, lr))
    if any(later.after_epochs <= change.after_epochs for change, later in pairwise(changes)):
        raise _InvalidValue("epochs in rising order")
    return tuple(changes)


def _canonical_text(value: Any, given: str) -> str:
    """Return the text that stands for a value in a recipe's name. Equal numbers have the same text: 2e-2 becomes 0.02.

    given  text from the command line. If `value` has parts, as a schedule has, the function returns `given`
    """
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, int | float) else value if isinstance(value, str) else given

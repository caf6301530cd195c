"""Identity of a run: the settings that must be unchanged when the run continues from a checkpoint.

If the identities of the run and of the checkpoint differ, `alextrain run` fails. The error names the first setting that
differs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from prep.console import UserError
from prep.store.manifest import Store
from train.config.architecture import architecture_values
from train.config.recipe import ADDED_FIELDS, Recipe
from train.config.run_config import RunConfig


class Difference(NamedTuple):
    """A setting that has different values in two identities.

    In run.json, the key "ancestry" holds the differences between a forked run and the run from which it was forked.
    """

    name: str  # for example `batch_size`, `recipe.lrn.alpha` or `model.widths.fc7`
    there: Any  # value in the other identity (parameter `theirs` of `differences`)
    here: Any  # value in the identity of this run (parameter `ours` of `differences`)


def identity_of(config: RunConfig, store: Store) -> dict[str, Any]:
    """Return the identity of a run, as JSON values.

    The names of the recipe and the architecture are only for messages, and `differences` ignores these names. The
    identity contains the seed of the stream only if this seed differs from the seed of the run. Without --stream-seed,
    the identity is therefore the same as in program versions without this option.
    """
    own_stream_seed = {} if config.seed_of_stream == config.seed else {"stream_seed": config.seed_of_stream}
    return {
        "store_fingerprint": store.split("train").fingerprint,
        "classes": len(store.classes),
        "model": config.model.name,
        "model_numbers": as_json({k: v for k, v in architecture_values(config.model).items() if k != "name"}),
        "recipe": config.recipe.name,
        "recipe_numbers": recipe_values(config.recipe),
        "batch_size": config.batch_size,
        "accumulate": config.accumulate,
        "seed": config.seed,
        **own_stream_seed,
        "precision": config.precision,
    }


def stream_seed_of(identity: Mapping[str, Any]) -> Any:
    """Return the seed of the training stream of a run with this identity. Returns None if the identity has no seed."""
    return identity.get("stream_seed", identity.get("seed"))


def recipe_values(recipe: Recipe) -> dict[str, Any]:
    """Return all fields of a recipe except `name` and `sources`, as JSON values.

    The value of `augmentation.eval_divisor` is the divisor of evaluation images. If this divisor is 1, the key is left
    out. The fields that version 0.1.0 did not have are left out if they are None. A run of that version therefore keeps
    its identity.
    """
    values: dict[str, Any] = as_json({k: v for k, v in asdict(recipe).items() if k not in ("name", "sources")})
    divisor = recipe.augmentation.divisor_in_evaluation
    values["augmentation"]["eval_divisor"] = divisor
    if divisor == 1:  # version 0.1.0 wrote no eval_divisor, and every run of that version had the value 1
        del values["augmentation"]["eval_divisor"]
    return {name: value for name, value in values.items() if name not in ADDED_FIELDS or value is not None}


def as_json(data: Any) -> Any:
    """Return `data` after a round trip through JSON. Tuples then become lists, and mappings become dicts."""
    return json.loads(json.dumps(data))


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Difference]:
    """Return the settings that differ between two identities, in the order of `ours`.

    The names of the recipe and the architecture are not compared. Stream seeds are compared only if one of the
    identities contains a stream seed. For an identity without a stream seed, its `seed` is compared.
    """
    differing = []
    if "stream_seed" in theirs or "stream_seed" in ours:
        theirs, ours = ({**identity, "stream_seed": stream_seed_of(identity)} for identity in (theirs, ours))
    for name, value in ours.items():
        if f"{name}_numbers" not in ours:
            differing += list(differing_leaves(name.removesuffix("_numbers"), theirs.get(name), value))
    return differing


def check_identity(theirs: Mapping[str, Any], ours: Mapping[str, Any], run_dir: Path) -> None:
    """Raise UserError if the identity of a checkpoint differs from the identity of this run.

    theirs  identity of a checkpoint in `run_dir`
    ours    identity of this run

    The message names the first setting that differs, with both values.
    """
    differing = differences(theirs, ours)
    if not differing:
        return
    first = differing[0]
    part, _, setting = first.name.partition(".")
    values = f"{_shortened(first.there)}, here {_shortened(first.here)}"
    if setting:
        names = "" if theirs.get(part) == ours[part] else f" ({theirs.get(part)}, here {ours[part]})"
        what = f"{part}{names}: {setting} is {values}"
    else:
        what = f"{part.replace('_', ' ')} ({values})"
    raise UserError(
        f"{run_dir} was trained with another {what}. Pass the original settings, name a new --run-dir, or begin "
        "a new run from the newest checkpoint with --fork NEW_DIR."
    )


def differing_leaves(name: str, theirs: Any, ours: Any) -> Iterator[Difference]:
    """Yield a Difference for each part in which two JSON values differ. `name` is the dotted name of both values."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in {**ours, **theirs}:
            yield from differing_leaves(f"{name}.{key}", theirs.get(key), ours.get(key))
    elif isinstance(theirs, list) and isinstance(ours, list) and len(theirs) == len(ours):
        for index, pair in enumerate(zip(theirs, ours, strict=True)):
            yield from differing_leaves(f"{name}.{index}", *pair)
    elif theirs != ours or isinstance(theirs, bool) != isinstance(ours, bool):  # Python: True == 1
        yield Difference(name, theirs, ours)


def _shortened(value: Any) -> str:
    return str(value)[:60]

"""Comparison of the state of a stream with the loader that loads the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prep.console import UserError

# Settings that a state has only if they differ from their defaults.
_OPTIONAL = ("normalize", "views", "subset", "weights", "stores")


def check_state(state: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    """Raise UserError if a state differs from `identity`, the settings of a loader. The error names the setting.

    Between epochs (step 0), batch size and world size can differ. Within an epoch, batch size and world size can differ
    if their product, the number of records in a step, is the same.
    """
    may_differ = {"batch_size", "world_size"}
    step_records = state.get("batch_size", 0) * state.get("world_size", 0)
    if state.get("step") and step_records != identity["batch_size"] * identity["world_size"]:
        may_differ = set()
    for name, value in (dict.fromkeys(_OPTIONAL) | dict(identity)).items():
        if name not in may_differ and state.get(name) != value:
            within = " within an epoch" if name in ("batch_size", "world_size") else ""
            raise UserError(
                f"stream state with another {name.replace('_', ' ')}{within}: {state.get(name)}, this loader has "
                f"{value}. Load the state into a loader with the store and arguments of the loader that saved it."
            )

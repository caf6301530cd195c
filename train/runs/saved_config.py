"""Configuration of `alextrain run`: the given options, completed by the run's own settings or by defaults.

If the run folder has a run.json, the settings that no option gives are taken from this file. `alextrain run --run-dir
R` alone therefore continues R, and a fork changes only what its command names.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from prep.console import UserError, say
from train.config.architecture import ARCHITECTURES, architecture_from_json
from train.config.devices import Devices
from train.config.identity import Difference, differences
from train.config.overrides import override, recipe_with_overrides
from train.config.recipe import recipe_from_json
from train.config.replica_devices import count_of
from train.config.run_config import RunConfig
from train.model.precision import default_precision, set_precision
from train.replicas.devices import devices_of_replica
from train.replicas.group import ALONE, ReplicaGroup
from train.runs.run import Run
from train.runs.run_dir import has_description, read_description
from train.runs.training_store import missing_store_text, saved_store_path, training_store

# Options of `alextrain run` that set the RunConfig field of the same name, without conversion.
_PLAIN = ("accumulate", "seed", "stream_seed", "deterministic", "steps", "log_every", "checkpoint_every", "keep")
# Settings outside the run's identity. Their changes are printed before the training, like changes of the identity.
_SHOWN = ("epochs", "steps", "devices", "deterministic", "log_every", "checkpoint_every", "keep")


def saved_config(run_dir: Path, group: ReplicaGroup = ALONE) -> RunConfig | None:
    """Return the configuration in run.json, without its service; None if `run_dir` has no run.json.

    Only rank 0 of `group` reads run.json. The field `store` is the path of the training store, if `training_store`
    finds it, and otherwise the absolute path in run.json. Raises UserError for a damaged run.json.
    """
    description = group.on_first(lambda: _description(run_dir))
    if description is None:
        return None
    known = {field.name for field in fields(RunConfig)}
    settings = {name: value for name, value in description["settings"].items() if name in known}
    store = training_store(run_dir, description)
    return RunConfig(
        **{
            **settings,
            "store": saved_store_path(description) if store is None else store.root,
            "recipe": recipe_from_json(description["recipe"]),
            "model": architecture_from_json(description["model"]),
            "devices": tuple(settings["devices"]),
            "run_dir": run_dir,
            "service": None,
            "service_fallback": None,
        }
    )


def _description(run_dir: Path) -> dict[str, Any] | None:
    return read_description(run_dir) if has_description(run_dir) else None


def requested_config(
    options: Mapping[str, Any],
    given: Collection[str],
    saved: RunConfig | None,
    group: ReplicaGroup = ALONE,
) -> RunConfig:
    """Return the configuration of `alextrain run`.

    options  the values of the command's options by parameter name
    given    names of the options that the user gave
    saved    the configuration of the run in --run-dir; None for a new run, for which all `options` are used
    group    the replicas that compute each step

    If the options name another recipe than that of `saved`, the named recipe also gives the batch size and the epochs.
    The options --batch and --epochs replace these values. --epochs without --steps removes the step limit of `saved`.
    Raises UserError for options that contradict each other. Sets the precision of torch.
    """
    epochs, settings = options["epochs"], options["settings"]
    if saved is None or "recipe" in given:
        recipe = recipe_with_overrides(options["recipe"], settings, epochs)
    else:
        recipe = override(saved.recipe, settings, epochs)
    other_recipe = saved is None or _base_name(saved.recipe.name) != _base_name(recipe.name)
    model = ARCHITECTURES[options["model"]] if saved is None or "model" in given else saved.model
    values: dict[str, Any] = {} if saved is None else {name: getattr(saved, name) for name in _PLAIN}
    values |= {name: options[name] for name in _PLAIN if saved is None or name in given}
    if epochs is not None and "steps" not in given:
        values["steps"] = None
    kept_batch, kept_epochs = (None, None) if saved is None or other_recipe else (saved.batch_size, saved.epochs)
    devices = _devices(options["gpus"], model.columns, saved, group)
    precision = options["precision"] or (saved.precision if saved else default_precision(recipe.name, devices))
    set_precision(precision, devices)  # an unsupported precision is refused before the run starts
    store = options["store"] if saved is None or "store" in given else saved.store
    if saved is not None and store == saved.store and not store.is_dir():
        raise UserError(missing_store_text(saved.run_dir, store))
    return RunConfig(
        store=store,
        recipe=recipe,
        model=model,
        batch_size=options["batch"] or kept_batch or recipe.batch_size,
        epochs=epochs or kept_epochs or recipe.epochs,
        precision=precision,
        devices=devices,
        run_dir=options["run_dir"],
        threads=options.get("threads"),
        replicas=group.size,
        service=options["service"],
        service_fallback=options["service_fallback"],
        **values,
    )


def _base_name(recipe_name: str) -> str:
    """Return the name of a recipe without its overrides."""
    return recipe_name.partition(",")[0]


def _devices(gpus: str | None, columns: int, saved: RunConfig | None, group: ReplicaGroup) -> Devices:
    if gpus is not None or saved is None:
        return devices_of_replica(gpus, columns, group)
    names = dict.fromkeys(device.removeprefix("cuda:") for device in saved.devices[:columns])
    try:
        saved_gpus = count_of(saved.devices[:columns]) if group.launched else ",".join(names)
        return devices_of_replica(saved_gpus, columns, group)
    except UserError as error:
        devices = devices_of_replica(None, columns, group)
        say(
            f"{saved.run_dir} was trained on {' and '.join(names)} ({error}) The run continues on "
            f"{' and '.join(devices)}."
        )
        return devices


def changed_settings(before: RunConfig, run: Run, theirs: Mapping[str, Any]) -> list[Difference]:
    """Return the settings in which `run` differs from the run with the configuration `before` and identity `theirs`."""
    changed = differences(theirs, run.identity)
    pairs = ((name, getattr(before, name), getattr(run.config, name)) for name in _SHOWN)
    return changed + [Difference(name, there, here) for name, there, here in pairs if there != here]


def difference_lines(changed: Collection[Difference]) -> list[str]:
    """Return one line for each setting that differs: `recipe.lr: 0.01 -> 0.001`."""
    return [f"  {name}: {_text(there)} -> {_text(here)}" for name, there, here in changed]


def _text(value: Any) -> str:
    text = "none" if value is None else str(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:59] + "…"

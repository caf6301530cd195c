"""torchvision's weights of AlexNet as a run at step 0: `alextrain evaluate` takes it, `alextrain run` goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.loader import train_loader
from prep.console import UserError, count_noun, say
from prep.files import hold_lock
from prep.store.manifest import Store
from train.config.recipe import Recipe
from train.config.run_config import RunConfig
from train.convert.torchvision_weights import TORCHVISIONS, Normalization, check_fits, to_ours
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs import checkpoint
from train.runs.run import Run, make_run_dir, write_description
from train.trainer.state import capture_state


def import_torchvision(file: Path, config: RunConfig, new_fc8: bool = False) -> AlexNet:
    """Make `config.run_dir` a run whose checkpoint at step 0 has the weights of `file`; returns the network.

    file     a state_dict of torchvision.models.alexnet, or what `alextrain export --to torchvision` wrote, whose own
             Normalize and classes are then heeded
    config   of a network `torchvision`; the recipe may subtract a mean of channels or none
    new_fc8  begin the last layer anew, by the recipe, for other classes than the file's

    What is exact in it says train.convert.torchvision_weights. Raises UserError for a file that is no such state_dict or has
    other classes, for a recipe or network that does not fit, and where a run is in the folder already.
    """
    run = Run.open(config)
    store, recipe = run.store, config.recipe
    check_fits(config.model, recipe)
    state, texts = _read(file)
    torch.manual_seed(config.seed)
    network = AlexNet(len(store.classes), recipe, ("cpu", "cpu"), config.model)
    try:
        parameters = to_ours(state, recipe, _normalization(texts), _mean_rgb(store, recipe))
        if new_fc8:
            parameters |= {name: tensor for name, tensor in network.joined_tensors().items() if name.startswith("fc8.")}
        else:
            _check_classes(file, parameters, texts, store)
        network.load_joined_tensors(parameters)
    except (KeyError, ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: not a state_dict of torchvision's AlexNet ({error}).") from None
    begin(run, network)
    return network


def begin(run: Run, network: AlexNet) -> None:
    """Make the run folder with a checkpoint of `network` at step 0, from which `fit` goes on.

    Raises UserError where the folder has a run, or something else.
    """
    make_run_dir(run.run_dir)
    config = run.config
    with hold_lock(run.run_dir, "training"):
        if checkpoint.checkpoint_paths(run.run_dir):
            raise UserError(f"{run.run_dir}: there is a run in it already. Name another --run-dir.")
        with train_loader(
            config.store, config.batch_size, "cpu", config.seed, augmentation=config.recipe.augmentation, threads=1
        ) as loader:
            optimizer = make_optimizer(network, config.recipe)
            torch.manual_seed(config.seed)
            state = capture_state(run, 0, network, optimizer, Schedule(config.recipe), loader, validation_due=False)
        write_description(run)
        checkpoint.CheckpointKeeper(run.run_dir, config.keep, None).save(state, is_last=True)


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """(state_dict, what an export of ours says beside it)."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}).") from None
    except Exception:  # of many kinds, some with advice that is not ours
        raise UserError(f"{file}: not a file of tensors that torch.load(weights_only=True) reads.") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file}: not a state_dict, which is a dict of tensors by name.")
    texts = getattr(state, "_metadata", {}).get("", {})
    return state, texts if "preprocessing" in texts else {}


def _normalization(texts: Mapping[str, Any]) -> Normalization:
    if not texts:
        return TORCHVISIONS
    told = json.loads(texts["preprocessing"])["normalise"]
    if not told["exact"]:
        say("Its network was trained with a mean image; the mean of that is taken in its place.")
    return Normalization(tuple(told["mean"]), tuple(told["std"]))


def _mean_rgb(store: Store, recipe: Recipe) -> tuple[float, ...]:
    how = recipe.augmentation.mean
    if how not in ("channel", "none"):
        raise UserError(
            f"recipe {recipe.name} subtracts a mean image, which conv1's biases cannot make up for. Pass --recipe "
            "modern, or --set augmentation.mean=channel."
        )
    return tuple(store.color_stats().mean_rgb) if how == "channel" else (0.0, 0.0, 0.0)


def _check_classes(file: Path, parameters: Mapping[str, Tensor], texts: Mapping[str, Any], store: Store) -> None:
    there, here = len(parameters["fc8.weight"]), len(store.classes)
    names = json.loads(texts["classes"]) if texts else None
    if there != here or names not in (None, list(store.classes)):
        first = f" ({names[0]} …)" if names else ""
        raise UserError(
            f"{file} has {count_noun(there, 'class', 'classes')}{first}, {store.root} has {here:,} "
            f"({store.classes[0]} …), not the same. Point --store at a store of the same, or pass --new-fc8."
        )

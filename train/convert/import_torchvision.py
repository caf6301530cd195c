"""Import of torchvision's AlexNet weights as a run at step 0, which can be evaluated and trained further."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
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
from train.convert.torchvision_weights import (
    IMAGENET_NORMALIZATION,
    Normalization,
    check_fits,
    from_torchvision_weights,
)
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs import checkpoint
from train.runs.run import Run, make_run_dir, write_description
from train.trainer.state import capture_state

_EXPECTED = "Name a state_dict of torchvision.models.alexnet, or a file of alextrain export --to torchvision."


def import_torchvision(file: Path, config: RunConfig, new_fc8: bool = False) -> AlexNet:
    """Create a run in `config.run_dir` with a checkpoint at step 0 that has the weights of `file`. Returns the network.

    file     a state_dict of torchvision.models.alexnet, or a file of `alextrain export --to torchvision`, which also
             contains the arguments of Normalize and the classes
    config   a configuration with the architecture `torchvision`, and with a recipe that does not subtract a mean image
    new_fc8  True: the last layer is initialized as the recipe says. False: the last layer comes from `file`, which must
             then have the classes of the store

    train/convert/torchvision_weights.py explains which conversions are exact. Raises UserError if `file` is not a
    state_dict of torchvision's AlexNet. Also raises UserError if `new_fc8` is False and the classes of `file` and store
    differ, or if the recipe or the architecture does not fit. Also raises UserError if a batch is larger than the
    training split, or if the run folder already holds a run.
    """
    run = Run.open(config)
    store, recipe = run.store, config.recipe
    check_fits(config.model, recipe)
    state, metadata = _read(file)
    torch.manual_seed(config.seed)
    network = AlexNet(len(store.classes), recipe, ("cpu", "cpu"), config.model)
    try:
        parameters = from_torchvision_weights(state, recipe, _normalization(metadata), _mean_rgb(store, recipe))
        if new_fc8:
            parameters |= {name: tensor for name, tensor in network.joined_tensors().items() if name.startswith("fc8.")}
        else:
            _check_classes(file, parameters, metadata, store)
        network.load_joined_tensors(parameters)
    except UserError:
        raise
    except Exception as error:  # tensors of other shapes and types can make torch raise any exception
        raise UserError(f"{file}: not a state_dict of torchvision's AlexNet ({error}). {_EXPECTED}") from None
    create_run(run, network)
    return network


def create_run(run: Run, network: AlexNet) -> None:
    """Write the run folder with a checkpoint of `network` at step 0. `fit` can continue from this checkpoint.

    Raises UserError if a batch is larger than the training split, or if the folder already holds a run or other files.
    """
    run.check_batch()
    make_run_dir(run.run_dir)
    config = run.config
    with hold_lock(run.run_dir, "training"):
        if checkpoint.checkpoint_paths(run.run_dir):
            raise UserError(f"{run.run_dir}: already holds a run. Name another --run-dir.")
        with train_loader(
            config.store,
            config.batch_size,
            "cpu",
            config.seed_of_stream,
            augmentation=config.recipe.augmentation,
            threads=1,
        ) as loader:
            optimizer = make_optimizer(network, config.recipe)
            torch.manual_seed(config.seed)
            # The network is on the CPU at this point.
            on_cpu = replace(run, config=replace(config, devices=("cpu", "cpu")))
            schedule = Schedule(config.recipe, config.batch_size)
            state = capture_state(on_cpu, 0, network, optimizer, schedule, loader.state_dict(), validation_due=False)
        write_description(run)
        checkpoint.CheckpointKeeper(run.run_dir, config.keep, None).save(state, is_last=True)


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
    """Return the state_dict and the metadata in a file.

    The metadata is {} if `alextrain export` did not write the file.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}). {_EXPECTED}") from None
    except Exception:  # torch.load raises many types of exceptions, some with wrong advice
        raise UserError(
            f"{file}: not a file of tensors that torch.load(weights_only=True) reads. {_EXPECTED}"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{file}: not a state_dict (a dict from names to tensors). {_EXPECTED}")
    metadata = getattr(state, "_metadata", {}).get("", {})
    return state, metadata if "preprocessing" in metadata else {}


def _normalization(metadata: Mapping[str, Any]) -> Normalization:
    if not metadata:
        return IMAGENET_NORMALIZATION
    normalization = json.loads(metadata["preprocessing"])["normalise"]
    if not normalization["exact"]:
        say("The network was trained with a mean image. The import uses only the average color of this image.")
    return Normalization(tuple(normalization["mean"]), tuple(normalization["std"]))


def _mean_rgb(store: Store, recipe: Recipe) -> tuple[float, ...]:
    mean = recipe.augmentation.mean
    if mean not in ("channel", "none"):
        raise UserError(
            f"recipe {recipe.name} subtracts a mean image, for which conv1's biases cannot compensate. Pass --recipe "
            "modern, or --set augmentation.mean=channel."
        )
    return tuple(store.color_stats().mean_rgb) if mean == "channel" else (0.0, 0.0, 0.0)


def _check_classes(file: Path, parameters: Mapping[str, Tensor], metadata: Mapping[str, Any], store: Store) -> None:
    in_file, in_store = len(parameters["fc8.weight"]), len(store.classes)
    names = json.loads(metadata["classes"]) if metadata else None
    if in_file != in_store or names not in (None, list(store.classes)):
        first = f" ({names[0]} …)" if names else ""
        raise UserError(
            f"{file} has {count_noun(in_file, 'class', 'classes')}{first}, but {store.root} has other "
            f"classes: {in_store:,} ({store.classes[0]} …). Point --store at a store with the file's classes, or pass "
            "--new-fc8."
        )

"""Import of torchvision's AlexNet weights as a run at step 0, which can be evaluated and trained further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec import Struct
from torch import Tensor

from pipeline.loader import train_loader
from prep.console import UserError, count_noun, say
from prep.files import hold_lock
from prep.schema import Finite, decode, open_regular
from prep.store.manifest import Store
from train.config.architecture import TORCHVISION_LAYERS, Architecture
from train.config.recipe import Recipe
from train.config.run_config import RunConfig
from train.convert.torchvision_weights import (
    IMAGENET_NORMALIZATION,
    Normalization,
    check_fits,
    from_torchvision_weights,
)
from train.formats.checked_load import check_finite, load_tensors
from train.formats.checkpoint_file import check_tensor
from train.formats.fields import AboveZero, Names, parameter_shapes
from train.formats.pickled_values import StoredTensor, UnsafeFile
from train.formats.torch_file import read_content
from train.model.alexnet import AlexNet
from train.optim.paper_sgd import make_optimizer
from train.optim.schedule import Schedule
from train.runs import checkpoint
from train.runs.run import Run, make_run_dir, write_description
from train.trainer.state import capture_state

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_EXPECTED = "Name a state_dict of torchvision.models.alexnet, or a file of alextrain export --to torchvision."


def import_torchvision(file: Path, config: RunConfig, new_fc8: bool = False) -> AlexNet:
    """Create a run in `config.run_dir` with a checkpoint at step 0 that has the weights of `file`. Returns the network.

    file     a state_dict of torchvision.models.alexnet, or a file of `alextrain export --to torchvision`, which also
             contains the arguments of Normalize and the classes
    config   a configuration with the architecture `torchvision`, and with a recipe that does not subtract a mean image
    new_fc8  True: the last layer is initialized as the recipe says. False: the last layer comes from `file`, which must
             then have the classes of the store

    train/convert/torchvision_weights.py explains which conversions are exact. Raises UserError if `file` is not a
    state_dict of torchvision's AlexNet, or if the recipe or the architecture does not fit. Also raises UserError if a
    batch is larger than the training split, or if the run folder already holds a run. Without `new_fc8`, also raises
    UserError if the classes of `file` differ from the classes of the store.
    """
    run = Run.open(config)
    store, recipe = run.store, config.recipe
    check_fits(config.model, recipe)
    state, metadata = _read(file, config.model)
    torch.manual_seed(config.seed)
    network = AlexNet(len(store.classes), recipe, ("cpu", "cpu"), config.model)
    parameters = from_torchvision_weights(state, recipe, _normalization(metadata), _mean_rgb(store, recipe))
    if new_fc8:
        parameters |= {name: tensor for name, tensor in network.joined_tensors().items() if name.startswith("fc8.")}
    else:
        _check_classes(file, parameters, metadata, store)
    check_finite(parameters, f"{file}: converted", _EXPECTED)
    network.load_joined_tensors(parameters)
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
            augmentation=config.recipe.augmentation.for_stream(),
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


def _read(file: Path, architecture: Architecture) -> tuple[dict[str, Tensor], _Metadata | None]:
    """Return the state_dict and the metadata of a file. If `alextrain export` did not write the file, metadata is None.

    Names, shapes and types of the tensors are compared with torchvision's AlexNet before a tensor is allocated.
    """
    try:
        with open_regular(file, _EXPECTED) as opened:
            content = read_content(opened)
            if not isinstance(content, dict) or not all(isinstance(part, StoredTensor) for part in content.values()):
                raise UserError(f"{file}: not a state_dict (a dict from names to tensors). {_EXPECTED}")
            _check_tensors(file, content, architecture)
            state = load_tensors(opened, content, str(file), _EXPECTED)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error}). {_EXPECTED}") from None
    except UnsafeFile as error:
        raise UserError(f"{file}: not a file of tensors: {error}. {_EXPECTED}") from None
    check_finite(state, str(file), _EXPECTED)
    return state, _metadata(file, getattr(content, "attributes", {}))


def _check_tensors(file: Path, content: Mapping[str, StoredTensor], architecture: Architecture) -> None:
    """Raise UserError unless the names, shapes and types of the tensors are those of torchvision's AlexNet."""
    classes = content["classifier.6.bias"].shape[:1] if "classifier.6.bias" in content else ()
    shapes = parameter_shapes(architecture, crossing=True, classes=classes[0] if classes else 1000)
    expected = {
        f"{name}.{kind}": shapes[f"{layer}.{kind}"]
        for name, layer in TORCHVISION_LAYERS.items()
        for kind in ("weight", "bias")
    }
    differing = [name for name in (*expected, *content) if name not in content or name not in expected]
    if differing:
        has = "has" if differing[0] in content else "lacks"
        raise UserError(f"{file}: not a state_dict of torchvision's AlexNet ({has} {differing[0]:.60}). {_EXPECTED}")
    for name, shape in expected.items():
        check_tensor(
            content[name], _FLOATS, shape, f"{file}: not a state_dict of torchvision's AlexNet: {name}", _EXPECTED
        )


class _Normalise(Struct, frozen=True):
    """Arguments of torchvision.transforms.Normalize, and whether the normalization is exact."""

    mean: tuple[Finite, Finite, Finite]
    std: tuple[AboveZero, AboveZero, AboveZero]
    exact: bool


class _Preprocessing(Struct, frozen=True):
    normalise: _Normalise


class _Metadata(NamedTuple):
    """What `alextrain export` writes in addition to the weights."""

    normalization: _Normalise
    classes: list[str]


def _metadata(file: Path, attributes: Mapping[str, Any]) -> _Metadata | None:
    """Return the metadata that `alextrain export` wrote. `attributes` are the attributes of a state_dict."""
    modules = attributes.get("_metadata")
    metadata = modules.get("") if isinstance(modules, dict) else None
    if not isinstance(metadata, dict) or "preprocessing" not in metadata:
        return None
    texts = {}
    for name in ("preprocessing", "classes"):
        if not isinstance(metadata.get(name), str):
            raise UserError(f"{file}: the metadata have no text {name}. {_EXPECTED}")
        texts[name] = metadata[name].encode(errors="surrogatepass")
    normalise = decode(_Preprocessing, texts["preprocessing"], f"{file}: preprocessing", _EXPECTED).normalise
    return _Metadata(normalise, decode(Names, texts["classes"], f"{file}: classes", _EXPECTED))


def _normalization(metadata: _Metadata | None) -> Normalization:
    if metadata is None:
        return IMAGENET_NORMALIZATION
    normalization = metadata.normalization
    if not normalization.exact:
        say("The network was trained with a mean image. The import uses only the average color of this image.")
    return Normalization(normalization.mean, normalization.std)


def _mean_rgb(store: Store, recipe: Recipe) -> tuple[float, ...]:
    mean = recipe.augmentation.mean
    if mean not in ("channel", "none"):
        raise UserError(
            f"recipe {recipe.name} subtracts a mean image, for which conv1's biases cannot compensate. Pass --recipe "
            "modern, or --set augmentation.mean=channel."
        )
    return tuple(store.color_stats().mean_rgb) if mean == "channel" else (0.0, 0.0, 0.0)


def _check_classes(file: Path, parameters: Mapping[str, Tensor], metadata: _Metadata | None, store: Store) -> None:
    in_file, in_store = len(parameters["fc8.weight"]), len(store.classes)
    names = None if metadata is None else metadata.classes
    if in_file != in_store or names not in (None, list(store.classes)):
        first = f" ({names[0]} …)" if names else ""
        raise UserError(
            f"{file} has {count_noun(in_file, 'class', 'classes')}{first}, but {store.root} has other "
            f"classes: {in_store:,} ({store.classes[0]} …). Point --store at a store with the file's classes, or pass "
            "--new-fc8."
        )

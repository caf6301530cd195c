"""What the layers say of pictures: the activations of any layer, of single pictures or of a whole split.

The activations of conv1 to fc7 are those after the nonlinearity, before normalization, pooling and dropout's scaling;
those of fc8 are the logits. Both columns' are joined, column 0's first, as in the joined parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.loader import eval_loader
from pipeline.records import Records
from prep.console import UserError, disk_error, one_line, progress
from prep.files import atomic_file, write_atomic
from prep.store.manifest import Store
from train.config.architecture import LAYERS
from train.evaluation.evaluate import batch_of
from train.model.alexnet import ACTIVATION_FUNCTIONS, AlexNet
from train.model.modes import evaluation_mode
from train.model.precision import autocast, set_precision


@contextmanager
def tapped(model: AlexNet, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Inside, each forward pass leaves the activations of `layers` here: one tensor for each column.

    conv layers (N, maps, rows, columns), full ones (N, units). Raises UserError for a layer that is not one of LAYERS.
    """
    unknown = [layer for layer in layers if layer not in LAYERS]
    if unknown:
        raise UserError(f"--layer {unknown[0]}: expected one of {', '.join(LAYERS)}.")
    found: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    activation = ACTIVATION_FUNCTIONS[model.recipe.activation]

    def keep(layer: str, place: int) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            said = output.detach().clone()  # the model goes on in place
            said = said if layer == "fc8" else activation(said)
            if place == 0:
                found[layer].clear()
            found[layer].append(said.flatten(1) if layer.startswith("fc") else said)

        return hook

    hooks = []
    for layer in layers:
        modules = [model.fc8] if layer == "fc8" else [column.get_submodule(layer) for column in model.columns]
        hooks += [module.register_forward_hook(keep(layer, place)) for place, module in enumerate(modules)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def activations(model: AlexNet, images: Tensor, layers: Sequence[str], precision: str = "fp32") -> dict[str, Tensor]:
    """float32 (N, …) of each layer, on the CPU, both columns joined; the model is in its evaluation mode for it."""
    with evaluation_mode(model), tapped(model, layers) as found, autocast(precision, model.devices[0]):
        model(images)
    return {layer: torch.cat([part.float().cpu() for part in parts], dim=1) for layer, parts in found.items()}


def split_activations(
    model: AlexNet,
    store: Store,
    split: str,
    layer: str,
    most: int | None = None,
    precision: str = "fp32",
) -> Iterator[npt.NDArray[np.float32]]:
    """The activations of a layer for a split's records in the store's order, by their centre view, batch by batch.

    Ends after the first `most`: a random sample, for the order of a store is that of a hash. Shows progress. Raises as
    the loaders, and UserError as `tapped`.
    """
    device = str(model.devices[0])
    set_precision(precision, model.devices)
    records = store.split(split).records
    left = wanted = min(records, most or records)
    batch = batch_of(records, 1, device)
    loader = eval_loader(store.root, batch, device, split=split, augmentation=model.recipe.augmentation)
    with loader, progress(f"{layer} of {split}", wanted, "images") as report:
        for images, _ in loader:
            found = activations(model, images[:left], [layer], precision)[layer].numpy()
            left -= len(found)
            report.advance(len(found))
            yield found
            if not left:
                return


def write_features(
    model: AlexNet, store: Store, split: str, layer: str, out: Path, precision: str = "fp32"
) -> tuple[int, ...]:
    """Write a layer's activations as .npy, float32 (N, …), and keys beside it (keys_path); returns the shape.

    A line of keys for each row: key, class, source path, with tabs between. Raises UserError where they cannot be
    written.
    """
    if out.suffix != ".npy":
        raise UserError(f"--out {out}: features are written as .npy. Name it {out.with_suffix('.npy')}.")
    records, keys = store.split(split).records, Records(store, split)
    shape: tuple[int, ...] = ()
    try:
        with atomic_file(out) as file:
            for found in split_activations(model, store, split, layer, None, precision):
                if not shape:
                    shape = (records, *found.shape[1:])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(found, "<f4").tobytes())
        lines = [
            "\t".join((keys.key(k), one_line(store.classes[keys[k].label]), one_line(keys.source(k))))
            for k in range(records)
        ]
        write_atomic(keys_path(out), "".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise disk_error(error, f"--out {out}: {error.strerror or error}.") from None
    finally:
        keys.close()
    return shape


def keys_path(out: Path) -> Path:
    """F.npy's keys are in F.keys.txt."""
    return out.with_name(out.stem + ".keys.txt")

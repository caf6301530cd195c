"""Activations of any layer: captured in a forward pass, computed for all images of a split, or written to a .npy file.

For conv1 to fc7, the activations are the layer's output after the nonlinearity, but before normalization, pooling and
the scaling of dropout. For fc8, the activations are the logits. `compute_activations` concatenates the activations of
both columns, column 0 first. The parameters in AlexNet.joined_tensors are concatenated in the same way.
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
from prep.console import WrongArgument, did_you_mean, disk_error, escaped, progress
from prep.files import atomic_file, check_extension, write_atomic
from prep.store.manifest import Store
from train.config.architecture import LAYERS
from train.evaluation.evaluate import eval_batch_size
from train.model.alexnet import AlexNet
from train.model.layers import ACTIVATION_FUNCTIONS
from train.model.modes import evaluation_mode
from train.model.precision import autocast, set_precision


@contextmanager
def capture_activations(network: AlexNet, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Return a context in which each forward pass writes the activations of `layers` into the yielded dict.

    The keys of the dict are the names of the layers. Each value is a list with one tensor per column of the network.
    For fc8, the list has only one tensor. The tensor of a conv layer has shape (N, maps, height, width), and the tensor
    of a fully connected layer has shape (N, units). Raises UserError for a layer that is not one of LAYERS.
    """
    unknown = [layer for layer in layers if layer not in LAYERS]
    if unknown:
        raise WrongArgument(
            f"--layer {unknown[0]}: expected one of {', '.join(LAYERS)}.{did_you_mean(unknown[0], LAYERS)}"
        )
    captured: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    nonlinearity = ACTIVATION_FUNCTIONS[network.recipe.activation]

    def make_hook(layer: str, column: int) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            # The output is copied, because the nonlinearity of the network overwrites `output`.
            value = output.detach().clone()
            value = value if layer == "fc8" else nonlinearity(value)
            if column == 0:
                captured[layer].clear()
            captured[layer].append(value.flatten(1) if layer.startswith("fc") else value)

        return hook

    handles = []
    for layer in layers:
        modules = [network.fc8] if layer == "fc8" else [column.get_submodule(layer) for column in network.columns]
        handles += [module.register_forward_hook(make_hook(layer, column)) for column, module in enumerate(modules)]
    network.layer_by_layer = True  # the fused kernels of a GPU do not call the modules
    try:
        yield captured
    finally:
        network.layer_by_layer = False
        for handle in handles:
            handle.remove()


def compute_activations(
    network: AlexNet, images: Tensor, layers: Sequence[str], precision: str = "fp32"
) -> dict[str, Tensor]:
    """Return the activations of `images` by layer, computed in evaluation mode.

    The tensor of a layer is float32 (N, …), on the CPU, with the columns concatenated.
    """
    with (
        evaluation_mode(network),
        capture_activations(network, layers) as captured,
        autocast(precision, network.devices[0]),
    ):
        network(images)
    return {layer: torch.cat([part.float().cpu() for part in parts], dim=1) for layer, parts in captured.items()}


def iter_split_activations(
    network: AlexNet,
    store: Store,
    split: str,
    layer: str,
    max_records: int | None = None,
    precision: str = "fp32",
) -> Iterator[npt.NDArray[np.float32]]:
    """Yield a layer's activations for the centre crops of a split: one array per batch, in the order of the store.

    Only the first `max_records` records are used; by default, all records are used. The first records are a random
    sample, because the records of a store are sorted by a hash. Shows progress. Raises the errors of set_precision,
    eval_loader and `capture_activations`.
    """
    device = str(network.devices[0])
    set_precision(precision, network.devices)
    records = store.split(split).records
    left = wanted = min(records, max_records or records)
    batch_size = eval_batch_size(records, 1, device)
    loader = eval_loader(
        store.root, batch_size, device, split=split, augmentation=network.recipe.augmentation.for_stream()
    )
    with loader, progress(f"{layer} of {split}", wanted, "images") as counter:
        for images, _ in loader:
            batch = compute_activations(network, images[:left], [layer], precision)[layer].numpy()
            left -= len(batch)
            counter.advance(len(batch))
            yield batch
            if not left:
                return


def write_features(
    network: AlexNet, store: Store, split: str, layer: str, out: Path, precision: str = "fp32"
) -> tuple[int, ...]:
    """Write a layer's activations for a split to the .npy file `out`, float32 (N, …). Returns the shape of the array.

    The text file `keys_path(out)` gets a line for each row of the array: key, class and source path, separated by tabs.
    Raises UserError if a file cannot be written. Also raises the errors of `iter_split_activations`.
    """
    check_extension(out, "--out", [".npy"], "features are written as")
    records, stored = store.split(split).records, Records(store, split)
    shape: tuple[int, ...] = ()
    try:
        with atomic_file(out) as file:
            for batch in iter_split_activations(network, store, split, layer, None, precision):
                if not shape:
                    shape = (records, *batch.shape[1:])
                    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                file.write(np.ascontiguousarray(batch, "<f4").tobytes())
        lines = [
            "\t".join((stored.key(k), escaped(store.classes[stored.label(k)]), escaped(stored.source(k))))
            for k in range(records)
        ]
        write_atomic(keys_path(out), "".join(line + "\n" for line in lines).encode())
    except OSError as error:
        raise disk_error(error, f"--out {out}: {error.strerror or error}.") from None
    finally:
        stored.close()
    return shape


def keys_path(out: Path) -> Path:
    """Return the path of the text file that belongs to `out`: F.keys.txt for F.npy."""
    return out.with_name(out.stem + ".keys.txt")

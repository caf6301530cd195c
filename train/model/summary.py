"""Table of layers for `alextrain summary`: shapes, parameters and multiply-adds, computed on torch's meta device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pipeline.augment import CROP_PX
from prep.console import count_noun
from train.config.architecture import ALEXNET, LAYERS, Architecture
from train.config.recipe import Recipe
from train.config.recipes import PAPER
from train.model.alexnet import AlexNet


@dataclass(frozen=True)
class LayerRow:
    """One row of the table, for one layer. `neurons`, `parameters` and `multiply_adds` are sums over the columns."""

    layer: str
    columns: int  # number of columns that share the layer; 1 for fc8, which is computed on the device of column 0
    output_per_column: tuple[int, ...]  # shape of the output of one column, without the batch dimension
    sees: str  # source of the input: "image", "own column" or "both columns"; "all" in a network of one column
    neurons: int
    parameters: int
    multiply_adds: int  # number of multiply-adds for one image


def summarize(classes: int, architecture: Architecture = ALEXNET, recipe: Recipe = PAPER) -> list[LayerRow]:
    """Return a row for each layer that has parameters, for images of 224 px."""
    network = AlexNet(classes, recipe, ("meta", "meta"), architecture)
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def record_shape(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        shapes[module] = tuple(output.shape[1:])

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(record_shape)
    network.eval()(torch.zeros(1, 3, CROP_PX, CROP_PX, device="meta"))

    parameters = network.parameters_by_joined_name()
    rows = []
    own_maps = 3  # number of maps or units of the previous layer in one column; for conv1: channels of the image
    for name in LAYERS:
        first = network.fc8 if name == "fc8" else network.columns[0].get_submodule(name)
        assert isinstance(first, nn.Conv2d | nn.Linear)
        weights = parameters[f"{name}.weight"]
        inputs, outputs = first.weight.shape[1], shapes[first]
        sees = "all" if architecture.columns == 1 else "both columns" if inputs > own_maps else "own column"
        positions = math.prod(outputs[1:])
        own_maps = outputs[0] * (36 if name == "conv5" else 1)  # fc6 sees the 6 × 6 values of each map of pool5
        rows.append(
            LayerRow(
                layer=name,
                columns=len(weights),
                output_per_column=outputs,
                sees="image" if name == "conv1" else sees,
                neurons=len(weights) * math.prod(outputs),
                parameters=sum(p.numel() for kind in ("weight", "bias") for p in parameters[f"{name}.{kind}"]),
                multiply_adds=sum(w.numel() for w in weights) * positions,
            )
        )
    return rows


def summary_json(classes: int, devices: tuple[str, str], architecture: Architecture = ALEXNET) -> dict[str, Any]:
    """Return the table and its totals as a dict, for `alextrain summary --json`."""
    rows = summarize(classes, architecture)
    return {
        "model": architecture.name,
        "classes": classes,
        "layers": [{**asdict(row), "devices": list(devices[: row.columns])} for row in rows],
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
    }


def size_text(rows: Sequence[LayerRow], classes: int) -> str:
    """Return a text with the number of parameters of a network: `58,285,954 parameters for 10 classes`."""
    parameters = sum(row.parameters for row in rows)
    return f"{count_noun(parameters, 'parameter')} for {count_noun(classes, 'class', 'classes')}"


def summary_lines(classes: int, devices: tuple[str, str], architecture: Architecture = ALEXNET) -> list[str]:
    """Return the table as text lines, with the device of each column."""
    rows = summarize(classes, architecture)
    lines = [
        f"{architecture.name}: {architecture.source}",
        size_text(rows, classes),
        f"{'layer':6} {'output':>19}  {'sees':12} {'neurons':>9} {'parameters':>12} {'multiply-adds':>14}  on",
    ]
    for row in rows:
        shape = " × ".join(map(str, row.output_per_column))
        on = " and ".join(f"column {c} ({devices[c]})" for c in range(row.columns))
        times = f"{row.columns} × " if row.columns > 1 else ""
        lines.append(
            f"{row.layer:6} {times + shape:>19}  {row.sees:12} {row.neurons:9,} {row.parameters:12,} "
            f"{row.multiply_adds:14,}  {on if architecture.columns > 1 else devices[0]}"
        )
    neurons, parameters = sum(row.neurons for row in rows), sum(row.parameters for row in rows)
    total = sum(row.multiply_adds for row in rows)
    lines.append(f"{'total':6} {'':19}  {'':12} {neurons:9,} {parameters:12,} {total:14,}")
    lines.append(
        "Multiply-adds are counted in the forward pass for one image; a training step needs about three times as many "
        "per image."
    )
    return lines

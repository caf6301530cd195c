"""The table of layers, measured on the network itself without memory for its parameters (torch's meta device)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pipeline.augment import CROP_PX
from train.config.architecture import ALEXNET, LAYERS, Architecture
from train.config.recipe import Recipe
from train.config.recipes import PAPER
from train.model.alexnet import AlexNet


@dataclass(frozen=True)
class LayerRow:
    """One layer, all columns together unless the name says otherwise."""

    layer: str
    columns: int  # fc8 has one: it is computed on column 0's device alone
    output_per_column: tuple[int, ...]  # without the batch
    sees: str  # "image", "own column", "both columns", or "all" of a network of one column
    neurons: int
    parameters: int
    multiply_adds: int  # for one image


def summarize(classes: int, architecture: Architecture = ALEXNET, recipe: Recipe = PAPER) -> list[LayerRow]:
    """One row for each layer with parameters, of an architecture for `classes` classes, for a window of 224 px."""
    model = AlexNet(classes, recipe, ("meta", "meta"), architecture)
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def remember(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        shapes[module] = tuple(output.shape[1:])

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(remember)
    model.eval()(torch.zeros(1, 3, CROP_PX, CROP_PX, device="meta"))

    joined = model.parameters_by_joined_name()
    rows = []
    before = 3
    for name in LAYERS:
        first = model.fc8 if name == "fc8" else model.columns[0].get_submodule(name)
        assert isinstance(first, nn.Conv2d | nn.Linear)
        weights = joined[f"{name}.weight"]
        inputs, outputs = first.weight.shape[1], shapes[first]
        others = "all" if architecture.columns == 1 else "both columns" if inputs > before else "own column"
        positions = math.prod(outputs[1:])
        before = outputs[0] * (36 if name == "conv5" else 1)  # conv5 goes into fc6 as 6×6 maps
        rows.append(
            LayerRow(
                layer=name,
                columns=len(weights),
                output_per_column=outputs,
                sees="image" if name == "conv1" else others,
                neurons=len(weights) * math.prod(outputs),
                parameters=sum(p.numel() for kind in ("weight", "bias") for p in joined[f"{name}.{kind}"]),
                multiply_adds=sum(w.numel() for w in weights) * positions,
            )
        )
    return rows


def summary_json(classes: int, devices: tuple[str, str], architecture: Architecture = ALEXNET) -> dict[str, Any]:
    """The table and its totals, for --json."""
    rows = summarize(classes, architecture)
    return {
        "model": architecture.name,
        "classes": classes,
        "layers": [{**asdict(row), "devices": list(devices[: row.columns])} for row in rows],
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
    }


def summary_lines(classes: int, devices: tuple[str, str], architecture: Architecture = ALEXNET) -> list[str]:
    """The table as text."""
    rows = summarize(classes, architecture)
    lines = [
        f"{architecture.name}: {architecture.source}",
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
    lines.append("For one image, forward; a training step costs about three times the multiply-adds.")
    return lines

"""The table of layers, measured on the network itself without memory for its parameters (torch's meta device)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from pipeline.augment import WINDOW_PX
from train.model import COLUMNS, LAYERS, AlexNet
from train.recipe import PAPER


@dataclass(frozen=True)
class LayerRow:
    """One layer, both columns together unless the name says otherwise."""

    layer: str
    columns: int  # fc8 has one: it is computed on column 0's device alone
    output_per_column: tuple[int, ...]  # without the batch
    sees: str  # "own column", "both columns", "image"
    parameters: int
    multiply_adds: int  # for one image


def summarise(classes: int) -> list[LayerRow]:
    """One row for each layer with parameters, of the paper's network for `classes` classes."""
    model = AlexNet(classes, PAPER, ("meta", "meta"))
    shapes: dict[nn.Module, tuple[int, ...]] = {}

    def remember(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        shapes[module] = tuple(output.shape[1:])

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(remember)
    model.eval()(torch.zeros(1, 3, WINDOW_PX, WINDOW_PX, device="meta"))

    joined = model.by_joined_name()
    rows = []
    before = 3
    for name in LAYERS:
        first = model.fc8 if name == "fc8" else model.columns[0].get_submodule(name)
        assert isinstance(first, nn.Conv2d | nn.Linear)
        weights = joined[f"{name}.weight"]
        inputs, outputs = first.weight.shape[1], shapes[first]
        sees = "image" if name == "conv1" else "both columns" if inputs > before else "own column"
        positions = math.prod(outputs[1:])
        before = outputs[0] * (36 if name == "conv5" else 1)  # conv5 goes into fc6 as 6×6 maps
        rows.append(
            LayerRow(
                layer=name,
                columns=len(weights),
                output_per_column=outputs,
                sees=sees,
                parameters=sum(p.numel() for kind in ("weight", "bias") for p in joined[f"{name}.{kind}"]),
                multiply_adds=sum(w.numel() for w in weights) * positions,
            )
        )
    return rows


def summary_json(classes: int, devices: tuple[str, str]) -> dict[str, Any]:
    """The table and its totals, for --json."""
    rows = summarise(classes)
    return {
        "classes": classes,
        "layers": [{**asdict(row), "devices": list(devices[: row.columns])} for row in rows],
        "parameters": sum(row.parameters for row in rows),
        "multiply_adds": sum(row.multiply_adds for row in rows),
    }


def summary_lines(classes: int, devices: tuple[str, str]) -> list[str]:
    """The table as text."""
    rows = summarise(classes)
    lines = [f"{'layer':6} {'output':>19}  {'sees':12} {'parameters':>12} {'multiply-adds':>14}  on"]
    for row in rows:
        shape = " × ".join(map(str, row.output_per_column))
        on = " and ".join(f"column {c} ({devices[c]})" for c in range(row.columns))
        times = f"{COLUMNS} × " if row.columns == COLUMNS else ""
        lines.append(
            f"{row.layer:6} {times + shape:>19}  {row.sees:12} {row.parameters:12,} {row.multiply_adds:14,}  {on}"
        )
    lines.append(
        f"{'total':6} {'':19}  {'':12} {sum(r.parameters for r in rows):12,} {sum(r.multiply_adds for r in rows):14,}"
    )
    lines.append("For one image, forward; a training step costs about three times the multiply-adds.")
    return lines

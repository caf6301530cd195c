"""Interface of the engines, and the choice of an engine for a device.

An engine turns records into augmented images. CpuEngine crops, flips and normalizes with a compiled C kernel,
DaliEngine with a DALI graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pipeline.augment import Augmenter, Crops
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import DaliEngine, OutputFormat
from pipeline.placement import Placement
from pipeline.records import Record


class Engine(Protocol):
    """Interface that pipeline.prefetch requires of an engine."""

    def define_graph(self) -> Any:
        """The DALI nodes for `Pipeline.set_outputs`; None if the engine needs no DALI."""

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        """The values of the graph inputs, by name of the input. Each input has one value for each record."""

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        """The images of a batch, made from the graph's outputs."""

    def close(self) -> None:
        """Stop threads and release memory."""


def choose_engine(augmenter: Augmenter, placement: Placement, output: OutputFormat, threads: int) -> Engine:
    """A CpuEngine for a CPU if the C kernel is available (kernels.native); otherwise a DaliEngine."""
    if placement.device_id is None and kernels.native is not None:
        return CpuEngine(augmenter, kernels.native, output, threads)
    return DaliEngine(augmenter, placement, output)

"""Interface of the engines, which turn records into augmented images, and the choice between the two.

CpuEngine crops with a compiled kernel; DaliEngine does everything in a DALI graph.
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
    """What pipeline.prefetch requires of an engine."""

    def define_graph(self) -> Any:
        """The DALI nodes for `Pipeline.set_outputs`; None if the engine needs no DALI."""

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        """Values for the graph's external sources, by name; one for each record."""

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        """The images of a batch, made of the graph's outputs for it."""

    def close(self) -> None:
        """Release threads and memory."""


def choose_engine(augmenter: Augmenter, placement: Placement, output: OutputFormat, threads: int) -> Engine:
    """A CpuEngine on a CPU where the kernel could be compiled, else a DaliEngine."""
    if placement.device_id is None and kernels.native is not None:
        return CpuEngine(augmenter, kernels.native, output, threads)
    return DaliEngine(augmenter, placement, output)

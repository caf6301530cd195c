"""What makes images of records: our kernel on a CPU where it could be compiled, else a DALI graph."""

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
    """What a Prefetcher needs of it."""

    def define_graph(self) -> Any:
        """The DALI nodes that it needs, for `Pipeline.set_outputs`; None where it needs no DALI."""

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        """What the nodes are fed with, by name: one for each picture."""

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        """The images of a batch, of what the nodes gave for it."""

    def close(self) -> None:
        """Give back threads and memory."""


def choose_engine(augmenter: Augmenter, placement: Placement, form: OutputFormat, threads: int) -> Engine:
    """The engine for images of `form` on `placement`."""
    if placement.device_id is None and kernels.native is not None:
        return CpuEngine(augmenter, kernels.native, form, threads)
    return DaliEngine(augmenter, placement, form)

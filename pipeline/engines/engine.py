"""What makes images of records: our kernel on a CPU where it could be compiled, else a DALI graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from pipeline.augment import Augmenter, Cuts
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import Cutter
from pipeline.engines.dali_engine import Form, Graph
from pipeline.placement import Placement
from pipeline.records import Record


class Engine(Protocol):
    """What a Feed needs of it."""

    def nodes(self) -> Any:
        """The DALI nodes that it needs, for `Pipeline.set_outputs`; None where it needs no DALI."""

    def inputs(self, records: Sequence[Record], cuts: Cuts) -> dict[str, Any]:
        """What the nodes are fed with, by name: one for each picture."""

    def images(self, outputs: tuple[Any, ...], records: Sequence[Record], cuts: Cuts) -> torch.Tensor:
        """The images of a batch, of what the nodes gave for it."""

    def close(self) -> None:
        """Give back threads and memory."""


def engine_for(augmenter: Augmenter, placement: Placement, form: Form, threads: int) -> Engine:
    """The engine for images of `form` on `placement`."""
    if placement.device_id is None and kernels.native is not None:
        return Cutter(augmenter, kernels.native, form, threads)
    return Graph(augmenter, placement, form)

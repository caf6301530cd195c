"""Interface of the engines, and the choice of an engine for a device.

An engine turns records into augmented images. CpuEngine decodes, crops, flips and normalizes with a compiled C kernel.
DaliEngine does the same with a DALI graph, RawGpuEngine with a Triton kernel, and DaliWindowEngine with both.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from pipeline.augment import Augmenter, Crops
from pipeline.device import Placement
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import DaliEngine, OutputFormat
from pipeline.engines.dali_window_engine import DaliWindowEngine
from pipeline.engines.device_stream import DeviceStream, open_stream
from pipeline.engines.raw_gpu_engine import RawGpuEngine
from pipeline.records import RecordBatch


class Engine(Protocol):
    """Interface that pipeline.prefetch requires of an engine.

    Batches are finished in the order in which they were started.
    """

    uses_dali: bool
    stream: DeviceStream  # computes the images: a CUDA stream, or InOrderStream on a CPU

    def define_graph(self) -> Any:
        """Return the DALI nodes for `Pipeline.set_outputs`. This method is called only if the engine uses DALI."""

    def graph_inputs(self, records: RecordBatch, crops: Crops) -> dict[str, Any]:
        """Return the values of the graph's inputs by their names. Each input has one value for each record."""

    def start(self, records: RecordBatch, crops: Crops) -> Any:
        """Start to compute a batch, and return at once. This method is called only if the engine does not use DALI."""

    def finish(self, outputs: Any, records: RecordBatch, crops: Crops) -> torch.Tensor:
        """Return the images of a batch, from the outputs of the graph or from the result of `start`.

        An event that is recorded on `stream` after this call passes when the images are complete. An engine without
        DALI raises DecodeError for a record that cannot be decoded.
        """

    def close(self) -> None:
        """Stop threads and release memory."""


def choose_engine(augmenter: Augmenter, placement: Placement, output: OutputFormat, threads: int) -> Engine:
    """Return the engine for a device.

    On a GPU, the engine is a RawGpuEngine for raw records. For JPEG records, the engine is a DaliWindowEngine if the
    images have effects, and otherwise a DaliEngine. On a CPU, the engine is a CpuEngine if the C kernel can read the
    records (pipeline.engines.kernels). Otherwise, the engine on a CPU is a RawGpuEngine for resized regions and for
    images with effects, and a DaliEngine for all other images.
    """
    kernel, stream = kernels.native, open_stream(placement)
    if placement.device_id is not None and augmenter.is_raw:
        return RawGpuEngine(augmenter, stream, output, threads)
    if placement.device_id is None and kernel is not None and (augmenter.is_raw or kernel.jpeg is not None):
        return CpuEngine(augmenter, kernel, output, threads)
    if placement.device_id is None and (output.is_resized or output.has_effects):
        return RawGpuEngine(augmenter, stream, output, threads)
    if output.has_effects:
        return DaliWindowEngine(augmenter, placement, output, stream)
    return DaliEngine(augmenter, placement, output, stream)

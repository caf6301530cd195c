"""Images with effects, from JPEG records on a GPU. DALI decodes windows, and kernels of PyTorch and Triton do the rest.

The effects need uint8 pixels, so the graph ends with the windows. Jitter, grey, blur and erase are PyTorch operators
(pipeline.effects.batch). CropFinisher flips and normalizes.
"""

from __future__ import annotations

from typing import Any

import torch

from pipeline.augment import Augmenter, Crops
from pipeline.device import Placement
from pipeline.engines.dali_engine import Node, OutputFormat, decode_crop, decode_inputs
from pipeline.engines.device_stream import DeviceStream
from pipeline.engines.finish_crops import CropFinisher
from pipeline.records import RecordBatch


class DaliWindowEngine:
    """Computes training images with effects from JPEG records: one window of each record."""

    uses_dali = True

    def __init__(self, augmenter: Augmenter, placement: Placement, output: OutputFormat, stream: DeviceStream) -> None:
        self.stream, self._placement, self._output = stream, placement, output
        self._finisher = CropFinisher(augmenter, output, output.crop_px, stream)

    def define_graph(self) -> Node:
        """Return the DALI node of the windows, uint8 (side, side, 3)."""
        return decode_crop(self._placement, self._output.crop_px, self._output.is_resized)

    def graph_inputs(self, records: RecordBatch, crops: Crops) -> dict[str, Any]:
        """Return the values of the graph's inputs by their names. Each input has one value for each record."""
        return decode_inputs(records, crops)

    def start(self, records: RecordBatch, crops: Crops) -> Any:
        """This method is never called, because the prefetcher runs the graph."""
        raise NotImplementedError

    def finish(self, outputs: tuple[Any, ...], records: RecordBatch, crops: Crops) -> torch.Tensor:
        """Queue the computation of the images. The windows are copied, because DALI reuses the memory of its output."""
        side = self._output.crop_px
        windows = self.stream.empty((len(records.numbers), side, side, 3), torch.uint8)
        self.stream.run(lambda: windows.copy_(self._placement.tensor_from_dali(outputs[0])))
        return self._finisher.make_images(windows, crops, self.stream)

    def close(self) -> None:
        """Does nothing, because the engine has no threads and no memory to release."""

"""Raw records on a GPU: threads copy pixels into pinned memory, and the GPU computes the images from these pixels.

For one crop of each record, the threads copy only this crop. For ten views, the threads copy the complete central
square. A side stream (device_stream.py) copies the pixels to the GPU and computes the images from them
(finish_crops.py), while the consumer's kernels run. Blocks of pinned memory are reused, because allocating pinned
memory takes longer than a batch.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment import Augmenter, Crops
from pipeline.engines import kernels
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.device_stream import DeviceStream, Event
from pipeline.engines.finish_crops import CropFinisher
from pipeline.engines.kernels import BatchJob
from pipeline.records import RecordBatch

# On the CPU of an H200 machine, one thread copies 24,000 images/s. Four threads copy 77,000 images/s, which is more
# than a GPU needs.
_MAX_THREADS = 8
_WAITING_BLOCKS = 2  # when this number of blocks have been given back, the oldest of these blocks is reused


class _Started(NamedTuple):
    """A batch whose pixels the threads copy."""

    block: Tensor  # uint8, at least as large as `pixels`
    pixels: Tensor  # uint8 (N, square, square, 3), in the memory of `block`
    futures: list[Future[None]]


class RawGpuEngine:
    """Computes the formula of pipeline.augment for raw records with a DeviceStream."""

    uses_dali = False

    def __init__(self, augmenter: Augmenter, stream: DeviceStream, output: OutputFormat, threads: int) -> None:
        """Start `threads` threads, at most 8, that copy pixels."""
        self.stream, self._views, self._dtype = stream, output.views, output.dtype
        self._square_px = output.crop_px if output.views == 1 else augmenter.side_px
        self._finisher = CropFinisher(augmenter, output, self._square_px, stream)
        self._blocks = BlockPool(stream)
        self._threads = min(threads, _MAX_THREADS)
        self._pool = ThreadPoolExecutor(self._threads, "alexstream-copy")

    def define_graph(self) -> None:
        """The engine has no DALI graph."""

    def graph_inputs(self, records: RecordBatch, crops: Crops) -> dict[str, Any]:
        """Return no inputs, because the engine has no DALI graph."""
        return {}

    def start(self, records: RecordBatch, crops: Crops) -> _Started:
        """Let the threads copy the pixels of a batch to a block.

        Waits only if the GPU is still copying from the block.
        """
        shape = (len(records.numbers), self._square_px, self._square_px, 3)
        corner = crops.origin if self._views > 1 else crops.origin + crops.offset[:, 0]
        block = self._blocks.take(int(np.prod(shape)))
        pixels = block[: int(np.prod(shape))].view(shape)
        threads = min(self._threads, len(records.numbers))
        return _Started(block, pixels, _copy_squares(self._pool, threads, records, corner, pixels.numpy()))

    def finish(self, started: _Started, records: RecordBatch, crops: Crops) -> Tensor:
        """Wait for the threads, and queue the computation of the images on the stream.

        The images are (N, 3, side, side), or (N, 10, 3, side, side) for ten views. With layout "NHWC", the channels are
        the last axis. Torch does not reuse the memory of the images while a tensor refers to it.
        """
        for future in started.futures:
            future.result()
        squares = self.stream.empty(started.pixels.shape, torch.uint8)
        self.stream.run(lambda: squares.copy_(started.pixels, non_blocking=True))
        self._blocks.give_back(started.block, self.stream.record())
        windows, shift = (self.stream.upload(values) for values in self._finisher.parameters(crops))
        images = self.stream.empty(self._finisher.shape(len(records.numbers)), self._dtype)
        self.stream.run(lambda: self._finisher.finish(squares, windows, shift, images))
        return images.view(len(records.numbers), self._views, *images.shape[1:]) if self._views > 1 else images

    def close(self) -> None:
        """Stop the threads and release the pinned memory. Served images stay valid."""
        self._pool.shutdown(cancel_futures=True)
        self._blocks.close()


class BlockPool:
    """Pool of pinned memory. A block is reused only after the device has copied its contents."""

    def __init__(self, stream: DeviceStream) -> None:
        self._stream = stream
        # Blocks that were given back. The event of a block passes when the device has copied the block.
        self._copied: deque[tuple[Tensor, Event]] = deque()

    def take(self, size_bytes: int) -> Tensor:
        """Return a block of at least `size_bytes`, uint8."""
        if len(self._copied) >= _WAITING_BLOCKS:
            block, copied = self._copied.popleft()
            copied.wait()
            if len(block) >= size_bytes:  # the last batch of an epoch can be smaller
                return block
        return self._stream.host_memory(size_bytes)

    def give_back(self, block: Tensor, copied: Event) -> None:
        """Let `block` be reused after the event `copied`."""
        self._copied.append((block, copied))

    def close(self) -> None:
        """Release the blocks."""
        self._copied.clear()


def _copy_squares(
    pool: ThreadPoolExecutor,
    threads: int,
    records: RecordBatch,
    corner: npt.NDArray[np.int32],
    out: npt.NDArray[np.uint8],
) -> list[Future[None]]:
    """Let `threads` threads copy a square of each raw record to `out`, uint8 (N, side, side, 3), without the GIL.

    `corner` is (N, 2): row and column of the square in its record.
    """
    side = out.shape[1]
    if kernels.native is not None:
        job = BatchJob.of_squares(
            None, records.addresses, records.payload_bytes, records.sizes, corner[:, None], out[:, None]
        )
        return [pool.submit(kernels.native.copy_squares, job) for _ in range(threads)]
    payloads, corners = records.payloads(), corner.tolist()

    def copy(part: slice) -> None:
        for square, payload, (y, x) in zip(out[part], payloads[part], corners[part], strict=True):
            square[:] = payload[y : y + side, x : x + side]

    return [pool.submit(copy, slice(first, None, threads)) for first in range(threads)]

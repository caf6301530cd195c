"""Raw records on a GPU: threads copy pixels into pinned memory, and the GPU computes the images from these pixels.

If a record gives one crop, the threads copy or resize only this crop. If a record gives ten views, the threads copy its
complete central square. A separate CUDA stream (device_stream.py) copies the pixels to the GPU and computes the images
from them (finish_crops.py), while the kernels of the training loop run. Blocks of pinned memory are reused, because
allocating pinned memory takes longer than making a batch.
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
from pipeline.engines.cpu_engine import DecodeError
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.device_stream import DeviceStream, Event
from pipeline.engines.finish_crops import CropFinisher
from pipeline.engines.kernels import BatchJob, cut_window
from pipeline.records import RecordBatch

# On the CPU of an H200 machine, one thread copies 24,000 images/s. Four threads copy 77,000 images/s, which is more
# than a GPU needs.
_MAX_THREADS = 8
_WAITING_BLOCKS = 2  # when this number of blocks have been given back, the oldest of these blocks is reused


class _Started(NamedTuple):
    """A batch whose pixels the threads copy."""

    block: Tensor  # uint8, at least as large as `pixels`
    pixels: Tensor  # uint8 (N, square, square, 3), in the memory of `block`
    futures: list[Future[int | None]]


class RawGpuEngine:
    """Computes the formula of pipeline.augment with a DeviceStream.

    On a CPU whose C kernel cannot read the records, this engine also serves streams with resized regions or effects.
    The threads then decode JPEG records with simplejpeg, and resize with Pillow.
    """

    uses_dali = False

    def __init__(self, augmenter: Augmenter, stream: DeviceStream, output: OutputFormat, threads: int) -> None:
        """Start `threads` threads, at most 8, that copy pixels."""
        self.stream, self._views = stream, output.views
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
        """Let the threads copy the pixels of a batch to a block of pinned memory.

        Waits only if the GPU is still copying from the block.
        """
        shape = (len(records.numbers), self._square_px, self._square_px, 3)
        corner = crops.origin if self._views > 1 else crops.origin + crops.offset[:, 0]
        block = self._blocks.take(int(np.prod(shape)))
        pixels = block[: int(np.prod(shape))].view(shape)
        threads = min(self._threads, len(records.numbers))
        extent = None if crops.extent is None else crops.extent[:, 0]
        return _Started(block, pixels, _copy_squares(self._pool, threads, records, corner, extent, pixels.numpy()))

    def finish(self, started: _Started, records: RecordBatch, crops: Crops) -> Tensor:
        """Wait for the threads, and queue the computation of the images on the stream.

        The images are (N, 3, side, side), or (N, 10, 3, side, side) for ten views. With layout "NHWC", the channels are
        the last axis. Torch does not reuse the memory of the images while a tensor refers to it. Raises DecodeError for
        a JPEG file that is damaged.
        """
        damaged = [index for future in started.futures if (index := future.result()) is not None]
        if damaged:
            raise DecodeError(min(damaged))
        squares = self.stream.empty(started.pixels.shape, torch.uint8)
        self.stream.run(lambda: squares.copy_(started.pixels, non_blocking=True))
        self._blocks.give_back(started.block, self.stream.record())
        images = self._finisher.make_images(squares, crops, self.stream)
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
        """Allow the reuse of `block` after the event `copied` has passed."""
        self._copied.append((block, copied))

    def close(self) -> None:
        """Release the blocks."""
        self._copied.clear()


def _copy_squares(
    pool: ThreadPoolExecutor,
    threads: int,
    records: RecordBatch,
    corner: npt.NDArray[np.int32],
    extent: npt.NDArray[np.int32] | None,
    out: npt.NDArray[np.uint8],
) -> list[Future[int | None]]:
    """Let `threads` threads copy a square of each record to `out`, uint8 (N, side, side, 3).

    `corner` is (N, 2): row and column of the square in its record. If `extent` (N, 2) is given, it is the height and
    width of a region, which is resized to the square. A future returns the index of a record that cannot be decoded, or
    None if all records can be decoded. The C kernel copies raw records without the GIL. JPEG records are decoded
    without the C kernel.
    """
    if kernels.native is not None and records.is_raw:
        job = BatchJob.of_squares(
            *(None, records.addresses, records.payload_bytes, records.sizes, corner[:, None], out[:, None]),
            None if extent is None else extent[:, None],
        )
        return [pool.submit(kernels.native.copy_squares, job) for _ in range(threads)]
    payloads = records.payloads()

    def copy(first: int) -> int | None:
        for index in range(first, len(out), threads):
            box = None if extent is None else extent[index]
            if not cut_window(payloads[index], records.is_raw, corner[index], box, out[index]):
                return index
        return None

    return [pool.submit(copy, first) for first in range(threads)]

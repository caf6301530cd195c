"""Decoding and augmentation on a CPU: threads that each run the C kernel, without DALI.

The kernel decodes the part of a JPEG file that the crops need, then crops or resizes, flips and normalizes while the
pixels are in the CPU's cache. Raw records are cropped directly from the mapped store. All threads work on the same
batch. When no record of this batch is left, a free thread begins the next batch, so that no thread waits for the other
threads at the end of a batch. Each thread runs Python code once for each batch, not for each image
(docs/measurements.md).
"""

from __future__ import annotations

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import Augmenter, Crops
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.device_stream import DeviceStream, InOrderStream
from pipeline.engines.kernels import ALIGNMENT_BYTES, BatchJob, NativeKernels, address, aligned_floats
from pipeline.records import RecordBatch

# Largest number of free memory blocks that are kept for later batches. If no blocks were kept, allocation would take a
# fifth of the engine's time.
_SPARE_BLOCKS = 3


class DecodeError(Exception):
    """Raised for a batch with records that cannot be decoded.

    `index` is the position in the batch of the first such record, counted from 0.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"record {index} of the batch cannot be decoded")
        self.index = index


class _Started(NamedTuple):
    """A batch on which the threads work."""

    job: BatchJob
    images: npt.NDArray[np.float32] | None  # (N · V, ...), the images of the batch; None if the engine only decodes
    futures: list[Future[None]]  # one future for each thread that works on the batch


class CpuEngine:
    """Computes the formula of pipeline.augment with the C kernel, on `threads` threads."""

    uses_dali = False
    stream: DeviceStream = InOrderStream()

    def __init__(
        self, augmenter: Augmenter, kernel: NativeKernels, output: OutputFormat, threads: int, decode_only: bool = False
    ) -> None:
        """If `decode_only` is true, records are decoded without making images, and `finish` returns an empty tensor."""
        self._kernel, self._threads, self._decode_only = kernel, threads, decode_only
        self._views, self._layout, self._dtype = output.views, output.layout, output.dtype
        self._scale = 1 / (output.divisor * augmenter.std_rgb)  # (3,)
        self._side_px, self._jpeg = augmenter.side_px, None if augmenter.is_raw else kernel.jpeg
        self._is_aligned = augmenter.augmentation.mean == "aligned"
        self._crop_px, self._max_offset_px = output.crop_px, augmenter.side_px - output.crop_px
        # The mean image and its mirror image, in the layout of the output.
        self._mean: npt.NDArray[np.float32] | None = None
        if augmenter.mean_image is not None:
            both = np.stack([augmenter.mean_image, augmenter.mean_image[:, ::-1]]).astype(np.float32)
            self._mean = np.ascontiguousarray(both.transpose(0, 3, 1, 2) if output.layout == "NCHW" else both)
        self._memory = _BlockPool()
        self._pool = ThreadPoolExecutor(threads, "alexstream-decode")

    def define_graph(self) -> None:
        """The engine has no DALI graph."""

    def graph_inputs(self, records: RecordBatch, crops: Crops) -> dict[str, Any]:
        """Return no inputs, because the engine has no DALI graph."""
        return {}

    def start(self, records: RecordBatch, crops: Crops) -> _Started:
        """Queue a batch for the threads, behind the batches that were started earlier, and return at once."""
        side, count = self._crop_px, crops.flip.size
        shape = (3, side, side) if self._layout == "NCHW" else (side, side, 3)
        images = None if self._decode_only else self._memory.array((count, *shape))
        job = BatchJob(
            self._jpeg,
            records.addresses,
            records.payload_bytes,
            records.sizes,
            crops.origin[:, None] + crops.offset,
            crops.flip,
            crops.shift,
            None if self._mean is None else self._mean_addresses(crops),
            self._side_px,
            side,
            self._layout,
            self._scale,
            images,
            crops.extent,
            crops.effects,
        )
        threads = min(self._threads, len(records.numbers))
        futures = [self._pool.submit(self._kernel.make_images, job) for _ in range(threads)]
        return _Started(job, images, futures)

    def finish(self, started: _Started, records: RecordBatch, crops: Crops) -> torch.Tensor:
        """Wait for a batch that `start` queued, and return the images of the batch.

        The images are (N, 3, side, side), or (N, 10, 3, side, side) for ten views. With layout "NHWC", the channels are
        the last axis. The memory of the images is not reused while a tensor refers to it. Raises DecodeError for a JPEG
        file that is damaged.
        """
        for future in started.futures:
            future.result()
        if started.job.failed < len(records.numbers):
            raise DecodeError(started.job.failed)
        if started.images is None:
            return torch.empty(0)
        tensor = torch.from_numpy(started.images)
        if self._views > 1:
            tensor = tensor.view(len(records.numbers), self._views, *started.images.shape[1:])
        return tensor.to(self._dtype)

    def close(self) -> None:
        """Stop the threads and release the memory. Images that are still referenced keep their memory."""
        self._pool.shutdown(cancel_futures=True)
        self._memory.close()

    def _mean_addresses(self, crops: Crops) -> npt.NDArray[np.uint64]:
        """Return (N, V): for each crop, the address of the part of the mean image that is subtracted from the crop.

        The address of a part is the address of its upper left pixel. If the mean is "aligned" and the crop is mirrored,
        the part belongs to the mirrored mean image.
        """
        assert self._mean is not None
        y = x = np.full(crops.flip.shape, self._max_offset_px // 2)
        mirrored = np.zeros(crops.flip.shape, np.int64)
        if self._is_aligned:
            y, x, mirrored = crops.offset[:, :, 0], crops.offset[:, :, 1], crops.flip.astype(np.int64)
            x = np.where(mirrored == 1, self._max_offset_px - x, x)
        pixel_bytes = self._mean.itemsize * (1 if self._layout == "NCHW" else 3)
        offset_bytes = mirrored * self._mean[0].nbytes + (y * self._side_px + x) * pixel_bytes
        return np.asarray(address(self._mean) + offset_bytes, np.uint64)


class _BlockPool:
    """Pool of memory blocks for batches. A block is reused only when no tensor refers to its memory."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.float32]] = []
        self._open = True

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return an uninitialized, contiguous float32 array."""
        size = int(np.prod(shape))
        spare = ALIGNMENT_BYTES // 4
        block = self._free.pop() if self._free else None
        if block is None or len(block) != size + spare:  # the last batch of an epoch can be smaller
            block = np.empty(size + spare, np.float32)
        array = aligned_floats(block)[:size].reshape(shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def close(self) -> None:
        self._open = False
        self._free = []

    def _give_back(self, block: npt.NDArray[np.float32]) -> None:
        if self._open and len(self._free) < _SPARE_BLOCKS:
            self._free.append(block)

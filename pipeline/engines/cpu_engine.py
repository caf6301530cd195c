"""Augmentation on a CPU: DALI decodes JPEG files; the C kernel crops, flips and normalizes in one pass.

Raw records are cropped directly from the mapped store, without DALI. With DALI's crop_mirror_normalize instead of the
kernel, an image takes 0.1 to 0.2 ms longer (docs/measurements.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import Augmenter, Crops
from pipeline.engines.dali_engine import OutputFormat, decode_crop, decode_inputs
from pipeline.engines.kernels import CROP_DTYPE, NativeKernels
from pipeline.placement import Placement
from pipeline.records import Record

# Number of free blocks kept for later batches. Without spare blocks, allocation takes a fifth of the engine's time.
_SPARE_BLOCKS = 3
_ALIGNMENT_BYTES = 64


class CpuEngine:
    """Computes the formula of pipeline.augment with the C kernel, on `threads` threads."""

    def __init__(self, augmenter: Augmenter, kernel: NativeKernels, output: OutputFormat, threads: int) -> None:
        self._kernel, self._threads = kernel, threads
        self._views, self._layout, self._dtype = output.views, output.layout, output.dtype
        self._scale = 1 / output.divisor
        self._side_px, self._is_raw = augmenter.side_px, augmenter.is_raw
        self._is_aligned = augmenter.augmentation.mean == "aligned"
        self._crop_px, self._max_offset_px = output.crop_px, augmenter.side_px - output.crop_px
        self._decoded_px = self._crop_px if output.views == 1 else augmenter.side_px
        self._mean: npt.NDArray[np.float32] | None = None  # the mean image and its mirror image, in the output's layout
        if augmenter.mean_image is not None:
            both = np.stack([augmenter.mean_image, augmenter.mean_image[:, ::-1]]).astype(np.float32)
            self._mean = np.ascontiguousarray(both.transpose(0, 3, 1, 2) if output.layout == "NCHW" else both)
        self._memory = _BlockPool()
        self._pool = ThreadPoolExecutor(threads, "alexstream-crop")

    def define_graph(self) -> Any:
        """The DALI node of the decoded images: crops, or central squares for ten views. None for raw records."""
        return None if self._is_raw else decode_crop(Placement.parse("cpu"), self._decoded_px)

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        """The values of the graph inputs, by name of the input. Each input has one value for each record."""
        if self._is_raw:
            return {}
        return decode_inputs(records, crops.origin + crops.offset[:, 0] if self._views == 1 else crops.origin)

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        """Images (N, 3, side, side), or (N, 10, 3, side, side) for ten views.

        With layout "NHWC", the channels are the last axis. The memory of the images is not reused while a tensor
        refers to it.
        """
        jobs = self._kernel_jobs(outputs, records, crops)
        count, side = len(jobs), self._crop_px
        shape = (3, side, side) if self._layout == "NCHW" else (side, side, 3)
        images = self._memory.array((count, *shape))

        def crop(part: slice) -> None:
            self._kernel.crop(jobs[part], self._layout, self._side_px, self._scale, images[part])

        ends = [count * part // self._threads for part in range(self._threads + 1)]
        list(self._pool.map(crop, (slice(*pair) for pair in pairwise(ends))))
        tensor = torch.from_numpy(images)
        if self._views > 1:
            tensor = tensor.view(len(records), self._views, *shape)
        return tensor.to(self._dtype)

    def close(self) -> None:
        """Stop the threads and release the memory. Images that are still referenced keep their memory."""
        self._pool.shutdown()
        self._memory.close()

    def _kernel_jobs(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> npt.NDArray[np.void]:
        """The kernel's input, (N · V,) of CROP_DTYPE: for each crop, its pixels, shift, flip and mean to subtract."""
        jobs = np.zeros(crops.flip.shape, CROP_DTYPE)
        if self._is_raw:
            base = np.array([_address(record.payload) for record in records], np.int64)
            stride = np.array([3 * record.width for record in records], np.int64)
            position = crops.origin[:, None] + crops.offset
        else:
            base = np.array([outputs[0][k].data_ptr() for k in range(len(records))], np.int64)
            stride = np.full(len(records), 3 * self._decoded_px)
            position = np.zeros_like(crops.offset) if self._views == 1 else crops.offset
        jobs["pixels"] = base[:, None] + position[:, :, 0] * stride[:, None] + 3 * position[:, :, 1]
        jobs["stride"] = stride[:, None]
        jobs["shift"] = crops.shift[:, None]
        jobs["flip"] = crops.flip
        if self._mean is not None:
            jobs["mean"] = self._mean_addresses(crops)
        return jobs.reshape(-1)

    def _mean_addresses(self, crops: Crops) -> npt.NDArray[np.int64]:
        """Addresses (N, V): for each crop, the upper left pixel of the part of the mean image to subtract.

        If the mean is "aligned", a mirrored crop gets the mirrored mean.
        """
        assert self._mean is not None
        y = x = np.full(crops.flip.shape, self._max_offset_px // 2)
        mirrored = np.zeros(crops.flip.shape, np.int64)
        if self._is_aligned:
            y, x, mirrored = crops.offset[:, :, 0], crops.offset[:, :, 1], crops.flip.astype(np.int64)
            x = np.where(mirrored == 1, self._max_offset_px - x, x)
        pixel_bytes = self._mean.itemsize * (1 if self._layout == "NCHW" else 3)
        offset_bytes = mirrored * self._mean[0].nbytes + (y * self._side_px + x) * pixel_bytes
        return np.asarray(_address(self._mean) + offset_bytes, np.int64)


class _BlockPool:
    """Pool of memory blocks for batches. A block is reused only when no tensor refers to its memory."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.float32]] = []
        self._open = True

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """An uninitialized, contiguous float32 array. The block is not reused while a tensor refers to its memory."""
        size = int(np.prod(shape))
        spare = _ALIGNMENT_BYTES // 4
        block = self._free.pop() if self._free else None
        if block is None or len(block) != size + spare:  # the last batch of an epoch can be smaller
            block = np.empty(size + spare, np.float32)
        first = -_address(block) % _ALIGNMENT_BYTES // 4
        array = block[first : first + size].reshape(shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def close(self) -> None:
        self._open = False
        self._free = []

    def _give_back(self, block: npt.NDArray[np.float32]) -> None:
        if self._open and len(self._free) < _SPARE_BLOCKS:
            self._free.append(block)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])

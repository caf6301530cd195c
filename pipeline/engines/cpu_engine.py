"""The formula of augment.py on a CPU: DALI decodes, and pipeline.engines.kernels crops, mirrors, shifts and lays out in one pass.

Raw pictures are cut straight out of the mapped store. With crop_mirror_normalize in its place an image takes 0.1 to 0.2
ms more, a mean image's twice that (docs/measurements.md).
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

_KEPT = 3  # blocks of memory kept for the next batches: fresh ones cost a fifth of the work
_ALIGNED_BYTES = 64


class CpuEngine:
    """Windows by the kernel, on `threads` threads: what has to be decoded for them, and the images made of it."""

    def __init__(self, augmenter: Augmenter, kernel: NativeKernels, form: OutputFormat, threads: int) -> None:
        self._kernel, self._threads = kernel, threads
        self._views, self._layout, self._dtype, self._scale = form.views, form.layout, form.dtype, 1 / form.divisor
        self._side_px, self._is_raw = augmenter.side_px, augmenter.is_raw
        self._aligned = augmenter.augmentation.mean == "aligned"
        self._crop_px, self._max_offset_px = form.crop_px, augmenter.side_px - form.crop_px
        self._decoded_px = self._crop_px if form.views == 1 else augmenter.side_px
        self._mean: npt.NDArray[np.float32] | None = None
        if augmenter.mean_image is not None:  # plain and mirrored
            both = np.stack([augmenter.mean_image, augmenter.mean_image[:, ::-1]]).astype(np.float32)
            self._mean = np.ascontiguousarray(both.transpose(0, 3, 1, 2) if form.layout == "NCHW" else both)
        self._memory = _Memory()
        self._pool = ThreadPoolExecutor(threads, "alexstream-cut")

    def define_graph(self) -> Any:
        """DALI's part: uint8 HWC windows, or squares for ten views; None where nothing is to be decoded."""
        return None if self._is_raw else decode_crop(Placement.parse("cpu"), self._decoded_px)

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        """What the nodes are fed with, by name: one for each picture."""
        if self._is_raw:
            return {}
        return decode_inputs(records, crops.origin + crops.offset[:, 0] if self._views == 1 else crops.origin)

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        """(N, 3, 224, 224), or with ten views (N, 10, …), or channels last, in memory of their own."""
        windows = self._windows(outputs, records, crops)
        many, count, side = len(windows), len(records), self._crop_px
        shape = (3, side, side) if self._layout == "NCHW" else (side, side, 3)
        images = self._memory.array((many, *shape))

        def cut(part: slice) -> None:
            self._kernel.crop(windows[part], self._layout, self._side_px, self._scale, images[part])

        ends = [many * part // self._threads for part in range(self._threads + 1)]
        list(self._pool.map(cut, (slice(*pair) for pair in pairwise(ends))))
        tensor = torch.from_numpy(images)
        if self._views > 1:
            tensor = tensor.view(count, self._views, *shape)
        return tensor.to(self._dtype)

    def close(self) -> None:
        """End the threads and give back memory, but that of images which are still held."""
        self._pool.shutdown()
        self._memory.close()

    def _windows(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> npt.NDArray[np.void]:
        """(N · V,) for the kernel: addresses of decoded or stored pictures, and of the mean."""
        windows = np.zeros(crops.flip.shape, CROP_DTYPE)
        if self._is_raw:
            first = np.array([_address(record.payload) for record in records], np.int64)
            stride = np.array([3 * record.width for record in records], np.int64)
            place = crops.origin[:, None] + crops.offset
        else:
            first = np.array([outputs[0][k].data_ptr() for k in range(len(records))], np.int64)
            stride = np.full(len(records), 3 * self._decoded_px)
            place = np.zeros_like(crops.offset) if self._views == 1 else crops.offset
        windows["pixels"] = first[:, None] + place[:, :, 0] * stride[:, None] + 3 * place[:, :, 1]
        windows["stride"] = stride[:, None]
        windows["shift"] = crops.shift[:, None]
        windows["flip"] = crops.flip
        if self._mean is not None:
            windows["mean"] = self._mean_addresses(crops)
        return windows.reshape(-1)

    def _mean_addresses(self, crops: Crops) -> npt.NDArray[np.int64]:
        """(N, V): of the upper left of what is subtracted; under a mirrored window lies the mirrored mean."""
        assert self._mean is not None
        y = x = np.full(crops.flip.shape, self._max_offset_px // 2)
        whole = np.zeros(crops.flip.shape, np.int64)
        if self._aligned:
            y, x, whole = crops.offset[:, :, 0], crops.offset[:, :, 1], crops.flip.astype(np.int64)
            x = np.where(whole == 1, self._max_offset_px - x, x)
        pixel_bytes = self._mean.itemsize * (1 if self._layout == "NCHW" else 3)
        first = whole * self._mean[0].nbytes + (y * self._side_px + x) * pixel_bytes
        return np.asarray(_address(self._mean) + first, np.int64)


class _Memory:
    """Blocks of memory that come back when no tensor looks at them any more."""

    def __init__(self) -> None:
        self._free: list[npt.NDArray[np.float32]] = []
        self._open = True

    def array(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Uninitialized float32, contiguous. A tensor made of it keeps it, and its memory with it."""
        numbers = int(np.prod(shape))
        spare = _ALIGNED_BYTES // 4
        block = self._free.pop() if self._free else None
        if block is None or len(block) != numbers + spare:  # an epoch's last batch may be smaller
            block = np.empty(numbers + spare, np.float32)
        first = -_address(block) % _ALIGNED_BYTES // 4
        array = block[first : first + numbers].reshape(shape)
        weakref.finalize(array, self._give_back, block).atexit = False
        return array

    def close(self) -> None:
        self._open = False
        self._free = []

    def _give_back(self, block: npt.NDArray[np.float32]) -> None:
        if self._open and len(self._free) < _KEPT:
            self._free.append(block)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])

"""Windows: squares of uint8 pixels that are decoded and cropped from the records of a store.

A service (pipeline.service) sends windows to the loaders that use it. The window of a training image is a random crop
of 224 × 224 pixels, or a random region that is resized to a square. In evaluation, the window is the centre crop for
views=1, and the complete central square for ten views and for views="square". The engine of the loader makes the image
from the window: the engine flips the window, adds the colour noise, subtracts the mean and converts to float32. A
training image is therefore sent as 150,528 bytes of uint8 instead of 602,112 bytes of float32.

The workers of the service make windows with WindowMaker. A loader that has lost its service also makes windows with
WindowMaker, from the local store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pipeline.engines import kernels
from pipeline.engines.kernels import BatchJob, cut_window
from pipeline.records import RecordBatch, Records
from pipeline.sampling import choose_regions
from prep.images.central_square import central_offset
from prep.store.extra import Column
from prep.store.manifest import ExtraField, Store, StoreError

NewArray = Callable[[tuple[int, ...]], npt.NDArray[np.uint8]]
LABEL_BYTES = 8  # size of the label that is sent with each window


@dataclass(frozen=True)
class WindowRequest:
    """Request for the windows of N records: the numbers of the records, and a window position for each record."""

    split: str
    numbers: npt.NDArray[np.int64]  # (N,): record numbers
    offset: npt.NDArray[np.int32]  # (N, 2): row and column of each window in the central square
    window_px: int  # side of the windows
    with_sources: bool = False  # True: the source paths of the records are requested too
    # Only for windows that are resized regions: random numbers of pipeline.sampling.draw_regions, (N, 11, 2). The
    # worker computes the regions from these numbers and the sizes of the records, and ignores `offset`.
    regions: npt.NDArray[np.float64] | None = None
    ratio: tuple[float, float] | None = None  # argument `ratio` of choose_regions
    # Extra fields whose values are requested too. They are described as in the manifest of the loader's store.
    extra_fields: Mapping[str, ExtraField] = field(default_factory=dict)

    @classmethod
    def joined(cls, requests: Sequence[WindowRequest]) -> WindowRequest:
        """Combine several requests for windows of the same split into one request, in the order of `requests`."""
        first = requests[0]
        numbers = np.concatenate([request.numbers for request in requests])
        offset = np.concatenate([request.offset for request in requests])
        parts = [request.regions for request in requests if request.regions is not None]
        regions = np.concatenate(parts) if parts else None
        return replace(first, numbers=numbers, offset=offset, regions=regions)

    @property
    def window_bytes(self) -> int:
        """Size of all windows in bytes."""
        return len(self.numbers) * 3 * self.window_px**2


class Windows(NamedTuple):
    """The windows, labels, source paths and values of the extra fields of N records."""

    pixels: npt.NDArray[np.uint8]  # (N, window_px, window_px, 3), RGB
    labels: npt.NDArray[np.int64]  # (N,)
    sources: tuple[str, ...] = ()  # (N,); empty if the request does not ask for source paths
    extra: Mapping[str, Column] = {}  # by field, N rows each; empty if the request does not ask for extra fields

    def part(self, images: slice) -> Windows:
        """Return the values of the records in a slice, without a copy of the pixels."""
        rows = np.arange(len(self.labels))[images]
        extra = {name: column.take(rows) for name, column in self.extra.items()}
        return Windows(self.pixels[images], self.labels[images].copy(), self.sources[images], extra)

    def records(self, numbers: npt.NDArray[np.int64]) -> RecordBatch:
        """Return the windows in the form of raw records, which an engine can read. The pixels are not copied."""
        count, window_px = self.pixels.shape[:2]
        window_bytes = 3 * window_px**2
        addresses = kernels.address(self.pixels) + window_bytes * np.arange(count)
        return RecordBatch(
            numbers,
            self.labels,
            np.full((count, 2), window_px, np.int32),
            addresses.astype(np.uint64),
            np.full(count, window_bytes),
            is_raw=True,
            memory=self.pixels,
            sources=self.sources,
            extra=self.extra,
        )


class WindowMaker:
    """Decodes and crops the records of one store. Several threads may call `make` at the same time."""

    def __init__(self, store: Store, threads: int) -> None:
        """`threads` is the number of threads that decode and crop."""
        self._store, self._threads = store, threads
        self._records: dict[str, Records] = {}
        self._pool = ThreadPoolExecutor(threads, "alexstream-decode")

    def make(self, request: WindowRequest, new_array: NewArray | None = None) -> Windows:
        """Decode and crop the windows of a batch.

        `new_array(shape)` returns the uint8 array for the pixels. If `new_array` is None, NumPy allocates the array.

        Raises StoreError for a damaged record. The error has the same text as in a loader without a service.
        """
        source = self._records.get(request.split)
        if source is None:
            source = self._records.setdefault(request.split, Records(self._store, request.split))
        records = source.batch(request.numbers)
        extent = None
        if request.regions is None or request.ratio is None:
            corner = central_offset(records.sizes, self._store.settings.side_px) + request.offset
        else:
            boxes = choose_regions(request.regions, records.sizes, request.ratio)
            corner, extent = boxes[:, :2], boxes[:, 2:]
        shape = (len(request.numbers), request.window_px, request.window_px, 3)
        out = np.empty(shape, np.uint8) if new_array is None else new_array(shape)
        failed = self._cut(records, corner, extent, out)
        source.check_maps()
        if failed < len(request.numbers):
            number = int(request.numbers[failed])
            damage = source.find_damage(number) or "cannot be decoded"
            raise StoreError(f"{source.location(number)}: {damage}. {source.advice}")
        sources = tuple(map(source.source, request.numbers.tolist())) if request.with_sources else ()
        extra = source.extra(request.numbers) if request.extra_fields else {}
        return Windows(out, records.labels, sources, extra)

    def close(self) -> None:
        """Stop the threads and unmap the files."""
        self._pool.shutdown(cancel_futures=True)
        for records in self._records.values():
            records.close()

    def _cut(
        self,
        records: RecordBatch,
        corner: npt.NDArray[np.int32],
        extent: npt.NDArray[np.int32] | None,
        out: npt.NDArray[np.uint8],
    ) -> int:
        """Write the N windows to `out`.

        A window is the square that begins at `corner`. If `extent` is given, the window is instead the region of this
        size that begins at `corner`, resized to a square.

        Returns the index of the first record that cannot be decoded; N if all records can be decoded.
        """
        kernel = kernels.native
        if kernel is None or not (records.is_raw or kernel.jpeg):
            return self._cut_without_kernel(records, corner, extent, out)
        job = BatchJob.of_squares(
            None if records.is_raw else kernel.jpeg,
            records.addresses,
            records.payload_bytes,
            records.sizes,
            corner[:, None],
            out[:, None],
            None if extent is None else extent[:, None],
        )
        threads = min(self._threads, len(out))
        for done in [self._pool.submit(kernel.copy_squares, job) for _ in range(threads)]:
            done.result()
        return int(job.failed)

    def _cut_without_kernel(
        self,
        records: RecordBatch,
        corner: npt.NDArray[np.int32],
        extent: npt.NDArray[np.int32] | None,
        out: npt.NDArray[np.uint8],
    ) -> int:
        """Do the same as `_cut` without the C kernel. simplejpeg decodes complete images, which takes longer."""
        payloads = records.payloads()

        def cut(index: int) -> bool:
            box = None if extent is None else extent[index]
            return cut_window(payloads[index], records.is_raw, corner[index], box, out[index])

        return next((k for k, is_cut in enumerate(self._pool.map(cut, range(len(out)))) if not is_cut), len(out))

"""Base of the training and evaluation loaders: batches, wait times, argument checks, prefetching and closing."""

from __future__ import annotations

import ctypes
import os
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, Self, cast

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import LAYOUTS, Augmentation, Augmenter, Crops, check_choice
from pipeline.device import Placement
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.engine import choose_engine
from pipeline.prefetch import READ_AHEAD, BatchInput, Job, Prefetcher
from pipeline.records import RecordBatch, Records
from pipeline.sampling import StepDraws
from pipeline.selection.dataset import RecordDataset
from pipeline.selection.fields import (
    ALL_FIELDS,
    AnyBatch,
    Batch,
    FieldName,
    check_fields,
    make_batch,
    read_values,
    refuse_missing_extra,
)
from pipeline.selection.mixture import MixedRecords
from pipeline.selection.subset import Subset, digest_of, subset_numbers
from pipeline.settings.normalize import grey_levels
from pipeline.windows import WindowRequest
from prep.console import UserError, WrongArgument, usable_cores
from prep.store.manifest import ChannelStats, ExtraField, Store

if TYPE_CHECKING:  # these modules are imported only for loaders with a service
    from pipeline.service.source import WindowSource
    from pipeline.service.status import ServiceStatus

# Version of the record order, the random numbers and the formula (pipeline.sampling, pipeline.augment). A loader cannot
# resume from a state of another version. The version is the item "graph_version" of a state.
STREAM_VERSION = 3

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


_ADVICE = (
    "Make the loader in the process that iterates over it, for example in the method __iter__ of an IterableDataset. A "
    "torch DataLoader around a loader is not needed: the loader has its own threads, and serves batches of tensors."
)
_loaders: weakref.WeakSet[Loader[Any]] = weakref.WeakSet()


def _keep_loaders_of_parent() -> None:
    """In a forked child, keep the parent's loaders until the child ends.

    If a loader were deleted in the child, the deletion would wait for threads that exist only in the parent.
    """
    for loader in list(_loaders):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(loader))


os.register_at_fork(after_in_child=_keep_loaders_of_parent)


class WaitTimes(NamedTuple):
    """Times for which a loader and its consumer waited for each other."""

    batches: int  # number of batches served
    consumer_wait_s: float  # time for which the consumer (the training loop) waited for batches
    # Time between a served batch and the consumer's next request. On a GPU, this time includes the time for which the
    # loader waits until the GPU has few batches left to process (Prefetcher.wait_for_consumer).
    loader_wait_s: float


class Loader(Generic[AnyBatch]):
    """Base of TrainLoader and EvalLoader. `close` or a `with` statement releases the threads and files of a loader.

    A loader can be used only in the process that made the loader, because only this process has the loader's threads.
    In a forked child, iteration raises UserError, and `close` does nothing. The end of a forked child does not affect
    the loader of the parent. A loader cannot be pickled.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        *,
        augmentation: Augmentation | None = None,
        normalize: ChannelStats | None = None,
        layout: str = "NCHW",
        dtype: str | torch.dtype = "float32",
        threads: int | None = None,
        shard: int = 0,
        world_size: int = 1,
        subset: Subset | None = None,
        service: str | None = None,
        service_fallback: str | None = None,
        check: bool | None = None,
        fields: Sequence[FieldName] | None = None,
        allowed_fields: Sequence[FieldName] = ALL_FIELDS,
        draws: int = 1,
    ) -> None:
        """Check the arguments and open the split. Raises UserError and StoreError.

        A subclass then calls `_connect`, and after that `_open`. `draws` is the number of random images of each record.
        The engine makes these images as if each came from a record of its own.
        """
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected at least 1.")
        if not 0 <= shard < world_size:
            raise UserError(f"shard {shard}: expected 0 to {world_size - 1} (world_size {world_size}).")
        self.store, self.split, self.batch_size, self.placement = store, split, batch_size, placement
        self.augmentation, self.layout = augmentation or Augmentation(), layout
        self.dtype = str(dtype).removeprefix("torch.")
        self.shard, self.world_size, self.threads = shard, world_size, threads or usable_cores()
        if draws < 1 or (draws > 1 and self.augmentation.shared_by > 1):
            raise WrongArgument(
                f"views {draws} with augmentation.shared_by {self.augmentation.shared_by}: expected at least 1 view, "
                "and shared_by 1 for several views."
            )
        self._draws_per_record = draws
        self._fields = check_fields(fields, allowed_fields)
        self._subset = subset_numbers(store, split, subset)  # None: all records of the split
        self.records = store.split(split).records if self._subset is None else len(self._subset)
        self._selected: dict[str, Any] = {} if self._subset is None else {"subset": digest_of(self._subset)}
        self._process = os.getpid()
        _loaders.add(self)
        self._waits = WaitTimes(0, 0.0, 0.0)
        self._served_at: float | None = None  # time at which the last batch was served
        self._records: Records | MixedRecords = Records(store, split, check)
        check_choice("dtype", self.dtype, tuple(_DTYPES))
        check_choice("layout", layout, LAYOUTS)
        self.normalize, self._std, mean_rgb = normalize, None, None
        if normalize is not None:
            mean_rgb, std_rgb = grey_levels(normalize, self.augmentation)
            self._std = torch.tensor(std_rgb).view((3, 1, 1) if layout == "NCHW" else (3,))
        self._augmenter = Augmenter(store, self.augmentation, service is not None, mean_rgb)
        self._service, self._service_fallback = service, service_fallback
        self._windows: WindowSource | None = None  # created by `_connect`
        self._waited_s = 0.0  # time for which the consumer has waited for batches of this loader
        self._prefetcher: Prefetcher  # created by `_open`

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes. A label is an index into this tuple."""
        return self.store.classes

    @cached_property
    def dataset(self) -> RecordDataset:
        """Random access to the records of the split: `dataset[i]` decodes record i, without augmentation.

        The data set reads the local store, even if the loader uses a service. The data set can still be used after the
        loader was closed. Raises UserError if the loader mixes several stores.
        """
        if isinstance(self._records, MixedRecords):
            raise UserError("a loader of several stores has no dataset. Open one store: pipeline.RecordDataset(path).")
        return RecordDataset(self.store, self.split)

    def channel_stats(self, max_value: float = 255) -> ChannelStats:
        """Return `mean` and `std` of R, G and B over the training split, for pixels in 0..`max_value`.

        With `max_value` 255 the numbers are grey levels, the unit of the images of this loader. With `max_value` 1 the
        numbers are for pixels in [0, 1]. The loader divides by the standard deviation only if the argument `normalize`
        is a ChannelStats.
        """
        return self.store.color_stats().channel_stats(max_value)

    def wait_times(self) -> WaitTimes:
        """Return the number of batches served, and the wait times of loader and consumer, since the previous call."""
        now, waits = time.perf_counter(), self._waits
        since_served_s = 0.0 if self._served_at is None else now - self._served_at
        self._waits, self._served_at = WaitTimes(0, 0.0, 0.0), now
        return waits._replace(loader_wait_s=waits.loader_wait_s + since_served_s)

    def service_status(self) -> ServiceStatus | None:
        """Return the state that the service sent with its last answer; None if the loader uses no service."""
        return None if self._windows is None else self._windows.status

    def stop_waiting(self) -> None:
        """Stop waiting for the service. If the next batch has not arrived, the iteration then raises ServiceError.

        Another thread may call this method. Without a service, this method does nothing.
        """
        if self._windows is not None:
            self._windows.stop()

    def close(self) -> None:
        """Stop the threads, release memory and unmap the files. Batches that were served before stay valid.

        The engines keep the memory of served batches that are still referenced (see the methods `finish` and `close` of
        CpuEngine, and DaliEngine.finish). On a GPU, the memory belongs to torch. In a forked child, this method closes
        nothing.
        """
        if self._process != os.getpid():
            return
        self.stop_waiting()
        self._prefetcher.close()
        if self._windows is not None:
            self._windows.close()

    def __reduce__(self) -> NoReturn:
        """Raises UserError: a loader cannot be pickled, for example for a spawned process, and cannot be copied."""
        raise UserError(f"a loader cannot be pickled or copied: its threads stay in this process. {_ADVICE}")

    def __getitem__(self, index: object) -> NoReturn:
        """Raises UserError, because batches come only in the order of the stream.

        If a user puts a torch DataLoader around a loader, the DataLoader asks for items by number and gets this error.
        """
        raise UserError(
            f"a loader has no items, only batches in their order. loader.dataset[i] decodes record i. {_ADVICE}"
        )

    def _check_process(self) -> None:
        """Raise UserError in a process that was forked from the process of this loader."""
        if self._process != os.getpid():
            raise UserError(
                f"this loader was made in process {self._process} and is used in process {os.getpid()}, which was "
                f"forked from process {self._process} and has no copy of the loader's threads. {_ADVICE}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, views: int, divisor: float, crop_px: int, resized: bool = False, effects: bool = False) -> None:
        """Make the engine and the prefetcher. The arguments are fields of OutputFormat."""
        output = OutputFormat(views, self.layout, divisor, _DTYPES[self.dtype], crop_px, resized, effects)
        try:
            engine = choose_engine(self._augmenter, self.placement, output, self.threads)
            read_ahead = READ_AHEAD if self._windows is None else self._windows.read_ahead
            images = self.batch_size * self._draws_per_record
            self._prefetcher = Prefetcher(
                engine, self.placement, self._records, images, self.threads, read_ahead, self._std
            )
        except BaseException:
            if self._windows is not None:
                self._windows.close()
            raise

    def _connect(self, seed: int | None, window: str, shared_by: int) -> None:
        """Connect to the service, if the loader uses a service. The arguments are fields of StreamKey.

        Raises WrongArgument if the batches need extra fields that the records lack.
        """
        if self._serves("extra"):
            refuse_missing_extra(self._records)
        if self._service is None:
            return
        from pipeline.service.protocol import StreamKey
        from pipeline.service.source import WindowSource

        fingerprint, ranks = self.store.split(self.split).fingerprint, (self.shard, self.world_size)
        records, images = " ".join(self._selected.values()), self.batch_size * self._draws_per_record
        stream = (self.split, fingerprint, seed, images, *ranks, window, shared_by, records)
        key = StreamKey(STREAM_VERSION, *stream)
        waited_s = lambda: self._waited_s  # noqa: E731
        source = (self._service, key, self.store, self.threads, waited_s, self._service_fallback)
        self._windows = WindowSource(*source, self._window_request)

    def _window_request(self, position: int) -> WindowRequest | None:
        """Return the request for the windows of the batch at a position; None after the last batch."""
        raise NotImplementedError

    def _start(self, jobs: Iterator[Job], position: int) -> None:
        """Start to prefetch the batches of `jobs`. `position` is that of the first batch (Fetch.position)."""
        self._check_process()
        if self._windows is not None:
            self._windows.start(position)
        self._prefetcher.start(jobs)
        self._served_at = None

    def _finish(self) -> None:
        """Tell the service that no further batch is needed for now."""
        if self._windows is not None:
            self._windows.finish()

    def _serves(self, field: FieldName) -> bool:
        """Return whether the argument `fields` of the loader names `field`."""
        return self._fields is not None and field in self._fields

    @property
    def _extra_fields(self) -> Mapping[str, ExtraField]:
        """The extra fields of the batches, for a WindowRequest."""
        return self._records.extra_fields if self._serves("extra") else {}

    def _read(self, numbers: npt.NDArray[np.int64], position: int) -> RecordBatch:
        """Return the records of a batch, from the store or from the service. `position` is Fetch.position."""
        return self._records.batch(numbers) if self._windows is None else self._windows.records(position)

    def _input(self, records: RecordBatch, crops: Crops, draws: StepDraws | None = None) -> BatchInput:
        """Return the input of a batch, with the values of the fields that the argument `fields` names."""
        is_remote = self._windows is not None
        values = read_values(self._fields, self._records, records, draws, self._draws_per_record, is_remote)
        return BatchInput(records, crops, *values)

    def _get(self, number: int) -> AnyBatch | None:
        """Return batch `number`, counted from 0 since `_start`; None after the last batch.

        Another call with the same number returns the same batch. Raises StoreError for a damaged record.
        """
        self._check_process()
        self._prefetcher.wait_for_consumer()
        requested = time.perf_counter()
        since_served_s = 0.0 if self._served_at is None else requested - self._served_at
        output = self._prefetcher.get(number)
        now = self._served_at = time.perf_counter()
        self._waited_s += now - requested
        batches, consumer_wait_s, loader_wait_s = self._waits
        self._waits = WaitTimes(
            batches + (output is not None), consumer_wait_s + now - requested, loader_wait_s + since_served_s
        )
        if output is None:
            return None
        images, labels, views = output.images, output.labels, self._draws_per_record
        if views > 1:
            images, labels = images.view(-1, views, *images.shape[1:]), labels[::views].contiguous()
        if self._fields is None:
            return cast(AnyBatch, Batch(images, labels))
        texts = output.batch_input.texts
        return cast(AnyBatch, make_batch(self._fields, images, labels, texts, output.arrays))

"""Evaluation loader: serves every image of a split once, without random augmentation.

The docstring of pipeline.loader describes the batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Unpack, overload

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import SQUARE, Augmentation, eval_offsets
from pipeline.device import Placement
from pipeline.loader_base import Loader
from pipeline.prefetch import BatchInput
from pipeline.selection.fields import AnyBatch, Batch, EvalOptions, FieldBatch, FieldName, LoaderOptions
from pipeline.selection.subset import Subset
from pipeline.windows import WindowRequest
from prep.console import WrongArgument
from prep.store.manifest import ChannelStats, Store

_FIELDS: tuple[FieldName, ...] = ("images", "labels", "keys", "index", "extra")


class EvalLoader(Loader[AnyBatch]):
    """Serves every image of a split once in each iteration. Create an evaluation loader with eval_loader.

    If world_size is more than 1, each rank serves only its range of the split. All ranks have the same number of
    batches, with the exceptions that `__len__` describes. The last two batches can therefore have fewer than batch_size
    images.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        views: int | str,
        *,
        fields: Sequence[FieldName] | None = None,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """The docstring of eval_loader describes the arguments and the errors."""
        super().__init__(store, split, batch_size, placement, fields=fields, allowed_fields=_FIELDS, **options)
        if views not in (1, 10, SQUARE):
            raise WrongArgument(
                f"views {views}: expected 1 (centre crop), 10 (corners and centre, each also mirrored) or {SQUARE} "
                "(the central square)."
            )
        self.views = views
        self._iteration = object()  # identity of the iterator that began last
        first, end = (self.records * part // self.world_size for part in (self.shard, self.shard + 1))
        self._record_numbers = np.arange(first, end) if self._subset is None else self._subset[first:end]
        longest = -(-self.records // self.world_size)  # number of records in the largest range of a rank
        self._batches = min(-(-longest // batch_size), end - first)
        self._connect(None, "centre" if views == 1 else "square", 0)
        divisor = self.augmentation.divisor_in_evaluation
        if isinstance(views, str):
            self._open(1, divisor, self._augmenter.side_px)
        else:
            self._open(views, divisor, self.augmentation.size_px)

    @property
    def own_records(self) -> int:
        """Number of records that this loader serves in one iteration: the records in this rank's range of the split."""
        return len(self._record_numbers)

    def __len__(self) -> int:
        """Return the number of batches in one iteration.

        If batch_size is 1, or if there are fewer records than ranks, two ranks can have numbers of batches that differ
        by 1. Otherwise all ranks have the same number of batches.
        """
        return self._batches

    def __iter__(self) -> Iterator[AnyBatch]:
        """Serve this rank's range of the split once, from the beginning of the range, in the order of the store.

        Several iterators over one loader may be used alternately. Each change to another iterator takes time, because
        the loader then drops the batches that it has prefetched, and reads records anew. Raises StoreError for a
        damaged record. The error names the location of the record.
        """
        first, iteration = 0, self._begin(0)
        for step in range(len(self)):
            if self._iteration is not iteration:  # another iterator has begun since the last batch
                first, iteration = step, self._begin(step)
            batch = self._get(step - first)
            assert batch is not None  # there is a job for each step
            yield batch
        self._finish()

    def _begin(self, first: int) -> object:
        """Start the jobs of an iterator at step `first`. Returns the identity of the iterator."""
        self._iteration = object()
        self._start((partial(self._read_step, step) for step in range(first, len(self))), first)
        return self._iteration

    def _read_step(self, step: int) -> BatchInput:
        records = self._read(self._step_records(step), step)
        return self._input(records, self._augmenter.eval_crops(records, self.views))

    def _window_request(self, position: int) -> WindowRequest | None:
        record_numbers = self._step_records(position)
        if not len(record_numbers):
            return None
        offset, window_px = np.zeros((len(record_numbers), 2), np.int32), self._augmenter.side_px
        if self.views == 1:
            offset += eval_offsets(1, self._augmenter.max_offset_px)[0]
            window_px = self._augmenter.size_px
        request = (self.split, record_numbers, offset, window_px, self._serves("keys"))
        return WindowRequest(*request, extra_fields=self._extra_fields)

    def _step_records(self, step: int) -> npt.NDArray[np.int64]:
        """Return the record numbers of the batch of a step. Returns no numbers after the last step.

        This rank's range of the split is divided into full batches, and one smaller batch for the rest. If another
        rank's larger range gives one batch more, the last record of this rank's range becomes a batch of its own, so
        that both ranks have the same number of batches.
        """
        records = len(self._record_numbers)
        first, end = (min(k * self.batch_size, records - 1) if k < self._batches else records for k in (step, step + 1))
        return self._record_numbers[first:end]


@overload
def eval_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    *,
    fields: None = None,
    **options: Unpack[EvalOptions],
) -> EvalLoader[Batch]: ...
@overload
def eval_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    *,
    fields: Sequence[FieldName],
    **options: Unpack[EvalOptions],
) -> EvalLoader[FieldBatch]: ...
def eval_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    *,
    views: int | str = 1,
    split: str = "val",
    subset: Subset | None = None,
    fields: Sequence[FieldName] | None = None,
    augmentation: Augmentation | None = None,
    normalize: ChannelStats | None = None,
    layout: str = "NCHW",
    dtype: str | torch.dtype = "float32",
    threads: int | None = None,
    shard: int = 0,
    world_size: int = 1,
    service: str | None = None,
    service_fallback: str | None = None,
    check: bool | None = None,
) -> EvalLoader[Any]:
    """Return a loader of evaluation batches: every image of `split` exactly once, without random augmentation.

    views         1: the centre crop. 10: the crops at the four corners and the centre, then the same five crops
                  mirrored (section 4.1 of the paper). "square": the complete central square, for dense evaluation
    fields        names of the values to serve, as for train_loader, except "draws": evaluation draws no random numbers
    augmentation  only the settings `size_px`, `mean`, `std`, `divisor` and `eval_divisor` are used. Images are divided
                  by `eval_divisor` if it is a number, and otherwise by `divisor`. The mean is computed from the
                  training split. Evaluation uses crops of `size_px` and resizes nothing, whatever `window` is
    shard         rank of this process. Each of `world_size` loaders serves one contiguous range of records, and the
                  loaders together serve every record. All loaders serve the same number of batches, with two exceptions
                  (EvalLoader.__len__)

    The docstring of train_loader describes the other arguments and the errors.

    Every `for` loop over the loader begins with the first image, also after a `break`.

    The loader yields Batch(images, labels). Images are RGB in grey levels (0 to 255) minus the mean. The shape of the
    images is (N, 3, size_px, size_px) for one view and (N, 10, 3, size_px, size_px) for ten views; size_px is 224 by
    default. For views="square" the shape is (N, 3, side, side), where `side` is the side of the store's images in px.
    The ten views of one record take 6 MB at 224 px in float32, so choose a small batch_size. Labels are int64 (N,). The
    last batch can have fewer images.
    """
    return EvalLoader(
        Store.open(store),
        split,
        batch_size,
        Placement.parse(device),
        views,
        subset=subset,
        fields=fields,
        augmentation=augmentation,
        normalize=normalize,
        layout=layout,
        dtype=dtype,
        threads=threads,
        shard=shard,
        world_size=world_size,
        service=service,
        service_fallback=service_fallback,
        check=check,
    )

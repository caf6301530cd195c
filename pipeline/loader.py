"""Training and evaluation loaders: batches of a store for a training loop.

    for images, labels in pipeline.train_loader("store", batch_size=128):  # one epoch
        ...  # images float32 (128, 3, 224, 224), labels int64 (128,)

Images follow the formula of pipeline.augment. For given settings, the order of the records and the random numbers
(pipeline.sampling) depend only on the seed and on the position in the stream. The position consists of the epoch and
the step, counted from 0. A stream can therefore resume from a saved state at any batch, and serves the same bits as
without the interruption. The images do not depend on the number of threads, or on the number of loaders that share a
step.

Threads prepare batches before the training loop requests them. On a CPU, float32 images are served without a copy. The
memory of a batch is not reused while a tensor of the batch exists. The training loop can therefore keep a batch and
change the batch in place. On a GPU, a batch is bound to the CUDA stream that is torch's current stream in the thread
that takes the batch. Work that is queued on this stream waits until the batch is complete. The memory of the batch is
not reused before the queued work is done.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, Unpack, overload

import numpy as np
import numpy.typing as npt
import torch

from pipeline.augment import Augmentation
from pipeline.device import Placement
from pipeline.evaluation_loader import EvalLoader, eval_loader
from pipeline.loader_base import STREAM_VERSION, Loader, WaitTimes
from pipeline.prefetch import BatchInput
from pipeline.sampling import EpochOrders, StepDraws, draw_step, epoch_order
from pipeline.selection.fields import AnyBatch, Batch, FieldBatch, FieldName, LoaderOptions, TrainOptions
from pipeline.selection.mixture import Mixture, Stores, open_stores
from pipeline.selection.state import check_state
from pipeline.selection.subset import Subset, Weights, digest_of, record_weights
from pipeline.windows import WindowRequest
from prep.console import UserError, WrongArgument
from prep.store.manifest import ChannelStats, Store

__all__ = ["STREAM_VERSION", "Batch", "EvalLoader", "TrainLoader", "WaitTimes", "eval_loader", "train_loader"]


class _Position(NamedTuple):
    """Position of a TrainLoader, as one object, so that one assignment replaces the whole position."""

    batch: int  # number of the next batch; the first batch of epoch 0 has number 0
    # Number of the batch with which the prefetcher has started; None if the prefetcher must be started again.
    first_batch: int | None


class TrainLoader(Loader[AnyBatch]):
    """Serves randomly augmented batches, epoch after epoch. train_loader creates this loader.

    One `for` loop serves the rest of the current epoch. After a `break`, the next loop continues with the batch after
    the last batch that was served. `set_epoch(n)` begins epoch n instead. An epoch has records // (batch_size ·
    world_size) full batches. The remaining records of an epoch are left out (see `left_out`). Each epoch leaves out
    different records.

    `epoch` and `step` are the position of the next batch. Epochs, and the steps of an epoch, are counted from 0.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        seed: int,
        *,
        weights: Weights | None = None,
        mixture: Mixture | None = None,
        fields: Sequence[FieldName] | None = None,
        views: int = 1,
        **options: Unpack[LoaderOptions],
    ) -> None:
        """The docstring of train_loader describes the arguments and the errors."""
        super().__init__(store, split, batch_size, placement, fields=fields, draws=views, **options)
        if mixture is not None:
            self._records = mixture.records(split, options.get("check"))
            self.records, self._selected["stores"] = len(self._records), mixture.identity(split)
        ranks, place = self.world_size, split if self._subset is None else f"the subset of {split}"
        if self.records < batch_size * ranks:
            step = "" if ranks == 1 else f", a step of {ranks:,} ranks takes {batch_size * ranks:,}"
            raise UserError(
                f"{store.root} has {self.records:,} records in {place}, a batch takes {batch_size:,}{step}. "
                f"Choose a batch size of at most {self.records // ranks:,}."
            )
        if not 0 <= seed < 2**64:
            raise WrongArgument(f"seed {seed}: expected 0 to 2^64 - 1.")
        self.seed, self.views, self._position = seed, views, _Position(0, None)
        scaled = record_weights(store, split, self._subset, weights)
        if scaled is not None:
            self._selected["weights"] = digest_of(scaled)
        order = partial(epoch_order, self.records, seed, subset=self._subset, weights=scaled)
        self._orders = EpochOrders(order if mixture is None else mixture.order(split, seed))
        settings = self.augmentation
        self._connect(seed, settings.window_text(views), settings.shared_by)
        is_resized = settings.window == "resized" and self._windows is None
        self._open(1, settings.divisor, settings.size_px, is_resized, settings.has_effects)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return self.records // (self.batch_size * self.world_size)

    @property
    def left_out(self) -> int:
        """Number of records that an epoch does not serve. It is less than batch_size · world_size."""
        return self.records - len(self) * self.batch_size * self.world_size

    def __iter__(self) -> Iterator[AnyBatch]:
        """Serve the remaining batches of the current epoch. The next iterator begins with the next epoch.

        If the loop ends early, by `break` or an exception, the next iterator continues with the next batch of the
        epoch. To begin a new epoch instead, call `set_epoch` first.

        Raises StoreError for a damaged record. The error names the location of the record.
        """
        while True:
            batch, next_position = self._next()
            epoch_ends = next_position.batch % len(self) == 0
            # The position changes at the moment at which the batch is handed over. Python calls no signal handler
            # between the next two lines, so a KeyboardInterrupt cannot separate them.
            self._position = next_position
            yield batch
            if epoch_ends:
                return

    @property
    def epoch(self) -> int:
        """The epoch of the next batch, counted from 0."""
        return self._position.batch // len(self)

    @property
    def step(self) -> int:
        """The step of the next batch in its epoch, counted from 0."""
        return self._position.batch % len(self)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iterator begin epoch `epoch`, counted from 0. torch's DistributedSampler has the same method.

        Without set_epoch, each iterator continues where the last iterator stopped. Raises WrongArgument if `epoch` is
        negative or not a whole number.
        """
        # If the position stays the same, the queue already holds the right batches.
        if (epoch, 0) != (self.epoch, self.step):
            self.seek(epoch)

    def seek(self, epoch: int, step: int = 0) -> None:
        """Continue at a step of an epoch, both counted from 0. Raises UserError if an epoch has no such step."""
        whole = isinstance(epoch, SupportsIndex) and isinstance(step, SupportsIndex)
        if not whole or epoch < 0 or not 0 <= step < len(self):
            raise WrongArgument(
                f"epoch {epoch}, step {step}: expected whole numbers, an epoch of at least 0 and a step of 0 to "
                f"{len(self) - 1}."
            )
        self._position = _Position(int(epoch) * len(self) + int(step), None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the settings of the stream: a JSON-serializable dict of a few hundred bytes.

        A loader that loads this state continues at this position, with the same bits. The states of all ranks are equal
        except for `shard`.
        """
        epoch, step = divmod(self._position.batch, len(self))
        return {**self._identity(), "shard": self.shard, "epoch": epoch, "step": step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of the same store, seed and settings. Raises UserError if one of them differs.

        Any rank can load the state of any other rank. Between epochs (step 0), batch size and world size can change.
        Within an epoch, batch size and world size can change if their product, the number of records in a step, stays
        the same.
        """
        check_state(state, self._identity())
        self.seek(int(state["epoch"]), int(state["step"]))

    def _identity(self) -> dict[str, Any]:
        """Return the settings that load_state_dict compares with a state.

        The names of the settings are part of the format of states.
        """
        return {
            "graph_version": STREAM_VERSION,
            "store_fingerprint": self.store.split(self.split).fingerprint,
            **{name: getattr(self, name) for name in ("split", "batch_size", "world_size", "seed")},
            "augmentation": self.augmentation.for_state(),
            **({} if self.views == 1 else {"views": self.views}),
            **({} if self.normalize is None else {"normalize": [*map(list, self.normalize[:2]), self.normalize[2]]}),
            "layout": self.layout,
            "dtype": self.dtype,
            **self._selected,
        }

    def _next(self) -> tuple[AnyBatch, _Position]:
        """Return the batch at the current position, and the next position. A repeated call returns the same batch."""
        position = self._position
        if position.first_batch is None:
            steps = (divmod(batch, len(self)) for batch in count(position.batch))
            self._start((partial(self._read_step, *step) for step in steps), position.batch)
            position = self._position = _Position(position.batch, position.batch)
        assert position.first_batch is not None
        batch = self._get(position.batch - position.first_batch)
        assert batch is not None  # the jobs never end, because the number of epochs is unlimited
        return batch, position._replace(batch=position.batch + 1)

    def _read_step(self, epoch: int, step: int) -> BatchInput:
        """Read this rank's records of a step."""
        numbers, draws = self._draw(epoch, step)
        records = self._read(numbers, epoch * len(self) + step)
        return self._input(records, self._augmenter.random_crops(records, *draws), draws)

    def _window_request(self, position: int) -> WindowRequest:
        numbers, (draws, regions, _) = self._draw(*divmod(position, len(self)))
        request = (self.split, numbers, draws.offset, self.augmentation.size_px, self._serves("keys"), regions)
        return WindowRequest(*request, None if regions is None else self.augmentation.ratio, self._extra_fields)

    def _draw(self, epoch: int, step: int) -> tuple[npt.NDArray[np.int64], StepDraws]:
        """Return the record numbers and random numbers of this rank's images of a step."""
        views, records = self.views, self.batch_size * self.world_size
        part = slice(self.shard * self.batch_size * views, (self.shard + 1) * self.batch_size * views)
        numbers = np.repeat(self._orders[epoch][step * records : (step + 1) * records], views)
        draws = draw_step(self.augmentation, self.seed, epoch, step, records * views, self._augmenter.max_offset_px)
        return numbers[part], draws.select(part)


@overload
def train_loader(
    store: str | Path | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    fields: None = None,
    **options: Unpack[TrainOptions],
) -> TrainLoader[Batch]: ...
@overload
def train_loader(
    store: str | Path | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    fields: Sequence[FieldName],
    **options: Unpack[TrainOptions],
) -> TrainLoader[FieldBatch]: ...
def train_loader(
    store: str | Path | None = None,
    batch_size: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
    *,
    split: str = "train",
    subset: Subset | None = None,
    weights: Weights | None = None,
    stores: Stores | None = None,
    fields: Sequence[FieldName] | None = None,
    augmentation: Augmentation | None = None,
    normalize: ChannelStats | None = None,
    layout: str = "NCHW",
    dtype: str | torch.dtype = "float32",
    views: int = 1,
    threads: int | None = None,
    shard: int = 0,
    world_size: int = 1,
    service: str | None = None,
    service_fallback: str | None = None,
    check: bool | None = None,
) -> TrainLoader[Any]:
    """Return a loader of training batches: random crops or resized regions with random flips and colour noise.

    One `for` loop over the loader is one epoch. After a `break`, the next loop continues within the epoch, with the
    batch after the last batch that was served. `loader.set_epoch(n)` begins epoch n instead.

    store         store folder written by `alexprep build-lmdb`
    batch_size    number of records in a batch of this loader. An epoch has records // (batch_size · world_size) batches
    device        device that decodes and augments the images, and holds the batches: "cpu", "cuda:N" or a torch.device
    seed          seed of the record order and of all random numbers, 0..2^64 − 1. The same seed gives the same bits
                  with any number of threads
    split         split of the store to read
    subset        records to serve: class names, record numbers, or a mask with a bool for each record of the split.
                  Labels stay indices into the classes of the store. For class names, the loader reads the labels of all
                  records in the local store. None: all records
    weights       one weight for each record of the split, or "balanced": 1 / (number of records of the record's
                  class). An epoch draws as many records as the subset has, with replacement
                  (pipeline.sampling.weighted_draws). None: an epoch serves each record at most once
    fields        names of the values to serve: "images", "labels", "keys" (source paths), "index" (record numbers),
                  "draws" (random numbers of the images) and "extra" (extra fields of the store). Batches are then dicts
                  (FieldBatch). None: Batch(images, labels)
    augmentation  settings of the images (pipeline.Augmentation). None: Augmentation.preset("alexnet"), with random
                  crops of 224 px, the mean of each channel, and the colour noise of the authors' code
    stores        pairs (path, share) instead of `store`: each epoch mixes records of several stores in proportion to
                  their shares (pipeline.sampling.mixed_order). All stores need the same side, format and classes. The
                  colour statistics are those of the first store. Not together with `subset`, `weights` or `service`
    normalize     ChannelStats(mean, std, max_value): each channel becomes (pixel − mean) / std, for pixels in
                  0..max_value. With max_value 1, the formula is that of transforms.Normalize. `loader.channel_stats()`
                  returns the mean and standard deviation of the store. The division needs an additional pass over the
                  images. None: the mean of `augmentation` is subtracted, and nothing is divided
    layout        "NCHW" or "NHWC" (channels last)
    dtype         type of the images: "float32", "float16" or "bfloat16", or the torch.dtype of this name
    views         number of independent random images of each record. For several views, images are (N, views, …)
    threads       number of CPU threads that decode and augment; None: one for each core that this process can use
    shard         rank of this process, 0..world_size − 1. In each step, each rank serves its own `batch_size` records
    world_size    number of ranks that share an epoch. Each rank has a loader. Together these loaders serve the same
                  records as one loader with batch size batch_size · world_size
    service       "NAME" or "NAME@HOST:PORT": workers of this service decode and crop the images (`alexstream serve`).
                  The batches are the same as without a service, bit for bit, with one exception: without a service, a
                  GPU decodes JPEG records with DALI, whose pixels differ slightly from libjpeg-turbo's. With a service,
                  the loader reads only manifest.json, colour.json and mean_image.npy of its store
    service_fallback  "local": if the service is lost, the loader continues with the local store and the same batches
    check         True: the checksum of each record is verified when the record is read, so a damaged record always
                  raises StoreError. False: damage of single pixels can go unnoticed. None: True for JPEG records; False
                  for raw records, for which verifying takes 20 % of the time for cropping. The workers of a service
                  ignore `check`, and verify the checksums of JPEG records only

    Batches are Batch(images, labels). Images are RGB in grey levels minus the mean, (N, 3, size_px, size_px). Labels
    are int64 (N,).

    Raises StoreError for a store that is missing, damaged or of another schema version. Raises UserError for a batch
    larger than the split, for a GPU that this machine lacks, for a value that is not allowed, and if DALI is needed but
    not installed. DALI is needed for JPEG records on a GPU, and on a CPU whose C kernel cannot be used. Raises
    ServiceError, a UserError, if the service does not exist, serves another store or is lost.
    """
    first, mixture = open_stores(store, stores, split, subset=subset, weights=weights, service=service)
    return TrainLoader(
        first,
        split,
        batch_size,
        Placement.parse(device),
        seed,
        subset=subset,
        weights=weights,
        mixture=mixture,
        fields=fields,
        augmentation=augmentation,
        normalize=normalize,
        layout=layout,
        dtype=dtype,
        views=views,
        threads=threads,
        shard=shard,
        world_size=world_size,
        service=service,
        service_fallback=service_fallback,
        check=check,
    )

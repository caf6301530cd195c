"""Training and evaluation loaders: batches of a store for a training loop.

    from pipeline import train_loader, eval_loader

    for images, labels in train_loader("store", batch_size=128):  # one epoch
        ...  # images float32 (128, 3, 224, 224), labels int64 (128,)

Images follow the formula of pipeline.augment; order and random numbers come from pipeline.sampling. Both are functions
of the seed and of the position in the stream, which is two numbers: epoch and step. So a state resumes at any batch,
bit for bit, and the numbers of threads and of loaders that share an epoch change nothing.

Threads prepare batches ahead of the consumer. Serving a batch copies nothing, and each batch has memory of its own as
long as one of its tensors lives: batches may be kept, and changed in place. On a GPU they belong to the CUDA stream
that is torch's current one when they are served.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.augment import SQUARE, Augmentation
from pipeline.loader_base import Batch, Loader, WaitTimes
from pipeline.placement import Placement
from pipeline.prefetch import BatchInput
from pipeline.sampling import draw_params, epoch_permutation
from prep.console import UserError, usable_cores
from prep.store.manifest import Store

__all__ = ["STREAM_VERSION", "Batch", "EvalLoader", "TrainLoader", "WaitTimes", "eval_loader", "train_loader"]

# Version of what pipeline.sampling and pipeline.augment compute. A state of another version cannot be resumed. Its key
# in a state is "graph_version".
STREAM_VERSION = 3


class TrainLoader(Loader):
    """Endless epochs of randomly augmented batches; made by train_loader.

    Iterating serves the rest of the current epoch. An epoch has records // (batch_size · world_size) whole batches; the
    records that do not fill a batch are left out, other ones each epoch (see `left_out`).

    `epoch` and `step` are the position of the next batch.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        seed: int,
        *,
        augmentation: Augmentation,
        layout: str = "NCHW",
        dtype: str = "float32",
        threads: int = 1,
        shard: int = 0,
        world_size: int = 1,
    ) -> None:
        """Arguments and errors are those of train_loader."""
        super().__init__(
            store,
            split,
            batch_size,
            placement,
            augmentation=augmentation,
            layout=layout,
            dtype=dtype,
            threads=threads,
            shard=shard,
            world_size=world_size,
        )
        if self.records < batch_size * world_size:
            step = "" if world_size == 1 else f", {world_size:,} of them {batch_size * world_size:,}"
            raise UserError(
                f"{store.root} has {self.records:,} records in {split}, a batch takes {batch_size:,}{step}. "
                f"Ask for a batch of at most {self.records // world_size:,}."
            )
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: expected 0 to 2^64 - 1.")
        self.seed = seed
        self.epoch, self.step = 0, 0
        self._permutation = (-1, np.empty(0, np.int64))  # (epoch, its permutation): the one computed last
        self._is_prefetching = False  # whether the prefetcher's next batch is that of (epoch, step)
        self._open(1, augmentation.divisor)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.records // (self.batch_size * self.world_size)

    @property
    def left_out(self) -> int:
        """Number of records that no loader serves in an epoch: fewer than batch_size · world_size."""
        return self.records - len(self) * self.batch_size * self.world_size

    def __iter__(self) -> Iterator[Batch]:
        """Serve the remaining batches of the current epoch; the next iterator begins with the next epoch.

        Raises StoreError for a damaged record, with its location.
        """
        while True:
            if not self._is_prefetching:
                self._start(partial(self._read_step, epoch, step) for epoch, step in self._positions())
                self._is_prefetching = True
            batch = self._next()
            assert batch is not None  # there is no last epoch
            self.epoch, self.step = self._after(self.epoch, self.step)
            epoch_ends = self.step == 0
            yield batch
            if epoch_ends:
                return

    def seek(self, epoch: int, step: int = 0) -> None:
        """Continue with batch `step` of `epoch`; raises UserError if an epoch has no such step."""
        if epoch < 0 or not 0 <= step < len(self):
            raise UserError(
                f"epoch {epoch}, step {step}: expected an epoch of at least 0, a step of 0 to {len(self) - 1}."
            )
        self.epoch, self.step = epoch, step
        self._is_prefetching = False

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream, and what it is a position in: JSON-serializable, a few hundred bytes.

        A loader that loads it continues with the next batch, bit for bit. The loaders of all ranks have the same state
        but for `shard`.
        """
        return {**self._identity(), "shard": self.shard, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a state of the same store, seed and settings; raises UserError with both values of what differs.

        A loader of any rank may load the state of any other. Between epochs (step 0) batch size and world size may
        change: the next epoch is divided anew, batch_size records of each step to a loader. Within an epoch they may
        change if their product, the records of a step, stays the same.
        """
        may_differ = {"batch_size", "world_size"}
        step_records = state.get("batch_size", 0) * state.get("world_size", 0)
        if state.get("step") and step_records != self.batch_size * self.world_size:
            may_differ = set()
        for name, value in self._identity().items():
            if name not in may_differ and state.get(name) != value:
                within = " within an epoch" if name in ("batch_size", "world_size") else ""
                raise UserError(
                    f"stream state of another {name.replace('_', ' ')}{within}: {state.get(name)}, here {value}."
                )
        self.seek(int(state["epoch"]), int(state["step"]))

    def _identity(self) -> dict[str, Any]:
        """What a state must agree with. The keys are part of the file format of states."""
        return {
            "graph_version": STREAM_VERSION,
            "store_fingerprint": self.store.split(self.split).fingerprint,
            "split": self.split,
            "batch_size": self.batch_size,
            "world_size": self.world_size,
            "seed": self.seed,
            "augmentation": asdict(self.augmentation),
            "layout": self.layout,
            "dtype": self.dtype,
        }

    def _positions(self) -> Iterator[tuple[int, int]]:
        """(epoch, step) from the current position on, without end."""
        position = self.epoch, self.step
        while True:
            yield position
            position = self._after(*position)

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)

    def _read_step(self, epoch: int, step: int) -> BatchInput:
        """Read this loader's part of a step."""
        images = self.batch_size * self.world_size
        part = slice(self.shard * self.batch_size, (self.shard + 1) * self.batch_size)
        known_epoch, permutation = self._permutation
        if known_epoch != epoch:
            permutation = epoch_permutation(self.records, self.seed, epoch)
            self._permutation = epoch, permutation
        max_offset_px, shared_by = self._augmenter.max_offset_px, self.augmentation.shared_by
        draws = draw_params(self.seed, epoch, step, images, max_offset_px, shared_by).select(part)
        numbers = permutation[step * images : (step + 1) * images][part]
        return self._prefetcher.read_batch(numbers, lambda records: self._augmenter.random_crops(records, draws))


class EvalLoader(Loader):
    """Every image of a split exactly once, each time it is iterated; made by eval_loader.

    The last batch may be smaller.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        views: int | str,
        *,
        augmentation: Augmentation,
        layout: str = "NCHW",
        dtype: str = "float32",
        threads: int = 1,
        shard: int = 0,
        world_size: int = 1,
    ) -> None:
        """Arguments and errors are those of eval_loader."""
        super().__init__(
            store,
            split,
            batch_size,
            placement,
            augmentation=augmentation,
            layout=layout,
            dtype=dtype,
            threads=threads,
            shard=shard,
            world_size=world_size,
        )
        if views not in (1, 10, SQUARE):
            raise UserError(
                f"views {views}: expected 1 (centre crop), 10 (corners and centre, and these mirrored) or {SQUARE}."
            )
        self.views = views
        first, end = (self.records * part // world_size for part in (shard, shard + 1))
        self._numbers = np.arange(first, end)
        if isinstance(views, str):
            self._open(1, 1.0, self._augmenter.side_px)
        else:
            self._open(views, 1.0)

    def __len__(self) -> int:
        """Batches in a pass."""
        return -(-len(self._numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over this loader's part of the split, from its beginning, in the store's order.

        Raises StoreError for a damaged record, with its location.
        """
        self._start(partial(self._read_step, step) for step in range(len(self)))
        while (batch := self._next()) is not None:
            yield batch

    def _read_step(self, step: int) -> BatchInput:
        numbers = self._numbers[step * self.batch_size : (step + 1) * self.batch_size]
        return self._prefetcher.read_batch(numbers, lambda records: self._augmenter.eval_crops(records, self.views))


def train_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str = "cpu",
    seed: int = 0,
    *,
    split: str = "train",
    augmentation: Augmentation | None = None,
    layout: str = "NCHW",
    dtype: str = "float32",
    threads: int | None = None,
    shard: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """Training batches of a store: random 224×224 crop, flip and colour noise (section 4.1), minus the mean.

    store         folder that `alexprep build-lmdb` wrote
    batch_size    images in a batch of this loader; an epoch has records // (batch_size · world_size) batches
    device        "cpu" or "cuda:N": where DALI decodes and augments, and where the batches are
    seed          seed of the order and of all random numbers, 0..2^64 − 1. The same seed gives the same bits with any
                  number of threads
    split         split of the store to read
    augmentation  choices of mean and colour noise, see pipeline.Augmentation; None: the paper's, with the authors'
                  reading of the colour noise
    layout        "NCHW" or "NHWC" (channels last)
    dtype         type of the images: "float32", "float16" or "bfloat16"
    threads       CPU threads that decode and augment; None: all cores that this process may use
    shard         rank of this process, 0..world_size − 1: the part of each step that this loader serves
    world_size    number of loaders that share an epoch. Together they serve the batches of one loader with batch size
                  batch_size · world_size

    Batches are Batch(images, labels): (N, 3, 224, 224) RGB in grey levels minus the mean, and int64 (N,).

    Raises StoreError for a store that is missing, damaged or of another version; UserError for a batch larger than the
    split, for a GPU that this machine lacks, for a value that is not allowed, and if DALI is not installed.
    """
    return TrainLoader(
        Store.open(store),
        split,
        batch_size,
        Placement.parse(device),
        seed,
        augmentation=augmentation or Augmentation(),
        layout=layout,
        dtype=dtype,
        threads=threads or usable_cores(),
        shard=shard,
        world_size=world_size,
    )


def eval_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str = "cpu",
    *,
    views: int | str = 1,
    split: str = "val",
    augmentation: Augmentation | None = None,
    layout: str = "NCHW",
    dtype: str = "float32",
    threads: int | None = None,
    shard: int = 0,
    world_size: int = 1,
) -> EvalLoader:
    """Evaluation batches of a store: every image of `split` exactly once, without random augmentation.

    views         1: the centre crop. 10: four corners and centre, then these mirrored (section 4.1). "square": the
                  whole central square, for a network that slides over it
    augmentation  only its mean is used, that of the training split
    shard         rank of this process: with `world_size` loaders each serves one range of the records, together all

    The other arguments and the errors are those of train_loader.

    Batches are Batch(images, labels): (N, 3, 224, 224); (N, 10, 3, 224, 224) for ten views (6 MB an image: choose
    batch_size accordingly); (N, 3, side, side) for squares, with the store's side; RGB in grey levels minus the mean.
    Labels are int64 (N,). The last batch may be smaller.
    """
    return EvalLoader(
        Store.open(store),
        split,
        batch_size,
        Placement.parse(device),
        views,
        augmentation=augmentation or Augmentation(),
        layout=layout,
        dtype=dtype,
        threads=threads or usable_cores(),
        shard=shard,
        world_size=world_size,
    )

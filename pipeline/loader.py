"""Batches for a training loop, from a store.

    from pipeline.loader import train_loader, eval_loader

    for images, labels in train_loader("store", batch_size=128):  # one epoch
        ...                                                       # images float32 (128, 3, 224, 224), labels int64
        (128,)

What is served is the formula of pipeline.augment, in the order and with the draws of pipeline.sampling: functions of the
seed and of where the stream stands, which is two numbers, epoch and step. So a state continues anywhere at once, to
the bit; threads, prefetching and the number of loaders that share an epoch change nothing.

The work is done in threads, ahead of the consumer; what arrives is not copied. Each batch has memory of its own for as
long as a tensor of it lives, so batches may be kept or changed in place. On a GPU they belong to the stream that is
torch's current one when they are served.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from pipeline.augment import CROP_PX, LAYOUTS, SQUARE, Augmentation, Augmenter, check_choice
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.engine import choose_engine
from pipeline.placement import Placement
from pipeline.prefetch import BatchInput, Job, Prefetcher
from pipeline.records import Records
from pipeline.sampling import draw_params, epoch_permutation
from prep.console import UserError, usable_cores
from prep.store.manifest import Store

STREAM_VERSION = 3  # of what pipeline.sampling and pipeline.augment serve: a state of another cannot be continued

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Batch(NamedTuple):
    """One batch, on the loader's device."""

    # (N, 3, 224, 224), NHWC (N, 224, 224, 3), ten views (N, 10, …), squares (N, 3, side, side): RGB, grey levels minus
    # the mean
    images: torch.Tensor
    labels: torch.Tensor  # int64 (N,), 0..classes − 1


class WaitTimes(NamedTuple):
    """Who waited for whom."""

    batches: int
    consumer_wait_s: float  # the consumer, for batches: of it training is input-bound
    loader_wait_s: float  # the loader, for its consumer: from handing a batch over to being asked for the next


class _Loader:
    """What the two loaders share: a store, a fed DALI graph, and who waited for whom."""

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        how: Augmentation,
        layout: str,
        dtype: str,
        threads: int,
        shard: int,
        world_size: int,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected at least 1.")
        if not 0 <= shard < world_size:
            raise UserError(f"shard {shard} of {world_size}: expected 0 to {world_size - 1}.")
        self.store, self.split, self.batch_size, self.placement = store, split, batch_size, placement
        self.augmentation, self.layout, self.dtype = how, layout, dtype
        self.shard, self.world_size, self.threads = shard, world_size, threads
        self.records = store.split(split).records
        self._waits = WaitTimes(0, 0.0, 0.0)
        self._handed_over_at: float | None = None
        self._records = Records(store, split)
        check_choice("dtype", dtype, tuple(_DTYPES))
        check_choice("layout", layout, LAYOUTS)
        self._augmenter = Augmenter(store, how)
        self._prefetcher: Prefetcher  # which `_open` makes, last

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; a label is an index into them."""
        return self.store.classes

    def wait_times(self) -> WaitTimes:
        """Who waited for whom since this was asked last."""
        now, waits = time.perf_counter(), self._waits
        held_s = 0.0 if self._handed_over_at is None else now - self._handed_over_at
        self._waits, self._handed_over_at = WaitTimes(0, 0.0, 0.0), now
        return waits._replace(loader_wait_s=waits.loader_wait_s + held_s)

    def close(self) -> None:
        """End the threads, give back memory and files. Batches that were handed out stay valid."""
        self._prefetcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, views: int, divisor: float, window_px: int = CROP_PX) -> None:
        """Begin to serve so many windows of each record."""
        form = OutputFormat(views, self.layout, divisor, _DTYPES[self.dtype], window_px)
        engine = choose_engine(self._augmenter, self.placement, form, self.threads)
        self._prefetcher = Prefetcher(engine, self.placement, self._records, self.batch_size, self.threads)

    def _start(self, jobs: Iterator[Job]) -> None:
        self._prefetcher.start(jobs)
        self._handed_over_at = None

    def _next(self) -> Batch | None:
        """The next batch; None after the last. Raises StoreError for a record that is damaged."""
        asked = time.perf_counter()
        held_s = 0.0 if self._handed_over_at is None else asked - self._handed_over_at
        served = self._prefetcher.next()
        batch = (
            None
            if served is None
            else Batch(served.images, self.placement.tensor_from_numpy(served.batch_input.labels))
        )
        now = self._handed_over_at = time.perf_counter()
        before = self._waits
        self._waits = WaitTimes(
            before.batches + (batch is not None), before.consumer_wait_s + now - asked, before.loader_wait_s + held_s
        )
        return batch


class TrainLoader(_Loader):
    """Epochs of random windows. Iterating serves what is left of the present epoch: whole batches, records //
    (batch_size · world_size).

    What does not fill a batch is left out of its epoch, other records each time: see `left_out`.
    """

    def __init__(self, store: Store, split: str, batch_size: int, placement: Placement, seed: int, **more: Any) -> None:
        super().__init__(store, split, batch_size, placement, **more)
        if self.records < batch_size * self.world_size:
            many = "" if self.world_size == 1 else f", {self.world_size:,} of them {batch_size * self.world_size:,}"
            raise UserError(
                f"{store.root} has {self.records:,} records in {split}, a batch takes {batch_size:,}{many}. "
                f"Ask for a batch of at most {self.records // self.world_size:,}."
            )
        if not 0 <= seed < 2**64:
            raise UserError(f"seed {seed}: expected 0 to 2^64 - 1.")
        self.seed = seed
        self.epoch, self.step = 0, 0  # where the stream stands: the next batch to be served
        self._order = (-1, np.empty(0, np.int64))  # of an epoch, the one last asked for
        self._continues = False
        self._open(1, self.augmentation.divisor)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.records // (self.batch_size * self.world_size)

    @property
    def left_out(self) -> int:
        """Records that no loader serves in an epoch: fewer than a batch of each."""
        return self.records - len(self) * self.batch_size * self.world_size

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of this epoch; a new iterator after its end begins the next."""
        while True:
            if not self._continues:
                self._start(partial(self._look_up, epoch, step) for epoch, step in self._places())
                self._continues = True
            batch = self._next()
            assert batch is not None  # there is no last epoch
            self.epoch, self.step = self._after(self.epoch, self.step)
            last = self.step == 0
            yield batch
            if last:
                return

    def seek(self, epoch: int, step: int = 0) -> None:
        """Stand before batch `step` of `epoch`. Raises UserError where there is no such batch."""
        if epoch < 0 or not 0 <= step < len(self):
            raise UserError(f"epoch {epoch}, step {step}: an epoch has steps 0 to {len(self) - 1}.")
        self.epoch, self.step = epoch, step
        self._continues = False

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, to continue with the next batch to the bit: JSON-able, a few hundred bytes.

        The same for all loaders of a world, but for `shard`.
        """
        return {**self._identity(), "shard": self.shard, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same store, seed and settings; raises UserError naming what differs.

        Any of a world's loaders may take the state of any other. Between epochs the world size and the batch size may
        change: each step of the next epoch is divided anew, batch_size records to a loader. Within one they may change
        as long as their product, the records of a step, stays.
        """
        mine = self._identity()
        free = {"batch_size", "world_size"}
        step_size = state.get("batch_size", 0) * state.get("world_size", 0)
        if state.get("step") and step_size != self.batch_size * self.world_size:
            free = set()
        for name, value in mine.items():
            if name not in free and state.get(name) != value:
                within = " within an epoch" if name in ("batch_size", "world_size") else ""
                raise UserError(
                    f"stream state of another {name.replace('_', ' ')}{within}: {state.get(name)}, here {value}."
                )
        self.seek(int(state["epoch"]), int(state["step"]))

    def _identity(self) -> dict[str, Any]:
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

    def _places(self) -> Iterator[tuple[int, int]]:
        place = self.epoch, self.step
        while True:
            yield place
            place = self._after(*place)

    def _after(self, epoch: int, step: int) -> tuple[int, int]:
        return (epoch, step + 1) if step + 1 < len(self) else (epoch + 1, 0)

    def _look_up(self, epoch: int, step: int) -> BatchInput:
        images = self.batch_size * self.world_size
        mine = slice(self.shard * self.batch_size, (self.shard + 1) * self.batch_size)
        known, order = self._order
        if known != epoch:
            order = epoch_permutation(self.records, self.seed, epoch)
            self._order = epoch, order
        draws = draw_params(self.seed, epoch, step, images, self._augmenter.max_offset_px, self.augmentation.shared_by)
        numbers = order[step * images : (step + 1) * images][mine]
        return self._prefetcher.read_batch(
            numbers, lambda records: self._augmenter.random_crops(records, draws.select(mine))
        )


class EvalLoader(_Loader):
    """Every image of a split exactly once, each time it is iterated; the last batch may be smaller."""

    def __init__(
        self, store: Store, split: str, batch_size: int, placement: Placement, views: int | str, **more: Any
    ) -> None:
        super().__init__(store, split, batch_size, placement, **more)
        if views not in (1, 10, SQUARE):
            raise UserError(
                f"views {views}: expected 1 (centre), 10 (corners and centre, and these mirrored) or {SQUARE}."
            )
        self.views = views
        first, end = (self.records * part // self.world_size for part in (self.shard, self.shard + 1))
        self._numbers = np.arange(first, end)
        if isinstance(views, str):
            self._open(1, 1.0, self._augmenter.side_px)
        else:
            self._open(views, 1.0)

    def __len__(self) -> int:
        """Batches in a pass."""
        return -(-len(self._numbers) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over this loader's part of the split, from its beginning."""
        self._start(partial(self._look_up, index) for index in range(len(self)))
        while (batch := self._next()) is not None:
            yield batch

    def _look_up(self, index: int) -> BatchInput:
        numbers = self._numbers[index * self.batch_size : (index + 1) * self.batch_size]
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
    """Training batches of `store`: random 224×224 window, flip, colour noise (the paper, section 4.1), minus the mean.

    store         folder that `alexprep build-lmdb` wrote
    batch_size    images in a batch of this loader; an epoch has records // (batch_size · world_size) of them
    device        "cpu" or "cuda:N": where DALI decodes and augments, and where the batches lie
    seed          of every random draw, 0..2^64 − 1: the same seed gives the same bits for any number of threads
    augmentation  readings of mean and colour noise; see pipeline.augment.Augmentation
    layout        "NCHW" or "NHWC"
    dtype         "float32", "float16" or "bfloat16"
    threads       of DALI on the CPU; None: all cores this process may use
    shard         which part of each step this loader serves, 0..world_size − 1: a process' rank
    world_size    loaders that serve an epoch together: what one of batch_size · world_size would, cut into batches

    Gives Batch(images, labels): (N, 3, 224, 224) RGB in grey levels minus the mean, int64 (N,).
    Raises StoreError for a store that is missing, damaged or of another version; UserError for a batch larger than the
    split, a GPU that is not there, a choice that does not exist, and where DALI is not installed.
    """
    return TrainLoader(
        Store.open(store),
        split,
        batch_size,
        Placement.parse(device),
        seed,
        how=augmentation or Augmentation(),
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
    """Every image of `split` exactly once: the centre window, or with views=10 the four corners and the centre, then
    mirrored; with views="square" the whole central square, for a network that slides over it.

    With `world_size` loaders each serves a range of the records, that of `shard`; together they serve every one.
    Gives Batch(images, labels): (N, 3, 224, 224), or (N, 10, 3, 224, 224) for ten views (6 MB an image: choose
    batch_size accordingly), or (N, 3, side, side) for squares of the store's side, RGB in grey levels minus the mean of
    the training split; int64 (N,). Of `augmentation` only the mean counts here. Other arguments and errors as
    train_loader's.
    """
    return EvalLoader(
        Store.open(store),
        split,
        batch_size,
        Placement.parse(device),
        views,
        how=augmentation or Augmentation(),
        layout=layout,
        dtype=dtype,
        threads=threads or usable_cores(),
        shard=shard,
        world_size=world_size,
    )

"""Batches for a training loop, from a store.

    from pipeline.loader import train_loader

    for images, labels in train_loader("store", batch_size=128):  # one epoch
        ...                                                       # images float32 (128, 3, 224, 224), labels int64
        (128,)

DALI does the work in its own threads, ahead of the consumer; what arrives is a view of its memory, without a copy. Each
batch has memory of its own for as long as a tensor of it lives, so batches may be kept or changed in place. On a GPU
they belong to the stream that is torch's current one when they are served.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from pipeline.augment import Augmentation, Augmenter
from pipeline.placement import Placement, dali
from prep.console import UserError, usable_cores
from prep.manifest import Store, StoreError

GRAPH_VERSION = 1  # of the graphs in this file and augment.py: a state of another graph cannot be continued
_SHUFFLE_BYTES = 256_000_000  # of records held back to be mixed; the store's own order is a permutation already


class Batch(NamedTuple):
    """One batch, on the loader's device."""

    images: torch.Tensor  # float32 (N, 3, 224, 224), RGB, grey levels minus the mean; ten views: (N, 10, 3, 224, 224)
    labels: torch.Tensor  # int64 (N,), 0..classes − 1


@contextmanager
def dali_errors(store: Store, split: str) -> Iterator[None]:
    """Raise DALI's RuntimeErrors as StoreError, with its own words for the cause, in one line."""
    try:
        yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        after = [k + 1 for k, line in enumerate(lines) if line.endswith("encountered:")]
        causes = [line for line in lines[after[0] if after else 0 :] if line]
        cause = next((line for line in causes if "key" in line.lower()), causes[0] if causes else repr(error))
        raise StoreError(
            f"{store.root}, split {split}: DALI stopped ({cause}). If a record is damaged, this finds it: "
            f"alexprep pca-stats --recompute --store {store.root} --split {split}"
        ) from None


class _Loader:
    """What the two loaders share: a store, a built DALI pipeline, and the time its consumer spent waiting."""

    def __init__(self, store: Store, split: str, batch_size: int, placement: Placement) -> None:
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: expected at least 1.")
        self.store, self.split, self.batch_size, self.placement = store, split, batch_size, placement
        self.records = store.split(split).records
        self.waited_s = 0.0
        self._pipe: Any = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes; a label is an index into them."""
        return self.store.classes

    def close(self) -> None:
        """End DALI's threads and give back its memory. Batches that were handed out stay valid."""
        self._pipe = None

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> tuple[Any, ...]:
        """DALI's next outputs; raises StoreError as dali_errors does."""
        if self._pipe is None:
            raise ValueError("the loader is closed")
        started = time.perf_counter()
        try:
            with dali_errors(self.store, self.split):
                return self.placement.run(self._pipe)
        finally:
            self.waited_s += time.perf_counter() - started

    def _batch(self, outputs: tuple[Any, ...], size: int) -> Batch:
        images, labels = (from_dlpack(output.as_tensor())[:size] for output in outputs[:2])
        if labels.shape != (size, 1):
            raise StoreError(
                f"{self.store.root}: labels of shape {tuple(labels.shape)}, expected {(size, 1)}. Build it again."
            )
        return Batch(images, labels[:, 0].to(torch.int64))


class TrainLoader(_Loader):
    """Epochs of random windows. Iterating serves what is left of the present epoch: whole batches, records //
    batch_size.

    The records that do not fill a batch at the end of one epoch open the next, so that none is served less often.
    """

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        seed: int,
        how: Augmentation,
        threads: int,
    ) -> None:
        super().__init__(store, split, batch_size, placement)
        if self.records < batch_size:
            raise UserError(
                f"{store.root} has {self.records:,} records in {split}, a batch takes {batch_size:,}. "
                f"Ask for a batch of at most {self.records:,}."
            )
        self.seed, self.how, self.threads = seed, how, threads
        self.batches_served = 0
        self._build(None)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.records // self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        """The batches that are left of this epoch; a new iterator after its end begins the next."""
        while True:
            batch = self._batch(self._run(), self.batch_size)
            self.batches_served += 1
            last = self.batches_served % len(self) == 0
            yield batch
            if last:
                return

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, to continue with the next batch to the bit: JSON-able, a few hundred bytes."""
        blob = base64.b64encode(self._pipe.checkpoint()).decode("ascii")
        return {**self._identity(), "batches_served": self.batches_served, "dali": blob}

    def can_continue(self, state: Mapping[str, Any]) -> bool:
        """Whether a state is of the same kind of device and the same versions; where not, no bits can be promised."""
        mine = self._identity()
        return all(state.get(name) == mine[name] for name in ("graph_version", "dali_version", "device_kind"))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state of the same store, geometry and settings; raises UserError naming what differs.

        DALI itself would take the state of another data set or batch size, and serve something else.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise UserError(f"stream state of another {name.replace('_', ' ')}: {state.get(name)}, here {mine}.")
        self._build(base64.b64decode(state["dali"]))
        self.batches_served = int(state["batches_served"])

    def _identity(self) -> dict[str, Any]:
        return {
            "graph_version": GRAPH_VERSION,
            "dali_version": dali().__version__,
            "store_fingerprint": self.store.split(self.split).fingerprint,
            "split": self.split,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "augmentation": asdict(self.how),
            "device_kind": self.placement.decoder,
        }

    def _build(self, checkpoint: bytes | None) -> None:
        self._pipe = None
        self._pipe = train_graph(
            self.store, self.split, self.batch_size, self.placement, self.seed, self.how, self.threads, checkpoint
        )


class EvalLoader(_Loader):
    """Every image of a split exactly once, each time it is iterated; the last batch may be smaller."""

    def __init__(
        self,
        store: Store,
        split: str,
        batch_size: int,
        placement: Placement,
        views: int,
        how: Augmentation,
        threads: int,
    ) -> None:
        super().__init__(store, split, batch_size, placement)
        if views not in (1, 10):
            raise UserError(f"views {views}: expected 1 (centre) or 10 (corners and centre, and these mirrored).")
        self.views = views
        self._unfinished = 0  # batches of a pass that was left early
        augmenter = Augmenter(store, placement, how)
        pipe = unbuilt_pipeline(batch_size, placement, 0, threads)
        with pipe:
            # Padding repeats the last record to fill the last batch, and makes every pass begin with the first.
            record, label = reader(store, split, seed=0, shuffle=False, pad_last_batch=True)
            image = augmenter.centre_view(record) if views == 1 else augmenter.ten_views(record)
            pipe.set_outputs(image, placement.place(label))
        with dali_errors(store, split):
            pipe.build()
        self._pipe = pipe

    def __len__(self) -> int:
        """Batches in a pass."""
        return -(-self.records // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """One pass over the split; a pass that is left early is finished unseen before the next."""
        for _ in range(self._unfinished):
            self._run()
        self._unfinished = len(self)
        for index in range(len(self)):
            size = min(self.batch_size, self.records - index * self.batch_size)
            outputs = self._run()
            self._unfinished -= 1
            yield self._batch(outputs, size)


def train_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str = "cpu",
    seed: int = 0,
    *,
    split: str = "train",
    augmentation: Augmentation | None = None,
    threads: int | None = None,
) -> TrainLoader:
    """Training batches of `store`: random 224×224 window, flip, colour noise (the paper, section 4.1), minus the mean.

    store         folder that `alexprep build-lmdb` wrote
    batch_size    images in a batch; an epoch has records // batch_size of them
    device        "cpu" or "cuda:N": where DALI decodes and augments, and where the batches lie
    seed          of every random draw: the same seed gives the same bits for any number of threads
    augmentation  readings of mean and colour noise; see pipeline.augment.Augmentation
    threads       of DALI on the CPU; None: all cores this process may use

    Gives Batch(images, labels): float32 (N, 3, 224, 224) RGB in grey levels minus the mean, int64 (N,).
    Raises StoreError for a store that is missing, damaged or of another version; UserError for a batch larger than the
    split, a GPU that is not there, and where DALI is not installed.
    """
    placement = Placement.of(device)
    how = augmentation or Augmentation()
    return TrainLoader(Store.open(store), split, batch_size, placement, seed, how, threads or usable_cores())


def eval_loader(
    store: str | Path,
    batch_size: int = 128,
    device: str = "cpu",
    *,
    views: int = 1,
    split: str = "val",
    augmentation: Augmentation | None = None,
    threads: int | None = None,
) -> EvalLoader:
    """Every image of `split` exactly once: the centre window, or with views=10 the four corners and the centre, then
    mirrored.

    Gives Batch(images, labels): float32 (N, 3, 224, 224), or (N, 10, 3, 224, 224) for ten views (6 MB an image: choose
    batch_size accordingly), RGB in grey levels minus the mean of the training split; int64 (N,). Of `augmentation`
    only the mean counts here. Other arguments and errors as train_loader's.
    """
    placement = Placement.of(device)
    how = augmentation or Augmentation()
    return EvalLoader(Store.open(store), split, batch_size, placement, views, how, threads or usable_cores())


def train_graph(
    store: Store,
    split: str,
    batch_size: int,
    placement: Placement,
    seed: int,
    how: Augmentation,
    threads: int,
    checkpoint: bytes | None = None,
) -> Any:
    """The built DALI pipeline of training. Its outputs: images, labels, then the draws (offset, flip, shift)."""
    reader_seed, pipe_seed, *draw_seeds = (int(s) for s in np.random.SeedSequence(seed).generate_state(5) >> 1)
    augmenter = Augmenter(store, placement, how)
    pipe = unbuilt_pipeline(batch_size, placement, pipe_seed, threads, enable_checkpointing=True, checkpoint=checkpoint)
    with pipe:
        record, label = reader(store, split, seed=reader_seed, shuffle=True, pad_last_batch=False)
        draws = augmenter.draw(batch_size, (draw_seeds[0], draw_seeds[1], draw_seeds[2]))
        pipe.set_outputs(augmenter.training_image(record, draws), placement.place(label), *draws)
    with dali_errors(store, split):
        pipe.build()
    return pipe


def unbuilt_pipeline(batch_size: int, placement: Placement, seed: int, threads: int, **more: Any) -> Any:
    """A DALI pipeline with the settings that all of ours share, for a graph to be defined in."""
    return dali().Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=placement.device_id,
        seed=seed,
        exec_dynamic=True,  # gives every batch memory of its own
        prefetch_queue_depth=2,
        **more,
    )


def reader(store: Store, split: str, seed: int, shuffle: bool, pad_last_batch: bool) -> tuple[Any, Any]:
    """The graph's source: nodes of the encoded picture, uint8 (bytes,), and the label, int32 (1,)."""
    info = store.split(split)
    mean_bytes = max(1, info.bytes // info.records)
    record, label = dali().fn.readers.caffe(
        path=store.shard_paths(split),
        random_shuffle=shuffle,
        initial_fill=max(1, min(info.records, _SHUFFLE_BYTES // mean_bytes)) if shuffle else 1,
        pad_last_batch=pad_last_batch,
        tensor_init_bytes=mean_bytes,
        seed=seed,
        name="reader",
    )
    return record, label

"""Streams that tools.bench.stream measures in its own process: this project's stream, torch's DataLoader and DALI.

Each stream is a generator that yields batches without end. A batch is float32 (128, 3, 224, 224): random crops,
mirrored with probability ½, minus the channel mean. The functions at the end of this module write the files and build
the stores that the contestants read.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pipeline.augment import Augmentation
from pipeline.loader import train_loader
from prep.build.split import build_split
from prep.console import Progress, UserError
from prep.inputs.sources import list_source
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Settings, Store
from prep.version import pip_command
from prep.workers import WorkerPool
from tools.bench.harness import make_photo_digits
from tools.bench.peers.stream_turn import BATCH, CROP_PX, random_crop

Decoder = Callable[[bytes], npt.NDArray[np.uint8]]
Batches = Generator[Any, None, None]


def decode_with_pillow(content: bytes) -> npt.NDArray[np.uint8]:
    """Return RGB pixels, uint8 (H, W, 3), of an image file."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


class LmdbDataset(Dataset[tuple[Tensor, int]]):
    """Training records of a store for torch's DataLoader. Each worker process opens the LMDB itself."""

    def __init__(self, store: Store, decode: Decoder) -> None:
        self.keys = [(path, key) for path in store.shard_paths("train") for key, _ in lmdb_shard.read(Path(path))]
        self.mean = np.array(store.color_stats().mean_rgb, np.float32)
        self.decode = decode
        self.shards: dict[str, Any] = {}  # path -> LMDB environment

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, key = self.keys[index]
        if path not in self.shards:
            self.shards[path] = lmdb.open(path, readonly=True, lock=False, readahead=False)
        with self.shards[path].begin() as txn:
            datum = Datum.decode(txn.get(key))
        return torch.from_numpy(random_crop(self.decode(datum.data), self.mean)), datum.label


def torch_batches(store: Store, threads: int, decode: Decoder) -> Batches:
    """Return batches of torch's DataLoader.

    The workers are spawned, because DALI's threads in this process make forking unsafe.
    """
    dataset = LmdbDataset(store, decode)
    # This sampler gives random permutations of the records without end.
    sampler = RandomSampler(dataset, num_samples=1 << 40)
    for images, _ in DataLoader(dataset, BATCH, sampler=sampler, num_workers=threads, multiprocessing_context="spawn"):
        yield images


def import_dali() -> Any:
    """Return the module nvidia.dali. Raises UserError if DALI is not installed."""
    try:
        return import_module("nvidia.dali")
    except ModuleNotFoundError:
        raise UserError(f"NVIDIA DALI is not installed. Install DALI with: {pip_command('cuda13')}") from None


def dali_batches(store: Store, threads: int) -> Batches:
    """Return batches of the pipeline in DALI's documentation. Raises UserError if DALI is not installed."""
    dali = import_dali()
    fn, types = dali.fn, dali.types
    pipe = dali.Pipeline(batch_size=BATCH, num_threads=threads, device_id=None)
    with pipe:
        records, labels = fn.readers.caffe(path=store.shard_paths("train"), random_shuffle=True, name="reader")
        images = fn.decoders.image(records, device="cpu", output_type=types.RGB)
        images = fn.crop_mirror_normalize(
            images,
            crop=(CROP_PX, CROP_PX),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
            mean=list(store.color_stats().mean_rgb),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipe.set_outputs(images, labels)
    pipe.build()
    while True:
        yield pipe.run()[0].as_tensor()


def our_batches(store: Store, threads: int, augmentation: Augmentation | None = None) -> Batches:
    """Return batches of this project's stream, epoch after epoch. `augmentation`: None for the default settings."""
    loader = train_loader(store.root, batch_size=BATCH, augmentation=augmentation, threads=threads)
    with closing(loader):
        while True:
            for images, _ in loader:
                yield images


def jpeg_store(store: Path | None, work_dir: Path, threads: int) -> Store:
    """Open the store at the path `store`. If `store` is None, build a store of the images of tools.photo_digits.

    Raises UserError for a store of PPM records.
    """
    if store is None:
        settings = Settings(256, False, "jpeg", 90, "area", 0)
        return build_store(make_photo_digits(work_dir / "digits"), work_dir / "jpeg", settings, threads)
    opened = Store.open(store)
    if opened.settings.format != "jpeg":
        raise UserError(f"--store {store} holds {opened.settings.format} records. Name a store of JPEG records.")
    return opened


def train_records(store: Store) -> Iterator[Datum]:
    """Yield the training records in the order of the store."""
    return (Datum.decode(value) for path in store.shard_paths("train") for _, value in lmdb_shard.read(Path(path)))


def write_files(store: Store, folder: Path, count: int | None) -> Path:
    """Write the images of the first `count` training records (None: all records) to FOLDER/LABEL/NUMBER.jpg."""
    for number, datum in enumerate(islice(train_records(store), count)):
        path = folder / f"{datum.label:04d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(datum.data)
    return folder


def build_store(folder: Path, store: Path, settings: Settings, threads: int) -> Store:
    """Build a store from the class folders in `folder`. The only split of the store is `train`."""
    source = list_source(folder, "train")
    with WorkerPool(threads) as workers:
        return build_split(source, store, settings, workers, Progress(len(source.inputs), "pictures"))

"""How fast batches of 128 training images come, beside torch's DataLoader, a plain DALI graph and the bounds.

ours     pipeline.loader.train_loader as a training has it: random window, flip, colour noise, mean, float32 tensors.
         On JPEG records; on the same with the mean image in place of a mean for each channel; on PPM records.
torch    DataLoader with as many workers as we have threads: each opens the LMDB with py-lmdb, reads prep.datum.Datum,
         decodes with Pillow, cuts a random window, flips, makes floats, subtracts the mean. No colour noise.
DALI     the graph of its documentation: readers.caffe, decoders.image, crop_mirror_normalize at a random place. No
         colour noise, and its batches are not handed over to torch.
bounds   on threads, from memory: libjpeg-turbo (simplejpeg) decodes the JPEG records and does nothing else; the bytes
         of the PPM records are copied and nothing else.

Streams are endless, their workers live through all turns. Before each turn some batches are taken uncounted, so that
none which was made ahead in someone else's turn counts. Not timed, then: starting workers, filling shuffle buffers.
Choose a store that fits the page cache. The PPM twin has the pixels of the store's first 2,000 JPEG records.

FFCV is not here, for it needs system packages; nor is a GPU.
"""

from __future__ import annotations

import io
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import click
import lmdb
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from pipeline.augment import WINDOW_PX, Augmentation
from pipeline.loader import train_loader
from pipeline.placement import dali
from prep import shard
from prep.build import build_split
from prep.console import Progress, UserError, say
from prep.datum import Datum
from prep.manifest import Settings, Store
from prep.runners import Workers
from prep.sources import read_source
from tools.side_by_side import Benchmark, Contestant, common_options, libjpeg_turbo, photo_digits, race, show

BATCH = 128
_AHEAD = 8  # batches: more than any of the streams makes ahead of its consumer
_HELD_RECORDS = 2000
_JPEG_BOUND, _PPM_BOUND = "bound, JPEG: decode alone", "bound, PPM: copy alone"


class LmdbPictures(Dataset[tuple[Tensor, int]]):
    """The torch peer's data set: records of a store, opened in whichever worker asks."""

    def __init__(self, store: Store) -> None:
        self.keys = [(path, key) for path in store.shard_paths("train") for key, _ in shard.read(Path(path))]
        self.mean = np.array(store.colour().mean_rgb, np.float32)
        self.shards: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, key = self.keys[index]
        if path not in self.shards:
            self.shards[path] = lmdb.open(path, readonly=True, lock=False, readahead=False)
        with self.shards[path].begin() as txn:
            datum = Datum.decode(txn.get(key))
        image = Image.open(io.BytesIO(datum.data)).convert("RGB")
        left, top = random.randint(0, image.width - WINDOW_PX), random.randint(0, image.height - WINDOW_PX)
        image = image.crop((left, top, left + WINDOW_PX, top + WINDOW_PX))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image, np.float32) - self.mean
        return torch.from_numpy(pixels.transpose(2, 0, 1)), datum.label


def torch_batches(store: Store, threads: int) -> Iterator[Any]:
    """The torch peer. Workers are spawned: DALI's threads in this process make a fork unsafe."""
    pictures = LmdbPictures(store)
    sampler = RandomSampler(pictures, num_samples=1 << 40)  # permutation after permutation
    return iter(DataLoader(pictures, BATCH, sampler=sampler, num_workers=threads, multiprocessing_context="spawn"))


def dali_batches(store: Store, threads: int) -> Iterator[Any]:
    """The DALI peer."""
    fn, types = dali().fn, dali().types
    pipe = dali().Pipeline(batch_size=BATCH, num_threads=threads, device_id=None)
    with pipe:
        records, labels = fn.readers.caffe(path=store.shard_paths("train"), random_shuffle=True, name="reader")
        images = fn.decoders.image(records, device="cpu", output_type=types.RGB)
        images = fn.crop_mirror_normalize(
            images,
            crop=(WINDOW_PX, WINDOW_PX),
            crop_pos_x=fn.random.uniform(range=(0.0, 1.0)),
            crop_pos_y=fn.random.uniform(range=(0.0, 1.0)),
            mirror=fn.random.coin_flip(),
            mean=list(store.colour().mean_rgb),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipe.set_outputs(images, labels)
    pipe.build()
    return (pipe.run() for _ in repeat(None))


def stream(name: str, batches: Iterable[Any], count: int, bound: str) -> Contestant:
    """`count` batches of an endless stream a turn, after those that were made ahead."""
    endless = iter(batches)

    def take(number: int) -> int:
        return BATCH * sum(1 for _ in islice(endless, number))

    return Contestant(name, lambda: take(count), bound, lambda: take(_AHEAD))


def first_records(store: Store) -> list[bytes]:
    """The files in the first records, in memory."""
    records = chain.from_iterable(shard.read(Path(path)) for path in store.shard_paths("train"))
    return [Datum.decode(value).data for _, value in islice(records, _HELD_RECORDS)]


def bound(name: str, work: Callable[[bytes], object], store: Store, count: int, threads: int) -> Contestant:
    """`work` alone, on as many records as `count` batches have."""
    held = first_records(store)
    pool = ThreadPoolExecutor(threads)
    each = BATCH * count // threads

    def one_thread(first: int) -> int:
        for index in range(first, first + each):
            work(held[index % len(held)])
        return each

    return Contestant(name, lambda: sum(pool.map(one_thread, range(0, each * threads, each))), bound=name)


def build(folder: Path, store: Path, settings: Settings, threads: int) -> Store:
    """A store of the folders of classes in `folder`."""
    source = read_source(folder, "train", None, None, ())
    with Workers(threads) as workers:
        return build_split(source, store, settings, workers, Progress(len(source.inputs), "pictures"))


def ppm_twin(jpeg: Store, work: Path, threads: int) -> Store:
    """The pixels of a store's first records, as PPM records in a store of their own."""
    folder = work / "records" / "all"
    folder.mkdir(parents=True)
    for number, content in enumerate(first_records(jpeg)):
        (folder / f"{number:08d}.jpg").write_bytes(content)
    return build(folder.parent, work / "ppm", replace(jpeg.settings, format="ppm"), threads)


def ours(store: Store, threads: int, mean: str = "channel") -> Iterator[Any]:
    """Our stream, epoch after epoch."""
    return chain.from_iterable(
        repeat(train_loader(store.root, BATCH, augmentation=Augmentation(mean), threads=threads))
    )


@click.command(cls=Benchmark)
@click.option(
    "--store", type=click.Path(path_type=Path), help="JPEG store.  [default: one of the photo digits, made now]"
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="Of everyone.")
@click.option("--batches", type=click.IntRange(1), default=32, show_default=True, help="Of each contestant, each turn.")
@common_options
def main(store: Path | None, threads: int, batches: int, rounds: int, as_json: bool) -> None:
    """Measure the training stream in batches of 128, beside torch's DataLoader, a plain DALI graph and bare decoding.

    \b
    Example:
      python -m tools.bench_stream --rounds 5
      python -m tools.bench_stream --store store --threads 2
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if store is None:
            settings = Settings(256, False, "jpeg", 90, "area", 0)
            jpeg = build(photo_digits(work / "digits"), work / "jpeg", settings, threads)
        else:
            jpeg = Store.open(store)
        if jpeg.settings.format != "jpeg":
            raise UserError(f"--store {store} holds {jpeg.settings.format} records. Name a store of JPEG records.")
        say(f"{jpeg.split('train').records:,} JPEG records; building a PPM twin")
        ppm = ppm_twin(jpeg, work, threads)
        contestants = (
            stream("ours, JPEG", ours(jpeg, threads), batches, _JPEG_BOUND),
            stream("ours, JPEG, mean image", ours(jpeg, threads, "image"), batches, _JPEG_BOUND),
            stream("torch DataLoader, Pillow, JPEG", torch_batches(jpeg, threads), batches, _JPEG_BOUND),
            stream("DALI, plain graph, JPEG", dali_batches(jpeg, threads), batches, _JPEG_BOUND),
            bound(_JPEG_BOUND, libjpeg_turbo().decode_jpeg, jpeg, batches, threads),
            stream("ours, PPM", ours(ppm, threads), batches, _PPM_BOUND),
            # numpy's copy lets go of the interpreter's lock, as that of bytes and bytearray does not
            bound(_PPM_BOUND, lambda record: np.frombuffer(record, np.uint8).copy(), ppm, batches, threads),
        )
        rows = race(contestants, rounds)
    more = {"records": jpeg.split("train").records, "batch": BATCH, "batches": batches, "threads": threads}
    show(rows, as_json, {**more, "rounds": rounds})


if __name__ == "__main__":
    main()

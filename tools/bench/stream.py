"""How fast batches of 128 training images come, beside FFCV, SPDL, WebDataset, torch's DataLoader, DALI and the bounds.

Everyone gives batches without end: random window of 224 px, flip, minus the channel mean, float32 NCHW, labels.

ours        pipeline.loader.train_loader as a training has it, with colour noise, too. On JPEG records; on the same
            with the mean image in place of a mean for each channel; on PPM records.
torch       DataLoader whose workers each open the LMDB with py-lmdb, read prep.store.datum.Datum, and decode with Pillow or
            with simplejpeg, which is libjpeg-turbo. NumPy does the rest.
FFCV        on a .beton of the same JPEG files, and on one of pixels (tools/bench/peers/ffcv_stream.py).
SPDL        its threads on the same files, decoded by its FFmpeg or by simplejpeg (tools/bench/peers/spdl_stream.py).
WebDataset  tar archives of the same files, decoded by Pillow in DataLoader's workers
            (tools/bench/peers/webdataset_stream.py).
DALI        the graph of its documentation: readers.caffe, decoders.image, crop_mirror_normalize at a random place. Its
            batches are not handed over to torch.
bounds      on threads, from memory: libjpeg-turbo (simplejpeg) decodes the JPEG records and does nothing else; the
            bytes of the PPM records are copied and nothing else.

Everyone has --threads worker threads or processes, is held to as many cores, and reads from the page cache: choose a
store that fits it. FFCV, SPDL and WebDataset live in interpreters of their own, in processes that are given the word
in turn; the others live in this process. All live through all turns. Before each turn batches are taken uncounted, so
that none which was made ahead in someone else's turn counts. Not timed: starting, compiling, writing .beton files and
archives, filling shuffle buffers. Two batches of each are looked at beforehand: type, shape, values, no two the same.

PPM records and the .beton of pixels have the store's first 2,000 records. A GPU is not here.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any

import click
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
from prep.console import Progress, UserError, say
from prep.inputs.sources import list_source
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Settings, Store
from prep.workers import WorkerPool
from tools.bench.harness import (
    INTERPRETER,
    Benchmark,
    Contestant,
    Program,
    common_options,
    libjpeg_turbo,
    ours_over,
    photo_digits,
    race,
    ratio_lines,
    show,
)
from tools.bench.peers.stream_turn import BATCH, CROP_PX, images_per_s, look_at, random_window

_HELD_RECORDS = 2000
_OURS_PPM = "ours, PPM"
_JPEG_BOUND, _PPM_BOUND = "bound, JPEG: decode alone", "bound, PPM: copy alone"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_PATIENCE_S = 20.0

Decoder = Callable[[bytes], npt.NDArray[np.uint8]]


def pillow(content: bytes) -> npt.NDArray[np.uint8]:
    """The pixels of a file, by Pillow."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


class LmdbPictures(Dataset[tuple[Tensor, int]]):
    """The torch peers' data set: records of a store, opened in whichever worker asks."""

    def __init__(self, store: Store, decode: Decoder) -> None:
        self.keys = [(path, key) for path in store.shard_paths("train") for key, _ in lmdb_shard.read(Path(path))]
        self.mean = np.array(store.color_stats().mean_rgb, np.float32)
        self.decode = decode
        self.shards: dict[str, Any] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, key = self.keys[index]
        if path not in self.shards:
            self.shards[path] = lmdb.open(path, readonly=True, lock=False, readahead=False)
        with self.shards[path].begin() as txn:
            datum = Datum.decode(txn.get(key))
        return torch.from_numpy(random_window(self.decode(datum.data), self.mean)), datum.label


def torch_batches(store: Store, threads: int, decode: Decoder) -> Iterator[Any]:
    """A torch peer. Workers are spawned: DALI's threads in this process make a fork unsafe."""
    pictures = LmdbPictures(store, decode)
    sampler = RandomSampler(pictures, num_samples=1 << 40)  # permutation after permutation
    for images, _ in DataLoader(pictures, BATCH, sampler=sampler, num_workers=threads, multiprocessing_context="spawn"):
        yield images


def dali_batches(store: Store, threads: int) -> Iterator[Any]:
    """The DALI peer; raises UserError where DALI is missing."""
    try:
        dali: Any = import_module("nvidia.dali")
    except ModuleNotFoundError:
        raise UserError("it is not installed. Install it with: pip install 'alexnet[cuda13]'") from None
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


def our_batches(store: Store, threads: int, mean: str = "channel") -> Iterator[Any]:
    """Our stream, epoch after epoch."""
    loader = train_loader(store.root, batch_size=BATCH, augmentation=Augmentation(mean), threads=threads)
    with closing(loader):
        while True:
            for images, _ in loader:
                yield images


def records_of(store: Store) -> Iterator[Datum]:
    """In the store's order."""
    return (Datum.decode(value) for path in store.shard_paths("train") for _, value in lmdb_shard.read(Path(path)))


def write_files(store: Store, folder: Path, count: int | None) -> Path:
    """The files in the first `count` records, or in all of them, in folders by their labels."""
    for number, datum in enumerate(islice(records_of(store), count)):
        path = folder / f"{datum.label:04d}" / f"{number:08d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(datum.data)
    return folder


def build(folder: Path, store: Path, settings: Settings, threads: int) -> Store:
    """A store of the folders of classes in `folder`."""
    source = list_source(folder, "train", None, None, ())
    with WorkerPool(threads) as workers:
        return build_split(source, store, settings, workers, Progress(len(source.inputs), "pictures"))


class Field:
    """What everyone reads, for how long, on how many threads; who runs, and who cannot."""

    def __init__(self, jpeg: Store, work: Path, threads: int, seconds: float) -> None:
        self.jpeg, self.work, self.threads, self.seconds = jpeg, work, threads, seconds
        self.racing: list[Contestant] = []
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.stops = ExitStack()
        self.all_files: Path | None = None
        self.first_files = write_files(jpeg, work / "first", _HELD_RECORDS)
        say("building a PPM twin")
        self.ppm = build(self.first_files, work / "ppm", replace(jpeg.settings, format="ppm"), threads)

    def here(self, name: str, batches: Iterator[Any], bound: str = _JPEG_BOUND, ours: str | None = None) -> None:
        """A stream in this process; it is left out where it raises UserError."""
        self.stops.callback(batches.close)  # type: ignore[attr-defined]  # all of them are generators
        try:
            look_at(batches)
        except UserError as error:
            self._leave_out(name, str(error))
            return
        self.racing.append(
            Contestant(name, lambda: images_per_s(batches, self.seconds, self.threads), bound, ours=ours)
        )

    def peer(self, name: str, option: str, python: Path | None, module: str, *more: str, raw: bool = False) -> None:
        """One of tools.bench.peers under the interpreter `python`; it is left out where that is None or it fails."""
        if python is None:
            self._leave_out(name, f"name an interpreter that has it with {option} (how to have one: see --help)")
            return
        if not raw and self.all_files is None:
            self.all_files = write_files(self.jpeg, self.work / "all", None)
        mean = ",".join(str(level) for level in self.jpeg.color_stats().mean_rgb)
        out = self.work / f"peer-{len(self.racing)}"
        command = [str(python.absolute()), "-m", f"tools.bench.peers.{module}"]
        command += [str(self.first_files if raw else self.all_files), str(out), str(self.threads), mean, *more]
        environment = dict.fromkeys(_THREAD_VARIABLES, str(self.threads))
        program = Program(name, command, out.with_suffix(".txt"), environment)
        say(f"starting {name}")
        program.start()
        self.stops.callback(program.stop, _PATIENCE_S)
        try:
            self.versions[name] = program.line()
        except UserError as error:
            self._leave_out(name, f"{str(error).removeprefix(f'{name}: ')} (what {option} needs: see --help)")
            return

        def rate() -> float:
            program.go(f"go {self.seconds}")
            return float(program.line())

        bound, ours = (_PPM_BOUND, _OURS_PPM) if raw else (_JPEG_BOUND, None)
        self.racing.append(Contestant(name, rate, bound, ours=ours))

    def bound(self, name: str, work: Callable[[bytes], object], store: Store, ours: str | None = None) -> None:
        """`work` alone, on the first records."""
        held = [datum.data for datum in islice(records_of(store), _HELD_RECORDS)]
        pool = self.stops.enter_context(ThreadPoolExecutor(self.threads))

        def one_thread(first: int, until: float) -> int:
            done = 0
            while time.perf_counter() < until:
                work(held[(first + done * self.threads) % len(held)])
                done += 1
            return done

        def rate() -> float:
            started = time.perf_counter()
            until = started + self.seconds
            done = sum(pool.map(one_thread, range(self.threads), [until] * self.threads))
            return done / (time.perf_counter() - started)

        self.racing.append(Contestant(name, rate, name, ours=ours))

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        say(f"{name} is left out: {why}")


def enter(field: Field, ffcv: Path | None, spdl: Path | None, webdataset: Path | None, more: bool) -> None:
    """Everyone who can run here; says who cannot, and why."""
    jpeg, ppm, threads = field.jpeg, field.ppm, field.threads
    turbo = libjpeg_turbo().decode_jpeg
    field.here("ours, JPEG", our_batches(jpeg, threads))
    field.here("ours, JPEG, mean image", our_batches(jpeg, threads, "image"))
    field.here("torch DataLoader, Pillow, JPEG", torch_batches(jpeg, threads, pillow))
    field.here("torch DataLoader, simplejpeg, JPEG", torch_batches(jpeg, threads, turbo))
    field.peer("FFCV, JPEG", "--ffcv-python", ffcv, "ffcv_stream", "jpg", "last")
    if more:
        field.peer("FFCV, JPEG, channels first", "--ffcv-python", ffcv, "ffcv_stream", "jpg", "first")
    field.peer("SPDL, FFmpeg, JPEG", "--spdl-python", spdl, "spdl_stream", "ffmpeg")
    field.peer("SPDL, simplejpeg, JPEG", "--spdl-python", spdl, "spdl_stream", "simplejpeg")
    field.peer("WebDataset, Pillow, JPEG", "--webdataset-python", webdataset, "webdataset_stream")
    field.here("DALI, plain graph, JPEG", dali_batches(jpeg, threads))
    field.bound(_JPEG_BOUND, turbo, jpeg)
    field.here(_OURS_PPM, our_batches(ppm, threads), _PPM_BOUND, _OURS_PPM)
    field.peer("FFCV, raw", "--ffcv-python", ffcv, "ffcv_stream", "raw", "last", raw=True)
    if more:
        field.peer("FFCV, raw, channels first", "--ffcv-python", ffcv, "ffcv_stream", "raw", "first", raw=True)
    # numpy's copy lets go of the interpreter's lock, as that of bytes and bytearray does not
    field.bound(_PPM_BOUND, lambda record: np.frombuffer(record, np.uint8).copy(), ppm, _OURS_PPM)
    for name, versions in field.versions.items():
        say(f"{name}: {versions}")


@click.command(cls=Benchmark)
@click.option(
    "--store", type=click.Path(path_type=Path), help="JPEG store.  [default: one of the photo digits, made now]"
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True, help="And cores; of everyone.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    show_default=True,
    help="Counted time of each contestant, each turn.",
)
@click.option("--ffcv-python", type=INTERPRETER, metavar="PATH", help="Interpreter that has FFCV; else left out.")
@click.option("--spdl-python", type=INTERPRETER, metavar="PATH", help="Interpreter that has SPDL; else left out.")
@click.option(
    "--webdataset-python", type=INTERPRETER, metavar="PATH", help="Interpreter that has WebDataset; else left out."
)
@click.option("--more", is_flag=True, help="Also FFCV with channels first in memory.")
@common_options
def main(
    store: Path | None,
    threads: int,
    seconds: float,
    ffcv_python: Path | None,
    spdl_python: Path | None,
    webdataset_python: Path | None,
    more: bool,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure the training stream in batches of 128, beside FFCV, SPDL, WebDataset, torch, DALI and bare decoding.

    FFCV wants an environment of its own: the system's libopencv-dev, libturbojpeg0-dev and pkg-config; in a new venv
    `pip install 'numpy<2.3' torch setuptools wheel pillow`, then `pip install --no-build-isolation ffcv`. SPDL wants
    FFmpeg's libraries of the system (on Debian: libavdevice59) and `pip install spdl simplejpeg numpy`; WebDataset
    `pip install webdataset torch pillow`. One environment may do for both.

    \b
    Example:
      python -m tools.bench.stream --rounds 5
      python -m tools.bench.stream --store store --ffcv-python ffcv/bin/python \\
          --spdl-python peers/bin/python --webdataset-python peers/bin/python
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if store is None:
            settings = Settings(256, False, "jpeg", 90, "area", 0)
            jpeg = build(photo_digits(work / "digits"), work / "jpeg", settings, threads)
        else:
            jpeg = Store.open(store)
        if jpeg.settings.format != "jpeg":
            raise UserError(f"--store {store} holds {jpeg.settings.format} records. Name a store of JPEG records.")
        records = jpeg.split("train").records
        say(f"{records:,} JPEG records, {threads} threads")
        field = Field(jpeg, work, threads, seconds)
        with field.stops:
            enter(field, ffcv_python, spdl_python, webdataset_python, more)
            os.sync()  # what was written now shall not be written in someone's turn
            rows = race(field.racing, rounds)
    told = {"records": records, "batch": BATCH, "seconds": seconds, "threads": threads, "rounds": rounds}
    known = {"ours_over": ours_over(rows), "versions": field.versions, "left_out": field.left_out}
    show(rows, as_json, {**told, **known}, ratio_lines(rows))


if __name__ == "__main__":
    main()

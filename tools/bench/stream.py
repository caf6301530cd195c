"""Benchmark of the training stream on CPU threads: images/s in batches of 128, compared with other loaders and bounds.

Every contestant except the bounds is a stream. A stream yields batches without end: random crops of 224 px, flipped at
random, minus the channel mean, float32 NCHW, together with labels.

ours        pipeline.loader.train_loader with its default augmentation, which adds colour noise. The stream is timed on
            JPEG records with the channel mean, on JPEG records with the mean image, and on PPM records.
torch       torch.utils.data.DataLoader whose workers each open the LMDB with py-lmdb, parse records with
            prep.store.datum.Datum, and decode with Pillow or with simplejpeg (libjpeg-turbo). NumPy crops, mirrors and
            subtracts the mean.
FFCV        FFCV's Loader on a .beton file (FFCV's format) of the store's JPEG files, and on a .beton file of raw pixels
            (tools/bench/peers/ffcv_stream.py).
SPDL        SPDL's threads on the store's JPEG files, decoded by SPDL's FFmpeg or by simplejpeg
            (tools/bench/peers/spdl_stream.py).
WebDataset  tar archives of the store's JPEG files, decoded by Pillow in the workers of a DataLoader
            (tools/bench/peers/webdataset_stream.py).
DALI        the pipeline of DALI's documentation: readers.caffe, decoders.image, crop_mirror_normalize at a random
            offset. The batches are not converted to torch tensors.
bounds      upper bounds: threads that read from memory and do only one thing. They decode the JPEG records with
            libjpeg-turbo (simplejpeg), or copy the bytes of the PPM records.

Every contestant has --threads worker threads or processes and may use --threads cores. Streams read from the page
cache, so choose a store that fits into memory. FFCV, SPDL and WebDataset run in separate processes, which are called
peers, each with its own Python interpreter. All other contestants run in the process of the benchmark. The contestants
run one after another. A turn is one timed run of a contestant (tools/bench/harness.py). All streams keep prefetching
between their turns. Each turn of a stream first discards some batches. Batches that were prefetched during another
contestant's turn are therefore not counted.

Starting, compiling, writing .beton files and archives, and filling shuffle buffers are not timed. Before the first
round, the benchmark checks two batches of each stream: dtype, shape and range of values. The two batches must differ,
and the first two images of a batch must differ.

The PPM records and the .beton file of pixels hold the images of the first 2,000 records of the store. No GPU is used.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from pipeline.augment import Augmentation
from prep.console import UserError, say
from prep.store.manifest import Store
from tools.bench.harness import (
    INTERPRETER,
    BenchmarkCommand,
    Contestant,
    LineProcess,
    common_options,
    import_simplejpeg,
    print_results,
    race,
    speedup_lines,
    speedups,
)
from tools.bench.loaders import (
    Batches,
    build_store,
    dali_batches,
    decode_with_pillow,
    jpeg_store,
    our_batches,
    torch_batches,
    train_records,
    write_files,
)
from tools.bench.peers.stream_turn import BATCH, RESIZED, check_batches, images_per_s

_IN_MEMORY_RECORDS = 2000
_OURS_PPM = "ours, PPM"
_JPEG_BOUND, _PPM_BOUND = "bound, JPEG: decode alone", "bound, PPM: copy alone"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
_STOP_TIMEOUT_S = 20.0  # time between closing the standard input of a peer and terminating the peer, in seconds


class StreamBenchmark:
    """Collects the contestants, and makes the stores and files that the contestants read.

    The caller closes `cleanup` at the end. If `is_resized`, the streams are those of tools.bench.resized.
    """

    def __init__(self, jpeg: Store, work_dir: Path, threads: int, seconds: float, is_resized: bool = False) -> None:
        self.jpeg, self.work_dir, self.threads, self.seconds = jpeg, work_dir, threads, seconds
        self.is_resized = is_resized
        self.contestants: list[Contestant] = []
        self.versions: dict[str, str] = {}  # name of a peer -> versions of its libraries
        self.left_out: dict[str, str] = {}  # contestant -> reason why it is left out
        self.cleanup = ExitStack()

    @cached_property
    def all_files(self) -> Path:
        """Folder with a JPEG file for each training record."""
        return write_files(self.jpeg, self.work_dir / "all", None)

    @cached_property
    def first_files(self) -> Path:
        """Folder with a JPEG file for each of the first 2,000 training records."""
        return write_files(self.jpeg, self.work_dir / "first", _IN_MEMORY_RECORDS)

    @cached_property
    def ppm(self) -> Store:
        """A store of the first 2,000 records in PPM format."""
        say("building a store of the same images as PPM records")
        return build_store(
            self.first_files, self.work_dir / "ppm", replace(self.jpeg.settings, format="ppm"), self.threads
        )

    def add_stream(self, name: str, batches: Batches, bound: str = _JPEG_BOUND, ours: str | None = None) -> None:
        """Add a stream that runs in this process. A stream that raises UserError is left out."""
        self.cleanup.callback(batches.close)
        try:
            check_batches(batches, self.is_resized)
        except UserError as error:
            self._leave_out(name, str(error))
            return
        self.contestants.append(
            Contestant(name, lambda: images_per_s(batches, self.seconds, self.threads), bound, ours=ours)
        )

    def add_peer(
        self,
        name: str,
        option: str,
        python: Path | None,
        module: str,
        *arguments: str,
        raw: bool = False,
        bound: str = _JPEG_BOUND,
    ) -> None:
        """Add a program of tools.bench.peers. The interpreter `python` runs the program.

        With `raw`, the program gets only the first 2,000 records, and is compared with our stream of PPM records and
        the bound of PPM records. Without `raw`, the upper bound is the contestant `bound`.
        """
        if python is None:
            self._leave_out(name, f"{option} must name an interpreter that has the library (to install it: see --help)")
            return
        mean_rgb = Augmentation.preset("resnet").mean if self.is_resized else self.jpeg.color_stats().mean_rgb
        mean = ",".join(str(level) for level in mean_rgb)
        arguments = (*arguments, RESIZED) if self.is_resized else arguments
        out = self.work_dir / f"peer-{len(self.contestants)}"
        command = [str(python.absolute()), "-m", f"tools.bench.peers.{module}"]
        command += [str(self.first_files if raw else self.all_files), str(out), str(self.threads), mean, *arguments]
        environment = dict.fromkeys(_THREAD_VARIABLES, str(self.threads))
        process = LineProcess(name, command, out.with_suffix(".txt"), environment)
        say(f"starting {name}")
        process.start()
        self.cleanup.callback(process.stop, _STOP_TIMEOUT_S)
        try:
            self.versions[name] = process.read_line()
        except UserError as error:
            self._leave_out(name, f"{str(error).removeprefix(f'{name}: ')} (--help lists what {option} needs)")
            return

        def rate() -> float:
            process.send(f"go {self.seconds}")
            return float(process.read_line())

        bound, ours = (_PPM_BOUND, _OURS_PPM) if raw else (bound, None)
        self.contestants.append(Contestant(name, rate, bound, ours=ours))

    def add_bound(self, name: str, work: Callable[[bytes], object], store: Store, ours: str | None = None) -> None:
        """Add a bound, which calls `work` on each of the first 2,000 records of `store`. The records are in memory."""
        contents = [datum.data for datum in islice(train_records(store), _IN_MEMORY_RECORDS)]
        self.add_bound_of(name, work, contents, 1, ours)

    def add_bound_of(
        self, name: str, work: Callable[[Any], object], contents: Sequence[Any], images: int, ours: str | None = None
    ) -> None:
        """Add a bound, which calls `work` on each item of `contents`. An item has `images` images."""
        pool = self.cleanup.enter_context(ThreadPoolExecutor(self.threads))

        def run_thread(first: int, until: float) -> int:
            done = 0
            while not done or time.perf_counter() < until:  # at least one item, even if the thread starts late
                work(contents[(first + done * self.threads) % len(contents)])
                done += 1
            return done

        def rate() -> float:
            started = time.perf_counter()
            until = started + self.seconds
            done = sum(pool.map(run_thread, range(self.threads), [until] * self.threads))
            return images * done / (time.perf_counter() - started)

        self.contestants.append(Contestant(name, rate, name, ours=ours))

    def _leave_out(self, name: str, reason: str) -> None:
        self.left_out[name] = reason
        say(f"{name} is left out: {reason}")


def add_contestants(
    benchmark: StreamBenchmark, ffcv: Path | None, spdl: Path | None, webdataset: Path | None, more: bool
) -> None:
    """Add all contestants. A program of tools.bench.peers takes part only if its Python interpreter is given.

    Prints each peer that is left out, with the reason.
    """
    jpeg, ppm, threads = benchmark.jpeg, benchmark.ppm, benchmark.threads
    decode_jpeg = import_simplejpeg().decode_jpeg
    benchmark.add_stream("ours, JPEG", our_batches(jpeg, threads))
    benchmark.add_stream("ours, JPEG, mean image", our_batches(jpeg, threads, Augmentation("image")))
    benchmark.add_stream("torch DataLoader, Pillow, JPEG", torch_batches(jpeg, threads, decode_with_pillow))
    benchmark.add_stream("torch DataLoader, simplejpeg, JPEG", torch_batches(jpeg, threads, decode_jpeg))
    benchmark.add_peer("FFCV, JPEG", "--ffcv-python", ffcv, "ffcv_stream", "jpg", "last")
    if more:
        benchmark.add_peer("FFCV, JPEG, channels first", "--ffcv-python", ffcv, "ffcv_stream", "jpg", "first")
    benchmark.add_peer("SPDL, FFmpeg, JPEG", "--spdl-python", spdl, "spdl_stream", "ffmpeg")
    benchmark.add_peer("SPDL, simplejpeg, JPEG", "--spdl-python", spdl, "spdl_stream", "simplejpeg")
    benchmark.add_peer("WebDataset, Pillow, JPEG", "--webdataset-python", webdataset, "webdataset_stream")
    benchmark.add_stream("DALI, plain graph, JPEG", dali_batches(jpeg, threads))
    benchmark.add_bound(_JPEG_BOUND, decode_jpeg, jpeg)
    benchmark.add_stream(_OURS_PPM, our_batches(ppm, threads), _PPM_BOUND, _OURS_PPM)
    benchmark.add_peer("FFCV, raw", "--ffcv-python", ffcv, "ffcv_stream", "raw", "last", raw=True)
    if more:
        benchmark.add_peer("FFCV, raw, channels first", "--ffcv-python", ffcv, "ffcv_stream", "raw", "first", raw=True)
    # The bound copies with NumPy, which releases the GIL. Python would keep the GIL while it copies bytes.
    benchmark.add_bound(_PPM_BOUND, lambda record: np.frombuffer(record, np.uint8).copy(), ppm, _OURS_PPM)
    for name, versions in benchmark.versions.items():
        say(f"{name}: {versions}")


def store_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options --store and --threads of the benchmarks of streams."""
    command = click.option(
        "--threads",
        type=click.IntRange(1),
        default=2,
        show_default=True,
        help="Number of worker threads or processes of each contestant, and of cores that each contestant may use.",
    )(command)
    return click.option(
        "--store",
        type=click.Path(path_type=Path),
        help="Store of JPEG records.  [default: a store of photo digits, made for this run]",
    )(command)


def peer_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name the Python interpreters with FFCV and with SPDL."""
    for option, name in (("--spdl-python", "SPDL"), ("--ffcv-python", "FFCV")):
        text = f"Python interpreter with {name}.  [default: no {name}]"
        command = click.option(option, type=INTERPRETER, metavar="PATH", help=text)(command)
    return command


@click.command(cls=BenchmarkCommand)
@store_options
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=4.0,
    show_default=True,
    help="Duration of each timed run of a contestant, in seconds.",
)
@peer_options
@click.option(
    "--webdataset-python",
    type=INTERPRETER,
    metavar="PATH",
    help="Python interpreter with WebDataset.  [default: no WebDataset]",
)
@click.option("--more", is_flag=True, help="Also measure FFCV with channels first in memory.")
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
    """Measure the images/s of the training stream, of other loaders and of decoding alone, in batches of 128.

    The other loaders are FFCV, SPDL, WebDataset, torch and DALI. FFCV needs a separate Python environment. Install
    libopencv-dev, libturbojpeg0-dev and pkg-config on the system; then, in a new virtual environment, `pip install
    'numpy<2.3' torch setuptools wheel pillow` and `pip install --no-build-isolation ffcv`. SPDL needs the libraries of
    FFmpeg on the system (on Debian: libavdevice59) and `pip install spdl simplejpeg numpy`. WebDataset needs `pip
    install webdataset torch pillow`. SPDL and WebDataset can share one environment.

    \b
    Example:
      python -m tools.bench.stream --rounds 5
      python -m tools.bench.stream --store store --ffcv-python ffcv/bin/python \\
          --spdl-python peers/bin/python --webdataset-python peers/bin/python
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = Path(temporary)
        jpeg = jpeg_store(store, work_dir, threads)
        records = jpeg.split("train").records
        say(f"{records:,} JPEG records, {threads} threads")
        benchmark = StreamBenchmark(jpeg, work_dir, threads, seconds)
        with benchmark.cleanup:
            add_contestants(benchmark, ffcv_python, spdl_python, webdataset_python, more)
            os.sync()  # write the new files to the disk now, so that no write slows down a turn
            rows = race(benchmark.contestants, rounds)
    details = {"records": records, "batch": BATCH, "seconds": seconds, "threads": threads, "rounds": rounds}
    results = {"ours_over": speedups(rows), "versions": benchmark.versions, "left_out": benchmark.left_out}
    print_results(rows, as_json, {**details, **results}, speedup_lines(rows))


if __name__ == "__main__":
    main()

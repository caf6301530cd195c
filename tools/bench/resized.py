"""Benchmark of the stream of resized regions (preset "resnet") on CPU threads, compared with other loaders and bounds.

Every contestant except the bounds yields batches of 128 images without end, float32 NCHW, 224 × 224 px, together with
labels. An image is a random region of a record with 8 % to 100 % of its area and a width / height of 3/4 to 4/3. The
region is resized, mirrored with probability one half, and normalized with ImageNet's mean and standard deviation. The
rounds, checks and processes are those of tools.bench.stream. The loaders differ in how they decode and resize:

ours         pipeline.train_loader with Augmentation.preset("resnet"): decodes the region alone; antialiased bilinear
             filter, with the bits of Pillow
FFCV         RandomResizedCropRGBImageDecoder, RandomHorizontalFlip, NormalizeImage: decodes the complete record;
             OpenCV's area filter (tools/bench/peers/ffcv_stream.py). By default, FFCV's batches have the memory order
             NHWC. With "channels first", they have the memory order of all other batches
SPDL         SPDL's threads: FFmpeg decodes the complete record, and FFmpeg's bilinear scaler resizes the region; or
             libjpeg-turbo (simplejpeg) decodes, and Pillow resizes (tools/bench/peers/spdl_stream.py)
torchvision  RandomResizedCrop of Pillow images in DataLoader's workers: decodes the complete record
             (tools/bench/peers/torchvision_stream.py)
DALI         the graph of DALI's example for ImageNet, on a CPU: readers.file, decoders.image_random_crop, resize with a
             triangular filter, crop_mirror_normalize. DALI decodes the region, by default without the smooth upsampling
             of colours that libjpeg uses. The batches are not converted to torch tensors
bounds       upper bounds: threads that only decode the same random regions of the records with libjpeg-turbo, as our
             stream does; and threads that only decode complete records with libjpeg-turbo (simplejpeg), as FFCV does
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch

from pipeline.augment import Augmentation, Augmenter, Crops
from pipeline.engines import kernels
from pipeline.records import RecordBatch, Records
from pipeline.sampling import draw_step
from prep.console import UserError, say
from prep.store.manifest import Store
from tools.bench.harness import (
    INTERPRETER,
    BenchmarkCommand,
    common_options,
    import_simplejpeg,
    print_results,
    race,
    speedup_lines,
    speedups,
)
from tools.bench.loaders import Batches, import_dali, jpeg_store, our_batches
from tools.bench.peers.stream_turn import BATCH, CROP_PX, RATIO, SCALE
from tools.bench.stream import StreamBenchmark, peer_options, store_options

_REGIONS, _RECORDS = "bound: decode the regions", "bound of FFCV: decode the records"
_BOUND_BATCHES = 16  # number of batches whose regions are decoded for the bound, again and again


def dali_batches(folder: Path, threads: int, settings: Augmentation) -> Batches:
    """Return batches of the graph in DALI's example for ImageNet. Raises UserError if DALI is not installed."""
    dali = import_dali()
    fn, types = dali.fn, dali.types
    pipe = dali.Pipeline(batch_size=BATCH, num_threads=threads, device_id=None)
    with pipe:
        records, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="reader")
        images = fn.decoders.image_random_crop(
            records, device="cpu", output_type=types.RGB, random_aspect_ratio=RATIO, random_area=SCALE, num_attempts=10
        )
        images = fn.resize(images, resize_x=CROP_PX, resize_y=CROP_PX, interp_type=types.INTERP_TRIANGULAR)
        images = fn.crop_mirror_normalize(
            images,
            crop=(CROP_PX, CROP_PX),
            mirror=fn.random.coin_flip(),
            mean=list(settings.mean),
            std=list(settings.std or ()),
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipe.set_outputs(images, labels)
    pipe.build()
    while True:
        yield pipe.run()[0].as_tensor()


def decode_regions(library: kernels.NativeKernels, records: RecordBatch, crops: Crops) -> None:
    """Decode the regions of a batch on one thread, and drop the pixels. Raises UserError for a damaged record."""
    files = (records.addresses, records.payload_bytes, records.sizes)
    places = (crops.offset, crops.flip, crops.shift)
    job = kernels.BatchJob(library.jpeg, *files, *places, None, 0, CROP_PX, "NCHW", 1.0, None, crops.extent)
    library.make_images(job)
    if job.failed < len(records.numbers):
        raise UserError(f"record {records.numbers[job.failed]} cannot be decoded")


def region_jobs(store: Store, records: Records, settings: Augmentation) -> list[Callable[[], None]]:
    """Return functions that each decode the regions of one batch of the stream's regions, on one thread.

    Raises UserError if the C kernel or libjpeg-turbo is missing.
    """
    library = kernels.native
    if library is None or library.jpeg is None:
        raise UserError("The C kernel cannot be used, so the stream uses DALI (see pipeline/engines/kernels.py).")
    jobs: list[Callable[[], None]] = []
    augmenter = Augmenter(store, settings)
    for step in range(_BOUND_BATCHES):
        batch = records.batch((step * BATCH + np.arange(BATCH)) % len(records))
        draws = draw_step(settings, 0, 0, step, BATCH, augmenter.max_offset_px)
        jobs.append(partial(decode_regions, library, batch, augmenter.random_crops(batch, *draws)))
    return jobs


def add_contestants(benchmark: StreamBenchmark, ffcv: Path | None, spdl: Path | None, torchvision: Path | None) -> None:
    """Add all contestants. A program of tools.bench.peers takes part only if its Python interpreter is given."""
    jpeg, threads, settings = benchmark.jpeg, benchmark.threads, Augmentation.preset("resnet")
    records = benchmark.cleanup.enter_context(closing(Records(jpeg, "train")))
    jobs = region_jobs(jpeg, records, settings)
    benchmark.add_stream("ours", our_batches(jpeg, threads, settings), _REGIONS)
    benchmark.add_bound_of(_REGIONS, lambda job: job(), jobs, BATCH)
    benchmark.add_stream("DALI, example's graph", dali_batches(benchmark.all_files, threads, settings), _REGIONS)
    for channels in ("last", "first"):
        name = f"FFCV, channels {channels}"
        benchmark.add_peer(name, "--ffcv-python", ffcv, "ffcv_stream", "jpg", channels, bound=_RECORDS)
    for decoder in ("FFmpeg", "simplejpeg"):
        benchmark.add_peer(f"SPDL, {decoder}", "--spdl-python", spdl, "spdl_stream", decoder.lower(), bound=_RECORDS)
    benchmark.add_peer("torchvision, Pillow", "--torchvision-python", torchvision, "torchvision_stream", bound=_RECORDS)
    benchmark.add_bound(_RECORDS, import_simplejpeg().decode_jpeg, jpeg)
    for name, versions in benchmark.versions.items():
        say(f"{name}: {versions}")


@click.command(cls=BenchmarkCommand)
@store_options
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=3.0,
    show_default=True,
    help="Counted time of a turn, in seconds.",
)
@peer_options
@click.option(
    "--torchvision-python",
    type=INTERPRETER,
    metavar="PATH",
    help="Python interpreter with torchvision.  [default: no torchvision]",
)
@common_options
def main(
    store: Path | None,
    threads: int,
    seconds: float,
    ffcv_python: Path | None,
    spdl_python: Path | None,
    torchvision_python: Path | None,
    rounds: int,
    as_json: bool,
) -> None:
    """Measure the stream of the preset "resnet" in batches of 128, and compare other loaders and decoding alone.

    The other loaders are FFCV, SPDL, torchvision and DALI. FFCV needs a separate Python environment. Install
    libopencv-dev, libturbojpeg0-dev and pkg-config on the system; then, in a new virtual environment, `pip install
    'numpy<2.3' torch setuptools wheel pillow` and `pip install --no-build-isolation ffcv`. SPDL needs the libraries of
    FFmpeg on the system (on Debian: libavdevice59) and `pip install spdl simplejpeg numpy pillow`. torchvision needs a
    separate environment with `pip install torch torchvision`.

    \b
    Example:
      python -m tools.bench.resized --rounds 3
      python -m tools.bench.resized --store store --ffcv-python ffcv/bin/python \\
          --spdl-python spdl/bin/python --torchvision-python torchvision/bin/python
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        work_dir = Path(temporary)
        jpeg = jpeg_store(store, work_dir, threads)
        records = jpeg.split("train").records
        say(f"{records:,} JPEG records, {threads} threads")
        benchmark = StreamBenchmark(jpeg, work_dir, threads, seconds, is_resized=True)
        with benchmark.cleanup:
            add_contestants(benchmark, ffcv_python, spdl_python, torchvision_python)
            os.sync()  # write the new files to the disk now, so that no write slows down a turn
            rows = race(benchmark.contestants, rounds)
    details = {"records": records, "batch": BATCH, "seconds": seconds, "threads": threads, "rounds": rounds}
    results = {"ours_over": speedups(rows), "versions": benchmark.versions, "left_out": benchmark.left_out}
    print_results(rows, as_json, {**details, **results}, speedup_lines(rows))


if __name__ == "__main__":
    main()

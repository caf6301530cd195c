"""Benchmark of the Python code of the CPU stream, in microseconds per image. Decoding and augmentation are not timed.

The stages run one after the other on one thread. The sum of their times is therefore an upper bound of the time for
which the stream holds Python's GIL. Only the search for the records in the mapped files runs without the GIL. A
function that does nothing replaces the kernel. As in a stream, `--threads` threads call this function. Batches are
chosen at random, and all records are in the page cache. The results are medians over the batches.

look up   Records.batch: find and check the records of a batch
crops     Augmenter.random_crops: compute the crops, after the random numbers are drawn
feed      Engine.start: describe the batch to the kernel and pass the batch to the threads
finish    Engine.finish: wait for the threads and make a tensor
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np

from pipeline.augment import Augmentation, Augmenter
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import OutputFormat
from pipeline.engines.libjpeg import JpegLibrary
from pipeline.records import Records
from pipeline.sampling import draw_params
from prep.console import UserError, print_json, say
from prep.store.manifest import Store
from tools.bench.harness import BenchmarkCommand

_FIRST = 5  # number of batches at the start that are not counted


class _IdleKernel:
    """Replaces NativeKernels with methods that do nothing."""

    def __init__(self, jpeg: JpegLibrary | None) -> None:
        self.jpeg = jpeg

    def make_images(self, job: kernels.BatchJob) -> None:
        """Do nothing."""


def host_times(store: Store, batch: int, threads: int, batches: int) -> dict[str, float]:
    """Return {stage: microseconds per image}. The key "sum" holds the sum of all stages.

    The docstring of this module lists the stages. Raises UserError if the C kernel cannot be used, because the stream
    then uses DALI.
    """
    if kernels.native is None or kernels.native.jpeg is None:
        raise UserError("The C kernel cannot be used, so the stream uses DALI (see pipeline/engines/kernels.py).")
    augmenter = Augmenter(store, Augmentation())
    idle: Any = _IdleKernel(kernels.native.jpeg)
    engine = CpuEngine(augmenter, idle, OutputFormat(), threads)
    rng, draws = np.random.default_rng(0), draw_params(0, 0, 0, batch, augmenter.max_offset_px)
    times: dict[str, list[float]] = {"look up": [], "crops": [], "feed": [], "finish": []}
    with closing(Records(store, "train")) as records, closing(engine):
        for _ in range(batches + _FIRST):
            numbers = rng.permutation(len(records))[:batch]
            found = _timed(times["look up"], lambda numbers=numbers: records.batch(numbers))
            crops = _timed(times["crops"], lambda found=found: augmenter.random_crops(found, draws))
            started = _timed(times["feed"], lambda found=found, crops=crops: engine.start(found, crops))
            images = _timed(times["finish"], lambda *parts: engine.finish(*parts), started, found, crops)
            assert len(images) == batch
            del images, started  # lets the engine reuse the memory of the batch
    medians = {name: 1e6 * float(np.median(values[_FIRST:])) / batch for name, values in times.items()}
    return {**medians, "sum": sum(medians.values())}


def _timed(times: list[float], run: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = run(*arguments)
    times.append(time.perf_counter() - started)
    return result


@click.command(cls=BenchmarkCommand)
@click.option("--store", type=click.Path(path_type=Path), required=True, help="Store with a split train.")
@click.option("--batch", type=click.IntRange(1), default=128, show_default=True, help="Number of images in a batch.")
@click.option("--batches", type=click.IntRange(1), default=200, show_default=True, help="Number of batches to measure.")
@click.option(
    "--threads", type=click.IntRange(1), default=1, show_default=True, help="Number of threads that call the kernel."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output.")
def main(store: Path, batch: int, batches: int, threads: int, as_json: bool) -> None:
    """Measure the Python code of the CPU stream in microseconds per image.

    \b
    Example:
      python -m tools.bench.host_time --store store
      python -m tools.bench.host_time --store store --threads 16
    """
    times = host_times(Store.open(store), batch, threads, batches)
    if as_json:
        print_json({name.replace(" ", "_"): round(value, 3) for name, value in times.items()})
        return
    for name, value in times.items():
        say(f"{name:8}{value:8.2f} us per image")


if __name__ == "__main__":
    main()

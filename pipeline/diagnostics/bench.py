"""Benchmark of the stream: images/s of each stage, and an upper bound.

In JPEG stores, the upper bound is the speed of decoding with libjpeg-turbo alone. In PPM stores, the upper bound is the
speed of copying alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import simplejpeg
import torch

from pipeline.augment import Augmentation, Augmenter, Crops
from pipeline.device import Placement
from pipeline.engines import kernels
from pipeline.engines.cpu_engine import CpuEngine
from pipeline.engines.dali_engine import OutputFormat, decode_crop, decode_inputs
from pipeline.engines.device_stream import DeviceStream
from pipeline.engines.engine import Engine, choose_engine
from pipeline.loader import TrainLoader
from pipeline.prefetch import BatchInput, Prefetcher
from pipeline.records import RecordBatch, Records
from pipeline.sampling import draw_step
from prep.console import Progress
from prep.images.jpeg import decode_jpeg
from prep.store.manifest import Store

ROUNDS = 5  # each round measures all stages, so that a change of the machine's speed affects every stage
STAGES = ("read", "decode", "augment", "hand over")
_BOUND_RECORDS = 2000  # number of records that are repeatedly decoded or copied to measure the upper bound
# Number of batches that are taken before each measurement. They are not counted, because some were prefetched.
_AHEAD_BATCHES = 8

Work = Callable[[], int]  # a function that processes some images, and returns the number of these images


@dataclass(frozen=True)
class BenchResult:
    """Result of a benchmark: medians over the rounds, and the settings of the measurement.

    Speeds are in images/s. The fields are the keys of `alexstream bench --json`.
    """

    images_per_s: float
    bound_images_per_s: float
    share_of_bound: float
    # Images/s of each stage, measured together with all stages before it (see limit_stages).
    stages: dict[str, float]
    bound: str  # description of the upper bound; for JPEG stores, it includes the version of simplejpeg
    batch: int
    threads: int
    device: str
    format: str
    seconds: float


def bench_stream(
    store: Store,
    batch: int,
    threads: int,
    device: str,
    seconds: float,
    progress: Progress,
    split: str = "train",
    preset: str = "alexnet",
) -> BenchResult:
    """Measure each stage of the stream, and the upper bound, for `seconds` each. Raises the errors of train_loader."""
    placement = Placement.parse(device)
    batch = min(batch, store.split(split).records)
    is_jpeg, settings = store.settings.format == "jpeg", Augmentation.preset(preset)
    output = OutputFormat(
        crop_px=settings.size_px, is_resized=settings.window == "resized", has_effects=settings.has_effects
    )
    with ExitStack() as resources:
        loader = resources.enter_context(
            TrainLoader(store, split, batch, placement, 0, augmentation=settings, threads=threads)
        )
        records = resources.enter_context(closing(Records(store, split)))
        augmenter = Augmenter(store, settings)
        work: dict[str, Work] = {"read": _read_work(records, batch)}
        engines: dict[str, Engine] = {"augment": choose_engine(augmenter, placement, output, threads)}
        if is_jpeg:
            engines = {"decode": _decode_engine(engines["augment"], augmenter, placement, output, threads), **engines}
        for name, engine in engines.items():
            prefetcher = Prefetcher(engine, placement, Records(store, split), batch, threads)
            resources.enter_context(closing(prefetcher))
            prefetcher.start(_jobs(prefetcher, augmenter, len(records), batch))
            work[name] = partial(_take, prefetcher)
        work["hand over"] = _stream_work(loader)
        pool = resources.enter_context(ThreadPoolExecutor(threads))
        work["bound"] = _bound_work(records, is_jpeg, pool, threads)

        rates: dict[str, list[float]] = {name: [] for name in work}
        for _ in range(ROUNDS):
            for name, run in work.items():
                for _ in range(1 if name == "bound" else _AHEAD_BATCHES):  # not counted
                    run()
                rates[name].append(_images_per_s(run, seconds / ROUNDS))
            progress.advance()
    limit_stages(rates)
    median = {name: float(np.median(values)) for name, values in rates.items()}
    jpeg_bound = f"libjpeg-turbo decode (simplejpeg {simplejpeg.__version__})"
    return BenchResult(
        images_per_s=median["hand over"],
        bound_images_per_s=median["bound"],
        share_of_bound=float(np.median(np.array(rates["hand over"]) / np.array(rates["bound"]))),
        stages={name: median[name] for name in STAGES if name in median},
        bound=jpeg_bound if is_jpeg else "copy of the records",
        batch=batch,
        threads=threads,
        device=device,
        format=store.settings.format,
        seconds=seconds,
    )


def result_json(result: BenchResult) -> dict[str, Any]:
    """Return the result for --json. Speeds are rounded to one decimal, and `share_of_bound` to three decimals."""
    rounded = {name: round(value, 1) for name, value in asdict(result).items() if name.endswith("images_per_s")}
    stages = {name: round(value, 1) for name, value in result.stages.items()}
    return {**asdict(result), **rounded, "stages": stages, "share_of_bound": round(result.share_of_bound, 3)}


def limit_stages(rates: dict[str, list[float]]) -> None:
    """Limit the rate of each stage to the rate of the previous stage in the same round.

    Each stage includes the previous stage, so no stage can be faster than the previous stage. A stage can seem faster,
    however, because the stages of a round are measured one after another, and the machine can become faster between two
    measurements.
    """
    for before, stage in pairwise(name for name in STAGES if name in rates):
        rates[stage] = [min(pair) for pair in zip(rates[before], rates[stage], strict=True)]


def _images_per_s(run: Work, seconds: float) -> float:
    images, started = 0, time.perf_counter()
    while True:
        images += run()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return images / elapsed


def _read_work(records: Records, batch: int) -> Work:
    """Return a function that reads batches of records as the stream does, but on one thread."""
    starts = itertools.cycle(range(0, len(records) - batch + 1, batch))

    def run() -> int:
        first = next(starts)
        return len(records.batch(np.arange(first, first + batch)).labels)

    return run


def _stream_work(loader: TrainLoader) -> Work:
    """Return a function that takes a batch from the loader and, on a GPU, waits until the batch is finished."""
    batches = (batch for _ in itertools.count() for batch in loader)

    def run() -> int:
        images = len(next(batches).labels)
        if loader.placement.device_id is not None:
            torch.cuda.synchronize(loader.placement.device_id)
        return images

    return run


def _decode_engine(
    augmenting: Engine, augmenter: Augmenter, placement: Placement, output: OutputFormat, threads: int
) -> Engine:
    """Return an engine that decodes crops with the decoder of the engine `augmenting`, and does nothing else."""
    if augmenting.uses_dali or kernels.native is None:
        return _DaliDecodeEngine(placement, output, augmenting.stream)
    return CpuEngine(augmenter, kernels.native, output, threads, decode_only=True)


class _DaliDecodeEngine:
    """An engine that decodes crops in DALI and does nothing else."""

    uses_dali = True

    def __init__(self, placement: Placement, output: OutputFormat, stream: DeviceStream) -> None:
        self._placement, self._output, self.stream = placement, output, stream

    def define_graph(self) -> Any:
        return decode_crop(self._placement, self._output.crop_px, self._output.is_resized)

    def graph_inputs(self, records: RecordBatch, crops: Crops) -> dict[str, Any]:
        return decode_inputs(records, crops)

    def start(self, records: RecordBatch, crops: Crops) -> Any:
        """This method is never called, because the prefetcher runs the DALI graph."""
        raise NotImplementedError

    def finish(self, outputs: tuple[Any, ...], records: RecordBatch, crops: Crops) -> torch.Tensor:
        return self.stream.empty((0,), torch.float32)

    def close(self) -> None:
        pass


def _jobs(prefetcher: Prefetcher, augmenter: Augmenter, records: int, batch: int) -> Iterator[Callable[[], BatchInput]]:
    """Yield an endless sequence of jobs, which read batches in the store's order."""
    draws = draw_step(augmenter.augmentation, 0, 0, 0, batch, augmenter.max_offset_px)

    def read(first: int) -> BatchInput:
        record_numbers = np.arange(first, first + batch)
        return prefetcher.read_batch(record_numbers, lambda records: augmenter.random_crops(records, *draws))

    return (partial(read, first) for first in itertools.cycle(range(0, records - batch + 1, batch)))


def _take(prefetcher: Prefetcher) -> int:
    output = prefetcher.next()
    assert output is not None
    return len(output.batch_input.records.labels)


def _bound_work(records: Records, is_jpeg: bool, pool: ThreadPoolExecutor, threads: int) -> Work:
    """Return a function that only decodes JPEG records, or only copies PPM records, with `threads` threads."""
    # decode_jpeg and np.copy release the global interpreter lock (GIL).
    process: Callable[[Any], object] = decode_jpeg if is_jpeg else np.copy
    payloads = [records[number].payload for number in range(min(len(records), _BOUND_RECORDS))]
    contents = [payload.tobytes() if is_jpeg else payload for payload in payloads]

    def process_all(part: list[Any]) -> int:
        for content in part:
            process(content)
        return len(part)

    parts = [contents[k::threads] for k in range(threads)]
    return lambda: sum(pool.map(process_all, parts))

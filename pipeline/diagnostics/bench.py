"""How fast the stream is on this machine, stage by stage, beside the bound: the same records decoded with
libjpeg-turbo and nothing else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import simplejpeg
import torch

from pipeline.augment import CROP_PX, Augmentation, Augmenter, Crops
from pipeline.engines.dali_engine import OutputFormat, decode_crop, decode_inputs
from pipeline.engines.engine import Engine, choose_engine
from pipeline.loader import TrainLoader
from pipeline.placement import Placement
from pipeline.prefetch import BatchInput, Prefetcher
from pipeline.records import Record, Records
from pipeline.sampling import draw_params
from prep.console import Progress
from prep.images.jpeg import decode_jpeg
from prep.store.manifest import Store

ROUNDS = 5  # all in turn, so that a machine whose speed drifts drifts for all
STAGES = ("read", "decode", "augment", "hand over")
_HELD_RECORDS = 2000
_AHEAD = 8  # batches that may be ready: not counted


@dataclass(frozen=True)
class BenchResult:
    """Medians over the rounds, images/s."""

    images_per_s: float
    bound_images_per_s: float
    share_of_bound: float
    stages: dict[str, float]  # images/s through this stage and all before it; the last is the stream
    bound: str  # what the bound is, with the library that made it
    batch: int
    threads: int
    device: str
    format: str
    seconds: float


def bench_stream(
    store: Store, batch: int, threads: int, device: str, seconds: float, report: Progress, split: str = "train"
) -> BenchResult:
    """Measure training batches for `seconds`, the stages before them and the bound for as long each.

    Raises what TrainLoader raises.
    """
    placement = Placement.parse(device)
    batch = min(batch, store.split(split).records)
    with ExitStack() as held:
        loader = TrainLoader(store, split, batch, placement, 0, augmentation=Augmentation(), threads=threads)
        held.enter_context(loader)
        records = held.enter_context(closing(Records(store, split)))
        batches = (batch for _ in itertools.count() for batch in loader)

        def stream() -> int:
            served = len(next(batches).labels)
            if placement.device_id is not None:
                torch.cuda.synchronize(placement.device_id)
            return served

        contestants: dict[str, Callable[[], int]] = {"read": _reading(records, batch)}
        augmenter = Augmenter(store, Augmentation())
        whole = choose_engine(augmenter, placement, OutputFormat(), threads)
        engines: dict[str, Engine] = (
            {"augment": whole} if augmenter.is_raw else {"decode": _Decoding(placement), "augment": whole}
        )
        for name, engine in engines.items():
            prefetcher = Prefetcher(engine, placement, Records(store, split), batch, threads)
            held.enter_context(closing(prefetcher))
            prefetcher.start(_jobs(prefetcher, augmenter, len(records), batch))
            contestants[name] = partial(_take, prefetcher)
        contestants["hand over"] = stream
        pool = held.enter_context(ThreadPoolExecutor(threads))
        contestants["bound"] = _bound(records, store.settings.format, pool, threads)

        rates: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(ROUNDS):
            for name, work in contestants.items():
                for _ in range(1 if name == "bound" else _AHEAD):  # made while others had their turn
                    work()
                rates[name].append(_rate(work, seconds / ROUNDS))
            report.advance()
    median = {name: float(np.median(found)) for name, found in rates.items()}
    share = float(np.median(np.array(rates["hand over"]) / np.array(rates["bound"])))
    name = "copy of the same bytes"
    if store.settings.format == "jpeg":
        name = f"libjpeg-turbo decode (simplejpeg {simplejpeg.__version__})"
    return BenchResult(
        images_per_s=median["hand over"],
        bound_images_per_s=median["bound"],
        share_of_bound=share,
        stages={name: median[name] for name in STAGES if name in median},
        bound=name,
        batch=batch,
        threads=threads,
        device=device,
        format=store.settings.format,
        seconds=seconds,
    )


def result_json(result: BenchResult) -> dict[str, Any]:
    """For --json: rates to a tenth, the share to three digits."""
    rounded = {name: round(value, 1) for name, value in asdict(result).items() if name.endswith("images_per_s")}
    stages = {name: round(value, 1) for name, value in result.stages.items()}
    return {**asdict(result), **rounded, "stages": stages, "share_of_bound": round(result.share_of_bound, 3)}


def _rate(work: Callable[[], int], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    while True:
        done += work()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return done / elapsed


def _reading(records: Records, batch: int) -> Callable[[], int]:
    """Look records up, as the stream does on its own threads; here on one."""
    places = itertools.cycle(range(0, len(records) - batch + 1, batch))

    def work() -> int:
        first = next(places)
        return len([records[number] for number in range(first, first + batch)])

    return work


class _Decoding:
    """An engine that decodes windows and stops there."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def define_graph(self) -> Any:
        return decode_crop(self._placement, CROP_PX)

    def graph_inputs(self, records: Sequence[Record], crops: Crops) -> dict[str, Any]:
        return decode_inputs(records, crops.origin + crops.offset[:, 0])

    def finish(self, outputs: tuple[Any, ...], records: Sequence[Record], crops: Crops) -> torch.Tensor:
        return torch.empty(0)

    def close(self) -> None:
        pass


def _jobs(prefetcher: Prefetcher, augmenter: Augmenter, records: int, batch: int) -> Iterator[Callable[[], BatchInput]]:
    """Endless batches in the store's order."""
    draws = draw_params(0, 0, 0, batch, augmenter.max_offset_px)

    def look_up(first: int) -> BatchInput:
        return prefetcher.read_batch(
            np.arange(first, first + batch), lambda found: augmenter.random_crops(found, draws)
        )

    return (partial(look_up, first) for first in itertools.cycle(range(0, records - batch + 1, batch)))


def _take(prefetcher: Prefetcher) -> int:
    served = prefetcher.next()
    assert served is not None
    return len(served.batch_input.labels)


def _bound(records: Records, format: str, pool: ThreadPoolExecutor, threads: int) -> Callable[[], int]:
    """What records cost at the least, on all threads: a decode (JPEG) or a copy of their bytes (PPM)."""
    work: Callable[[Any], object] = decode_jpeg if format == "jpeg" else np.copy  # both let go of the lock
    held = [records[number].payload for number in range(min(len(records), _HELD_RECORDS))]
    contents = [picture.tobytes() if format == "jpeg" else picture for picture in held]

    def all_of(share: list[Any]) -> int:
        for content in share:
            work(content)
        return len(share)

    shares = [contents[k::threads] for k in range(threads)]
    return lambda: sum(pool.map(all_of, shares))

"""How fast the stream is on this machine, beside the bound: decoding the same records with libjpeg-turbo and nothing
else.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from pipeline.augment import Augmentation
from pipeline.loader import TrainLoader, dali_errors, reader, unbuilt_pipeline
from pipeline.placement import Placement
from prep.console import Progress
from prep.manifest import Store

ROUNDS = 5  # stream and bound in turn, so that a machine whose speed drifts drifts for both
_HELD_RECORDS = 2000
_AHEAD = 4  # batches that DALI may have ready: not counted


@dataclass(frozen=True)
class BenchResult:
    """Medians over the rounds."""

    images_per_s: float
    bound_images_per_s: float
    share_of_bound: float
    bound: str  # what the bound is, with the library that made it
    batch: int
    threads: int
    device: str
    format: str
    seconds: float


def bench_stream(
    store: Store, batch: int, threads: int, device: str, seconds: float, report: Progress, split: str = "train"
) -> BenchResult:
    """Measure training batches for `seconds`, and the bound for as long. Raises what TrainLoader raises."""
    placement = Placement.of(device)
    batch = min(batch, store.split(split).records)
    loader = TrainLoader(store, split, batch, placement, 0, Augmentation(), threads)
    records = _hold_records(store, split)
    bound, name = _bound(store.settings.format)

    batches = (batch for _ in itertools.count() for batch in loader)

    def stream() -> int:
        served = len(next(batches).labels)
        if placement.device_id is not None:
            torch.cuda.synchronize(placement.device_id)
        return served

    with ThreadPoolExecutor(threads) as pool:
        shares = [records[k::threads] for k in range(threads)]

        def decode_all(share: list[bytes]) -> int:
            for record in share:
                bound(record)
            return len(share)

        def decode() -> int:
            return sum(pool.map(decode_all, shares))

        decode()  # page cache, threads, buffers
        ours, theirs = [], []
        for _ in range(ROUNDS):
            for _ in range(_AHEAD):  # made while the bound had its turn
                stream()
            ours.append(_rate(stream, seconds / ROUNDS))
            theirs.append(_rate(decode, seconds / ROUNDS))
            report.advance()
    loader.close()
    rate, limit = float(np.median(ours)), float(np.median(theirs))
    share = float(np.median(np.array(ours) / np.array(theirs)))
    return BenchResult(rate, limit, share, name, batch, threads, device, store.settings.format, seconds)


def result_json(result: BenchResult) -> dict[str, Any]:
    """For --json: rates to a tenth, the share to three digits."""
    rounded = {name: round(value, 1) for name, value in asdict(result).items() if name.endswith("images_per_s")}
    return {**asdict(result), **rounded, "share_of_bound": round(result.share_of_bound, 3)}


def _rate(work: Callable[[], int], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    while True:
        done += work()
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return done / elapsed


def _hold_records(store: Store, split: str) -> list[bytes]:
    """The payloads of the first records, in memory."""
    wanted = min(store.split(split).records, _HELD_RECORDS)
    pipe = unbuilt_pipeline(1, Placement(None), 0, threads=1)
    with pipe:
        record, _ = reader(store, split, seed=0, shuffle=False, pad_last_batch=False)
        pipe.set_outputs(record)
    with dali_errors(store, split):
        pipe.build()
        return [np.array(pipe.run()[0][0]).tobytes() for _ in range(wanted)]


def _bound(format: str) -> tuple[Callable[[bytes], object], str]:
    """What one record costs at the least: a decode (JPEG) or a copy of its bytes (PPM)."""
    if format == "ppm":
        return _copy, "copy of the same bytes"
    try:
        import simplejpeg
    except ModuleNotFoundError:
        return _decode_with_pillow, "Pillow decode (for bare libjpeg-turbo: pip install 'alexnet[bench]')"
    decode: Callable[[bytes], object] = simplejpeg.decode_jpeg
    return decode, f"libjpeg-turbo decode (simplejpeg {simplejpeg.__version__})"


def _copy(content: bytes) -> object:
    return np.frombuffer(content, np.uint8).copy()  # lets go of the interpreter's lock, as bytearray does not


def _decode_with_pillow(content: bytes) -> object:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(content)).load()

"""What the streams share: random windows, a look at their batches, and turns of so many seconds.

    python -m tools.bench.peers.NAME FOLDER OUT THREADS RED,GREEN,BLUE ...

A program lists the records in FOLDER/label/, writes what its library reads to OUT, starts its stream, looks at two
batches, and prints what it runs on. At each line `go SECONDS` on standard input it takes some batches uncounted, then
batches for so long, and prints images/s. It ends when standard input does. RED,GREEN,BLUE is the mean to subtract.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH, CROP_PX = 128, 224

Records = Sequence[tuple[str, int]]  # path of a JPEG file, label
Mean = npt.NDArray[np.float32]  # grey levels (3,)


def arguments() -> tuple[Records, Path, int, Mean, list[str]]:
    """The records, where to write, how many threads, the mean, and what else stands on the command line."""
    folder, out, threads, mean, *more = sys.argv[1:]
    records = [(str(path), int(path.parent.name)) for path in sorted(Path(folder).glob("*/*.jpg"))]
    return records, Path(out), int(threads), np.array(mean.split(","), np.float32), more


def shuffled(records: Records) -> Iterator[tuple[str, int]]:
    """Permutation after permutation of the records, without end."""
    while True:
        yield from random.sample(records, len(records))


def random_offset(height_px: int, width_px: int) -> tuple[int, int]:
    """Top and left of a random window."""
    return random.randint(0, height_px - CROP_PX), random.randint(0, width_px - CROP_PX)


def random_window(pixels: npt.NDArray[np.uint8], mean: Mean, out: Any = None) -> npt.NDArray[np.float32]:
    """A random window of uint8 (H, W, 3), mirrored or not, minus the mean: float32 (3, 224, 224)."""
    top, left = random_offset(*pixels.shape[:2])
    window = pixels[top : top + CROP_PX, left : left + CROP_PX]
    if random.random() < 0.5:
        window = window[:, ::-1]
    planes = np.ascontiguousarray(window.transpose(2, 0, 1))
    levels: npt.NDArray[np.float32] = np.subtract(planes, mean[:, None, None], out=out)
    return levels


def look_at(batches: Iterator[Any]) -> None:
    """Take two batches; raises ValueError where they are not what everyone is to make."""
    first, second = (np.asarray(next(batches)).copy() for _ in range(2))  # their memory may be used again
    for images in (first, second):
        if images.shape != (BATCH, 3, CROP_PX, CROP_PX) or images.dtype != np.float32:
            raise ValueError(f"a batch of {images.dtype} {images.shape}")
        least, most = float(images.min()), float(images.max())
        if not (-512 < least < -64 and 64 < most < 512):  # grey levels minus the mean, perhaps with colour noise
            raise ValueError(f"values from {least} to {most}")
        if np.array_equal(images[0], images[1]):
            raise ValueError("the same image twice in a batch")
    if np.array_equal(first, second):
        raise ValueError("the same batch twice")


def images_per_s(batches: Iterator[Any], seconds: float, threads: int) -> float:
    """The rate over `seconds` or a little more, after as many batches as may have been made ahead and more."""
    for _ in range(2 * threads + 6):
        next(batches)
    taken, started = 0, time.perf_counter()
    while True:
        next(batches)
        taken += BATCH
        elapsed = time.perf_counter() - started
        if elapsed >= seconds:
            return taken / elapsed


def take_turns(versions: str, batches: Iterator[Any], threads: int) -> None:
    """Say `versions`, then have a turn at each word."""
    look_at(batches)
    print(versions, flush=True)  # noqa: T201
    for line in sys.stdin:
        word, seconds = line.split()
        assert word == "go", line
        print(images_per_s(batches, float(seconds), threads), flush=True)  # noqa: T201

"""Functions for the programs of the stream benchmark: arguments, random crops, checks of batches, timed turns.

    python -m tools.bench.peers.NAME FOLDER OUT THREADS RED,GREEN,BLUE ...

A program lists the records in FOLDER/LABEL/, writes to OUT the files for its library, and starts its stream. The
program then checks two batches, and prints the versions of its libraries. For each line `go SECONDS` on standard input,
the program first takes some batches that are not counted. The program then counts batches for SECONDS seconds, and
prints images/s. The program ends when standard input ends. RED,GREEN,BLUE is the mean to subtract, in grey levels.

If the last argument is `resized`, the images are random regions that are resized, as tools.bench.resized describes, and
are divided by STD_RGB.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

BATCH, CROP_PX = 128, 224
# Settings of the resized regions, as in torchvision's references/classification/presets.py. STD_RGB is in grey levels.
SCALE, RATIO, STD_RGB = (0.08, 1.0), (3 / 4, 4 / 3), (58.395, 57.12, 57.375)
RESIZED = "resized"

Records = Sequence[tuple[str, int]]  # path and label of each JPEG file
Mean = npt.NDArray[np.float32]  # (3,) RGB, in grey levels


def parse_arguments() -> tuple[Records, Path, int, Mean, list[str]]:
    """Return the records, the output path, the number of threads, the mean, and the other arguments."""
    folder, out, threads, mean, *others = sys.argv[1:]
    records = [(str(path), int(path.parent.name)) for path in sorted(Path(folder).glob("*/*.jpg"))]
    return records, Path(out), int(threads), np.array(mean.split(","), np.float32), others


def shuffle_forever(records: Records) -> Iterator[tuple[str, int]]:
    """Yield random permutations of the records, one after another without end."""
    while True:
        yield from random.sample(records, len(records))


def random_offset(height_px: int, width_px: int) -> tuple[int, int]:
    """Return the first row and the first column of a random crop."""
    return random.randint(0, height_px - CROP_PX), random.randint(0, width_px - CROP_PX)


def normalize(pixels: Any, mean: Mean, out: Any = None, is_resized: bool = False) -> npt.NDArray[np.float32]:
    """Return uint8 (224, 224, 3) minus the mean, as float32 (3, 224, 224). If `is_resized`, also divide by STD_RGB."""
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    levels: npt.NDArray[np.float32] = np.subtract(planes, mean[:, None, None], out=out)
    if is_resized:
        levels *= np.array([[[1 / std]] for std in STD_RGB], np.float32)
    return levels


def random_crop(pixels: npt.NDArray[np.uint8], mean: Mean, out: Any = None) -> npt.NDArray[np.float32]:
    """Return a random crop of uint8 (H, W, 3), mirrored with probability ½, minus the mean: float32 (3, 224, 224)."""
    top, left = random_offset(*pixels.shape[:2])
    crop = pixels[top : top + CROP_PX, left : left + CROP_PX]
    return normalize(crop[:, ::-1] if random.random() < 0.5 else crop, mean, out)


def random_region(height_px: int, width_px: int) -> tuple[int, int, int, int]:
    """Return top, left, height and width of a region, as torchvision's RandomResizedCrop.get_params does."""
    for _ in range(10):
        area = height_px * width_px * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(*map(math.log, RATIO)))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= width_px and 0 < height <= height_px:
            return random.randint(0, height_px - height), random.randint(0, width_px - width), height, width
    width = min(width_px, round(height_px * RATIO[1]))
    height = min(height_px, round(width / RATIO[0]))
    return (height_px - height) // 2, (width_px - width) // 2, height, width


def check_batches(batches: Iterator[Any], is_resized: bool = False) -> None:
    """Check dtype, shape and range of two batches. Raises ValueError if a check fails or if images are equal."""
    # Values are grey levels minus the mean, perhaps with colour noise. If `is_resized`, they were divided by STD_RGB.
    low, high = (1.5, 3) if is_resized else (64, 512)
    first, second = (np.asarray(next(batches)).copy() for _ in range(2))  # a stream may reuse a batch's memory
    for images in (first, second):
        if images.shape != (BATCH, 3, CROP_PX, CROP_PX) or images.dtype != np.float32:
            raise ValueError(f"a batch is {images.dtype} {images.shape}, not float32 {(BATCH, 3, CROP_PX, CROP_PX)}")
        least, most = float(images.min()), float(images.max())
        if not (-high < least < -low and low < most < high):
            raise ValueError(
                f"values of a batch range from {least} to {most}; expected a minimum from -{high} to -{low} and a "
                f"maximum from {low} to {high}"
            )
        if np.array_equal(images[0], images[1]):
            raise ValueError("two images of a batch are equal")
    if np.array_equal(first, second):
        raise ValueError("the first two batches of the stream are equal")


def images_per_s(batches: Iterator[Any], seconds: float, threads: int) -> float:
    """Discard as many batches as the stream can have prefetched, then return the rate in images/s.

    The rate is measured over at least `seconds`.
    """
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
    """Check the batches and print `versions`. Then measure the rate once for each line of standard input."""
    check_batches(batches, sys.argv[-1] == RESIZED)
    print(versions, flush=True)  # noqa: T201
    for line in sys.stdin:
        command, seconds = line.split()
        assert command == "go", line
        print(images_per_s(batches, float(seconds), threads), flush=True)  # noqa: T201

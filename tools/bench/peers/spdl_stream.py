"""SPDL's Pipeline of threads over the JPEG files, a batch a task.

    python -m tools.bench.peers.spdl_stream FOLDER OUT THREADS RED,GREEN,BLUE ffmpeg|simplejpeg

ffmpeg      SPDL's own decoding: FFmpeg decodes, cuts the window, mirrors it, makes RGB of it; NumPy makes floats. It
            cuts before it makes RGB, at the next even offset below, for which FFmpeg's colours are in halves.
simplejpeg  SPDL's threads only: libjpeg-turbo decodes, NumPy does the rest.

Batches are written into memory that is used again and again. Nothing is written to OUT.

Needs `pip install spdl simplejpeg numpy`, and FFmpeg's libraries of the system (on Debian: libavdevice59).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import spdl.io  # type: ignore[import-not-found]
from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found]

from tools.bench.peers.stream_turn import (
    BATCH,
    CROP_PX,
    Mean,
    Records,
    arguments,
    random_offset,
    random_window,
    shuffled,
    take_turns,
)

_AHEAD = 3  # batches that wait for the consumer
_BETWEEN = 5  # and at most so many on their way to it, or with it


def window_by_ffmpeg(path: str) -> Any:
    """A random window, mirrored or not, as frames of RGB."""
    packets = spdl.io.demux_image(path)
    codec = packets.codec
    top, left = random_offset(codec.height, codec.width)
    mirror = "hflip," if random.random() < 0.5 else ""
    how = f"crop={CROP_PX}:{CROP_PX}:{left}:{top},{mirror}format=pix_fmts=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=how)


def by_ffmpeg(paths: Sequence[str], mean: Mean, out: Any) -> None:
    """A batch of windows into `out`."""
    pixels = spdl.io.to_numpy(spdl.io.convert_frames([window_by_ffmpeg(path) for path in paths]))
    for image, into in zip(pixels, out, strict=True):
        np.subtract(np.ascontiguousarray(image.transpose(2, 0, 1)), mean[:, None, None], out=into)


def by_simplejpeg(paths: Sequence[str], mean: Mean, out: Any) -> None:
    """A batch of windows into `out`."""
    for path, into in zip(paths, out, strict=True):
        random_window(simplejpeg.decode_jpeg(Path(path).read_bytes()), mean, into)


def batches(records: Records, threads: int, mean: Mean, fill: Callable[..., None]) -> Iterator[Any]:
    """Without end."""
    memory = [np.zeros((BATCH, 3, CROP_PX, CROP_PX), np.float32) for _ in range(threads + _BETWEEN + _AHEAD)]
    free = cycle(memory)

    def batch(some: Records) -> tuple[Any, list[int]]:
        paths, labels = zip(*some, strict=True)
        out = next(free)
        fill(paths, mean, out)
        return out, list(labels)

    builder = PipelineBuilder().add_source(shuffled(records)).aggregate(BATCH)
    pipeline = builder.pipe(batch, concurrency=threads).add_sink(_AHEAD).build(num_threads=threads)
    with pipeline.auto_stop():
        for images, _ in pipeline:
            yield images


def main() -> None:
    """Turns."""
    records, _, threads, mean, (decoder,) = arguments()
    fill, more = {
        "ffmpeg": (by_ffmpeg, ""),
        "simplejpeg": (by_simplejpeg, f", simplejpeg {version('simplejpeg')}"),
    }[decoder]
    take_turns(f"SPDL {version('spdl')}{more}", batches(records, threads, mean, fill), threads)


if __name__ == "__main__":
    main()

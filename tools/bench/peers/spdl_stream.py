"""Stream of SPDL: a Pipeline whose threads read the JPEG files. Each task makes one batch.

    python -m tools.bench.peers.spdl_stream FOLDER OUT THREADS RED,GREEN,BLUE ffmpeg|simplejpeg

ffmpeg      SPDL's own decoding: FFmpeg decodes, crops, mirrors and converts to RGB; NumPy converts to float32. FFmpeg
            crops before it converts to RGB. The offset of a crop is rounded down to an even number, because chroma has
            half the resolution.
simplejpeg  SPDL only runs the threads. libjpeg-turbo decodes; NumPy crops, mirrors and converts to float32.

The memory of the batches is reused. No file is written to OUT.

The program needs `pip install spdl simplejpeg numpy`, and the libraries of FFmpeg on the system (on Debian:
libavdevice59).
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
    parse_arguments,
    random_crop,
    random_offset,
    shuffle_forever,
    take_turns,
)

_PREFETCH = 3  # largest number of batches in the queue of finished batches
_IN_FLIGHT = 5  # largest number of finished batches outside of the queue: before the queue, or in use by the consumer


def crop_with_ffmpeg(path: str) -> Any:
    """Return a random crop, mirrored with probability ½, as RGB frames of FFmpeg."""
    packets = spdl.io.demux_image(path)
    codec = packets.codec
    top, left = random_offset(codec.height, codec.width)
    mirror = "hflip," if random.random() < 0.5 else ""
    filters = f"crop={CROP_PX}:{CROP_PX}:{left}:{top},{mirror}format=pix_fmts=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=filters)


def fill_with_ffmpeg(paths: Sequence[str], mean: Mean, out: Any) -> None:
    """Write a batch of crops to `out`, float32 (N, 3, 224, 224)."""
    pixels = spdl.io.to_numpy(spdl.io.convert_frames([crop_with_ffmpeg(path) for path in paths]))
    for image, target in zip(pixels, out, strict=True):
        np.subtract(np.ascontiguousarray(image.transpose(2, 0, 1)), mean[:, None, None], out=target)


def fill_with_simplejpeg(paths: Sequence[str], mean: Mean, out: Any) -> None:
    """Write a batch of crops to `out`, float32 (N, 3, 224, 224)."""
    for path, target in zip(paths, out, strict=True):
        random_crop(simplejpeg.decode_jpeg(Path(path).read_bytes()), mean, target)


def endless_batches(records: Records, threads: int, mean: Mean, fill: Callable[..., None]) -> Iterator[Any]:
    """Yield batches of images without end. `fill` is fill_with_ffmpeg or fill_with_simplejpeg."""
    buffers = [np.zeros((BATCH, 3, CROP_PX, CROP_PX), np.float32) for _ in range(threads + _IN_FLIGHT + _PREFETCH)]
    next_buffer = cycle(buffers)

    def make_batch(batch_records: Records) -> tuple[Any, list[int]]:
        paths, labels = zip(*batch_records, strict=True)
        out = next(next_buffer)
        fill(paths, mean, out)
        return out, list(labels)

    builder = PipelineBuilder().add_source(shuffle_forever(records)).aggregate(BATCH)
    pipeline = builder.pipe(make_batch, concurrency=threads).add_sink(_PREFETCH).build(num_threads=threads)
    with pipeline.auto_stop():
        for images, _ in pipeline:
            yield images


def main() -> None:
    """Run the stream. One line on standard input starts one timed turn (see stream_turn.py)."""
    records, _, threads, mean, (decoder,) = parse_arguments()
    fill, decoder_version = {
        "ffmpeg": (fill_with_ffmpeg, ""),
        "simplejpeg": (fill_with_simplejpeg, f", simplejpeg {version('simplejpeg')}"),
    }[decoder]
    take_turns(f"SPDL {version('spdl')}{decoder_version}", endless_batches(records, threads, mean, fill), threads)


if __name__ == "__main__":
    main()

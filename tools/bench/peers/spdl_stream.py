"""Stream of SPDL: a Pipeline whose threads read the JPEG files. Each task makes one batch.

    python -m tools.bench.peers.spdl_stream FOLDER OUT THREADS RED,GREEN,BLUE ffmpeg|simplejpeg [resized]

ffmpeg      SPDL's own decoding: FFmpeg decodes, crops, mirrors and converts to RGB; NumPy converts to float32. FFmpeg
            crops before it converts to RGB. The offset of a crop is rounded down to an even number, because chroma has
            half the resolution.
simplejpeg  SPDL only runs the threads. libjpeg-turbo decodes; NumPy crops, mirrors and converts to float32.

With `resized`, the crop is a random region. FFmpeg's bilinear scaler or Pillow's bilinear filter resizes the region.

The memory of the batches is reused. No file is written to OUT.

The program needs `pip install spdl simplejpeg numpy pillow`, and the libraries of FFmpeg on the system (on Debian:
libavdevice59).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import spdl.io  # type: ignore[import-not-found]
from PIL import Image
from spdl.pipeline import PipelineBuilder  # type: ignore[import-not-found]

from tools.bench.peers.stream_turn import (
    BATCH,
    CROP_PX,
    RESIZED,
    Mean,
    Records,
    normalize,
    parse_arguments,
    random_crop,
    random_offset,
    random_region,
    shuffle_forever,
    take_turns,
)

_PREFETCH = 3  # largest number of batches in the queue of finished batches
_IS_RESIZED = sys.argv[-1] == RESIZED
_IN_FLIGHT = 5  # largest number of finished batches that wait to enter the queue, or that the consumer uses


def crop_with_ffmpeg(path: str) -> Any:
    """Return a random crop or region, mirrored with probability ½, as RGB frames of FFmpeg."""
    packets = spdl.io.demux_image(path)
    codec = packets.codec
    scale, (top, left), height, width = "", random_offset(codec.height, codec.width), CROP_PX, CROP_PX
    if _IS_RESIZED:
        top, left, height, width = random_region(codec.height, codec.width)
        scale = f"scale={CROP_PX}:{CROP_PX}:flags=bilinear,"
    mirror = "hflip," if random.random() < 0.5 else ""
    filters = f"crop={width}:{height}:{left}:{top},{scale}{mirror}format=pix_fmts=rgb24"
    return spdl.io.decode_packets(packets, filter_desc=filters)


def fill_with_ffmpeg(paths: Sequence[str], mean: Mean, out: Any) -> None:
    """Write a batch of crops to `out`, float32 (N, 3, 224, 224)."""
    pixels = spdl.io.to_numpy(spdl.io.convert_frames([crop_with_ffmpeg(path) for path in paths]))
    for image, target in zip(pixels, out, strict=True):
        normalize(image, mean, target, _IS_RESIZED)


def resize_region(pixels: Any, mean: Mean, out: Any) -> None:
    """Write to `out` a random region of `pixels`, uint8 (H, W, 3), resized and mirrored with probability ½."""
    top, left, height, width = random_region(*pixels.shape[:2])
    region = Image.fromarray(pixels[top : top + height, left : left + width])
    window = np.asarray(region.resize((CROP_PX, CROP_PX), Image.Resampling.BILINEAR))
    normalize(window[:, ::-1] if random.random() < 0.5 else window, mean, out, is_resized=True)


def fill_with_simplejpeg(paths: Sequence[str], mean: Mean, out: Any) -> None:
    """Write a batch of crops to `out`, float32 (N, 3, 224, 224)."""
    for path, target in zip(paths, out, strict=True):
        pixels = simplejpeg.decode_jpeg(Path(path).read_bytes())
        if _IS_RESIZED:
            resize_region(pixels, mean, target)
        else:
            random_crop(pixels, mean, target)


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
    """Run the stream. Each line on standard input starts a timed run (see stream_turn.py)."""
    records, _, threads, mean, (decoder, *_) = parse_arguments()
    fill, decoder_version = {
        "ffmpeg": (fill_with_ffmpeg, ""),
        "simplejpeg": (fill_with_simplejpeg, f", simplejpeg {version('simplejpeg')}"),
    }[decoder]
    take_turns(f"SPDL {version('spdl')}{decoder_version}", endless_batches(records, threads, mean, fill), threads)


if __name__ == "__main__":
    main()

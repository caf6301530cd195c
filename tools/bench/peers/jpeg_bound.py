"""The bound: libjpeg-turbo decodes every picture and encodes a square of 256 px at quality 90, and nothing else.

    python -m tools.bench.peers.jpeg_bound FOLDER OUT JOBS PASSES

Files are read from the page cache, PASSES times over, by simplejpeg in forked processes; nothing is written. The
squares that it encodes are of the same photographs, rescaled beforehand: a thousand of them at most are held. It takes
libjpeg-turbo's faster, less exact arithmetic, and leaves out the few pictures that simplejpeg cannot read: CMYK, PNG.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import numpy as np
import simplejpeg

from tools.bench.peers.build_turn import QUALITY, SIDE_PX, Paths, arguments, started_pool, take_turn
from tools.bench.peers.pillow_script import square

_HELD = 1000
_squares: list[Any] = []  # of the parent, seen by its forked processes


def readable(paths: Paths) -> tuple[Paths, dict[int, str]]:
    """The pictures that simplejpeg decodes, and one path for each file among them, by its number on the disk."""
    files: dict[int, str] = {}
    bad: set[int] = set()
    kept = []
    for path in paths:
        file = os.stat(path).st_ino
        if file not in files and file not in bad:
            try:
                with open(path, "rb") as opened:
                    simplejpeg.decode_jpeg(opened.read())
                files[file] = path
            except ValueError:
                bad.add(file)
        if file in files:
            kept.append(path)
    return kept, files


def images(task: tuple[int, str]) -> int:
    """Decode one file, encode one square."""
    index, path = task
    with open(path, "rb") as opened:
        simplejpeg.decode_jpeg(opened.read())
    simplejpeg.encode_jpeg(_squares[index % len(_squares)], quality=QUALITY, colorsubsampling="420")
    return 1


def main() -> None:
    """One turn."""
    paths, _, jobs, (passes,) = arguments()
    paths, files = readable(paths)
    for path in list(files.values())[:_HELD]:
        _squares.append(np.ascontiguousarray(square(path, "BICUBIC")))
        assert _squares[-1].shape == (SIDE_PX, SIDE_PX, 3)
    with started_pool(jobs) as pool:

        def work() -> int:
            tasks = enumerate(list(paths) * int(passes))
            return sum(pool.imap_unordered(images, tasks, chunksize=64))

        take_turn(f"simplejpeg {version('simplejpeg')}", work)


if __name__ == "__main__":
    main()

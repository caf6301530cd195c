"""Upper bound of the build: libjpeg-turbo decodes every image and encodes a square of 256 px at quality 90.

    python -m tools.bench.peers.jpeg_bound FOLDER OUT JOBS PASSES

Forked processes read the files PASSES times from the page cache. The processes decode and encode with simplejpeg. No
file is written. Before the timing starts, the program cuts the squares out of the same photographs, and keeps at most
1,000 squares in memory. simplejpeg uses libjpeg-turbo's faster but less exact arithmetic. The few images that
simplejpeg cannot decode (CMYK and PNG) are skipped.
"""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Any

import numpy as np
import simplejpeg

from tools.bench.peers.build_turn import QUALITY, SIDE_PX, Paths, parse_arguments, start_pool, take_turn
from tools.bench.peers.pillow_script import central_square

_MAX_SQUARES = 1000
_squares: list[Any] = []  # the parent process fills this list before it forks


def decodable(paths: Paths) -> tuple[Paths, dict[int, str]]:
    """Return the paths of the images that simplejpeg can decode, and {inode: first path with this inode}."""
    files: dict[int, str] = {}
    bad_inodes: set[int] = set()
    good_paths = []
    for path in paths:
        inode = os.stat(path).st_ino
        if inode not in files and inode not in bad_inodes:
            try:
                with open(path, "rb") as file:
                    simplejpeg.decode_jpeg(file.read())
                files[inode] = path
            except ValueError:
                bad_inodes.add(inode)
        if inode in files:
            good_paths.append(path)
    return good_paths, files


def process_image(task: tuple[int, str]) -> int:
    """Decode one file and encode one square. Returns 1, the number of images."""
    index, path = task
    with open(path, "rb") as file:
        simplejpeg.decode_jpeg(file.read())
    simplejpeg.encode_jpeg(_squares[index % len(_squares)], quality=QUALITY, colorsubsampling="420")
    return 1


def main() -> None:
    """Decode and encode the images in one timed turn (see build_turn.py)."""
    paths, _, jobs, (passes,) = parse_arguments()
    paths, files = decodable(paths)
    for path in list(files.values())[:_MAX_SQUARES]:
        _squares.append(np.ascontiguousarray(central_square(path, "BICUBIC")))
        assert _squares[-1].shape == (SIDE_PX, SIDE_PX, 3)
    with start_pool(jobs) as pool:

        def work() -> int:
            tasks = enumerate(list(paths) * int(passes))
            return sum(pool.imap_unordered(process_image, tasks, chunksize=64))

        take_turn(f"simplejpeg {version('simplejpeg')}", work)


if __name__ == "__main__":
    main()

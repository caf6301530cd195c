"""Functions for the programs of the build benchmark: they parse arguments, wait for the start, and write an LMDB.

    python -m tools.bench.peers.NAME FOLDER OUT JOBS ...

A program imports its libraries, lists the images of FOLDER/CLASS/ and starts its pool. The program then prints the
versions of its libraries, and waits for a line on standard input. After this line, the program processes the images,
writes to OUT, prints the number of images, and ends.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

SIDE_PX, QUALITY = 256, 90

Paths = Sequence[str]


def parse_arguments() -> tuple[Paths, Path, int, list[str]]:
    """Return the paths of the images, the output path, the number of workers, and the other arguments."""
    folder, out, jobs, *others = sys.argv[1:]
    return sorted(str(path) for path in Path(folder).glob("*/*")), Path(out), int(jobs), others


def take_turn(versions: str, work: Callable[[], int]) -> None:
    """Print `versions`, wait for a line, run `work`, and print the number of images that it returns.

    If standard input ends without a line, the benchmark has ended, and `work` is not run.
    """
    print(versions, flush=True)  # noqa: T201
    if sys.stdin.readline():
        print(work(), flush=True)  # noqa: T201


def start_pool(jobs: int, initialize: Callable[[], object] = lambda: None) -> AbstractContextManager[Any]:
    """Start a pool of `jobs` forked processes, and return it after every process has called `initialize`."""
    context = multiprocessing.get_context("fork")
    ready = context.Semaphore(0)

    def initialize_worker() -> None:
        initialize()
        ready.release()

    pool = context.Pool(jobs, initialize_worker)
    for _ in range(jobs):
        ready.acquire()
    return pool


def take_lmdb_turn(
    versions: str, make_jpeg: Callable[[str], bytes], initialize: Callable[[], object] = lambda: None
) -> None:
    """Take one turn (a timed run): write `make_jpeg(path)` for every image to one plain LMDB, in one commit."""
    import lmdb

    paths, out, jobs, _ = parse_arguments()
    with start_pool(jobs, initialize) as pool:

        def work() -> int:
            with lmdb.open(str(out), map_size=1 << 40) as env, env.begin(write=True) as txn:
                for index, content in enumerate(pool.imap(make_jpeg, paths, chunksize=16)):
                    txn.put(b"%08d" % index, content)
            return len(paths)

        take_turn(f"{versions}, lmdb {lmdb.__version__}", work)

"""What the programs share: waiting for the word to begin, and a pool of processes whose parent writes one LMDB.

    python -m tools.bench.peers.NAME FOLDER OUT JOBS ...

A program imports, lists the pictures of FOLDER/class/, starts its pool, prints what it runs on, and waits for a line
on standard input. Then it works, writes to OUT, prints how many pictures that was, and ends.
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


def arguments() -> tuple[Paths, Path, int, list[str]]:
    """The pictures, where to write, how many workers, and what else stands on the command line."""
    folder, out, jobs, *more = sys.argv[1:]
    return sorted(str(path) for path in Path(folder).glob("*/*")), Path(out), int(jobs), more


def take_turn(versions: str, work: Callable[[], int]) -> None:
    """Say `versions`, wait for the word, work, say how many; end without a word where whoever asked is gone."""
    print(versions, flush=True)  # noqa: T201
    if sys.stdin.readline():
        print(work(), flush=True)  # noqa: T201


def started_pool(jobs: int, begin: Callable[[], object] = lambda: None) -> AbstractContextManager[Any]:
    """A pool of forked processes, each of which has called `begin`."""
    context = multiprocessing.get_context("fork")
    ready = context.Semaphore(0)

    def first() -> None:
        begin()
        ready.release()

    pool = context.Pool(jobs, first)
    for _ in range(jobs):
        ready.acquire()
    return pool


def lmdb_turn(versions: str, jpeg: Callable[[str], bytes], begin: Callable[[], object] = lambda: None) -> None:
    """One turn of a script that puts `jpeg(path)` of every picture into one plain LMDB, in one commit."""
    import lmdb

    paths, out, jobs, _ = arguments()
    with started_pool(jobs, begin) as pool:

        def work() -> int:
            with lmdb.open(str(out), map_size=1 << 40) as env, env.begin(write=True) as txn:
                for index, content in enumerate(pool.imap(jpeg, paths, chunksize=16)):
                    txn.put(b"%08d" % index, content)
            return len(paths)

        take_turn(f"{versions}, lmdb {lmdb.__version__}", work)

"""Builds that end before their n-th step on the disk, for n = 0, 1, 2… until one runs through; each given again.

A program of tests/prep/build/test_interrupted.py and tests/prep/build/test_full_disk.py: stepped.py PHOTOS WORK HOW. A step is a folder made,
a file opened to write, a rename, an fsync, a transaction of LMDB, and for `kill` and `restart` a removal. HOW: `kill`
dies there, nothing is cleaned up; `restart` does so while it discards another build, its files in the order of their
names, `restart-reverse` in the other order; `full` and `broken` have all steps
from there on fail, as on a disk without room or one that is broken; `limit` allows no file over so many bytes.
Says a JSON object a line: {"at", "code", "error", "torn", "again", "error_again"}. The stores are WORK/NNN.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from prep.build.plan import BuildPolicy
from prep.console import UserError
from prep.store.lmdb_shard import read
from prep.store.manifest import Store, StoreError
from tests.helpers.building import PPM, Stop, Stopped, build

left: int | None = None
how = ""
RESTARTS = 14  # steps: more than discarding takes
LIMITS = (0, 1, 100, 500, 900, 1000, 1200, 2000, 4096, 5000, 8192)
LIMITS += (10_000, 12_288, 16_384, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000, 130_000, 1_000_000)


def step() -> None:
    global left
    if left is None:
        return
    if left > 0:
        left -= 1
    elif how.startswith(("kill", "restart")):
        os._exit(9)
    elif how != "limit":
        code = errno.EIO if how == "broken" else errno.ENOSPC
        raise OSError(code, os.strerror(code))


def watch(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
    if writes or event in ("os.mkdir", "os.rename"):
        step()
    if event in ("os.remove", "os.rmdir") and how.startswith(("kill", "restart")):
        step()


def fsync(handle: int) -> None:
    step()


@contextmanager
def scandir(path: Any, real: Any = os.scandir) -> Iterator[Iterator[os.DirEntry[str]]]:
    """In an order that no file system has a say in."""
    with real(path) as entries:
        yield iter(sorted(entries, key=lambda entry: os.fsencode(entry.name), reverse=how.endswith("reverse")))


class Environment:
    """An LMDB whose commits are steps."""

    def __init__(self, path: str, real: Any = lmdb.open, **options: Any) -> None:
        self.real = real(path, **options)

    def begin(self, **options: Any) -> Any:
        try:
            step()
        except OSError as error:
            raise lmdb.DiskError(f"mdb_txn_commit: {error.strerror}") from None
        return self.real.begin(**options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *of: Any) -> None:
        self.real.close()


def in_a_child(photos: Path, store: Path, steps: int | None, policy: BuildPolicy) -> tuple[int, str]:
    """Exit code of a build, and what it said."""
    global left
    said, say = os.pipe()
    child = os.fork()
    if child == 0:
        left = steps
        if how == "limit" and steps is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[steps], resource.RLIM_INFINITY))
        code = 0
        try:
            build(photos, store, policy=policy)
        except UserError as error:
            os.write(say, str(error).encode())
            code = error.exit_code
        except Exception as error:
            os.write(say, f"{type(error).__name__}: {error}".encode())
            code = 70
        os._exit(code)
    os.close(say)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(said, "rb") as pipe:
        return code, pipe.read().decode()


def is_torn(store: Path) -> bool:
    """A store that opens, and is not whole."""
    try:
        opened = Store.open(store)
        if opened.splits:
            count = sum(1 for path in opened.shard_paths("train") for _ in read(Path(path)))
            return (
                count != opened.split("train").records
                or not opened.mean_image().size
                or not opened.color_stats().pixels
            )
        return True
    except StoreError:
        return (store / "manifest.json").exists()


def main(photos: Path, work: Path) -> None:
    policy = BuildPolicy(restart=how.startswith("restart"))
    at, code = 0, -1
    while code != 0 and (not how.startswith("restart") or at < RESTARTS):
        store = work / f"{at:03d}"
        if how.startswith("restart"):
            other = PPM.__class__(**{**vars(PPM), "seed": 5})
            try:
                build(photos, store, other, runner=Stop())
            except Stopped:
                pass
        code, error = in_a_child(photos, store, at, policy)
        torn = is_torn(store)
        again, error_again = in_a_child(photos, store, None, policy)
        line = {"at": at, "code": code, "error": error, "torn": torn, "again": again, "error_again": error_again}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        at += 2 if how == "broken" else 1


if __name__ == "__main__":
    how = sys.argv[3]
    os.fsync, os.scandir = fsync, scandir
    if how != "limit":
        lmdb.open = Environment
    sys.addaudithook(watch)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Interrupt build n before its disk operation n, for n = 0, 1, 2…, and run each build again.

    interrupted_builds.py PHOTOS WORK MODE

tests/prep/build/test_interrupted.py and test_full_disk.py run this program. The program ends after the first n at which
the build succeeds. In the modes `restart` and `restart-reverse`, the program ends after n = RESTARTS - 1. The mode
`broken` uses only even n. Disk operations are: creating a folder, opening a file for writing, a rename, an fsync, and a
transaction of LMDB. In the modes `kill`, `restart` and `restart-reverse`, the removal of a file or folder is also a
disk operation. MODE is one of

    kill              the process ends before the operation, without any clean-up
    kill-merge        like kill, but the stores PHOTOS/one and PHOTOS/two are merged
    restart           like kill, but the build first removes the files of an unfinished build, sorted by name
    restart-reverse   like restart, but the files are removed in the reverse order
    full, broken      operation n and all later operations fail, as they do on a full or a broken disk
    limit             no file may be longer than LIMITS[n]

The program prints a JSON object for each n: {"at": n, "code", "error", "torn", "again", "error_again"}. `code` and
`error` are the exit code and error of the interrupted build. `torn` says whether the store has a manifest.json although
the store is incomplete. `again` and `error_again` are the exit code and error of the same build when it is run again.
The stores are WORK/NNN.
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
from prep.console import Progress, UserError
from prep.merge.stores import merge_stores
from prep.store.lmdb_shard import read
from prep.store.manifest import Store, StoreError
from tests.helpers.building import PPM, InlineRunner, Stopped, StoppingRunner, build

remaining: int | None = None  # number of disk operations left before the interruption; None: no interruption
mode = ""
RESTARTS = 14  # larger than the number of disk operations that remove the files of an unfinished build
LIMITS = (0, 1, 100, 500, 900, 1000, 1200, 2000, 4096, 5000, 8192)  # largest size of a file in bytes, for each n
LIMITS += (10_000, 12_288, 16_384, 20_000, 40_000, 60_000, 80_000, 100_000, 120_000, 130_000, 1_000_000)


def disk_operation() -> None:
    global remaining
    if remaining is None:
        return
    if remaining > 0:
        remaining -= 1
    elif mode.startswith(("kill", "restart")):
        os._exit(9)
    elif mode != "limit":
        code = errno.EIO if mode == "broken" else errno.ENOSPC
        raise OSError(code, os.strerror(code))


def audit(event: str, args: tuple[Any, ...]) -> None:
    writes = event == "open" and isinstance(args[1], str) and "w" in args[1]
    if writes or event in ("os.mkdir", "os.rename"):
        disk_operation()
    if event in ("os.remove", "os.rmdir") and mode.startswith(("kill", "restart")):
        disk_operation()


def fsync(handle: int) -> None:
    disk_operation()


@contextmanager
def sorted_scandir(path: Any, real: Any = os.scandir) -> Iterator[Iterator[os.DirEntry[str]]]:
    """Replacement for os.scandir with an order that does not depend on the file system."""
    with real(path) as entries:
        yield iter(sorted(entries, key=lambda entry: os.fsencode(entry.name), reverse=mode.endswith("reverse")))


class Environment:
    """An LMDB environment whose transactions are disk operations."""

    def __init__(self, path: str, real: Any = lmdb.open, **options: Any) -> None:
        self.real = real(path, **options)

    def begin(self, **options: Any) -> Any:
        try:
            disk_operation()
        except OSError as error:
            raise lmdb.DiskError(f"mdb_txn_commit: {error.strerror}") from None
        return self.real.begin(**options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __enter__(self) -> Environment:
        return self

    def __exit__(self, *of: Any) -> None:
        self.real.close()


def build_in_child(photos: Path, store: Path, operations: int | None, policy: BuildPolicy) -> tuple[int, str]:
    """Run a build in a forked process, and return its exit code and error.

    If `operations` is None, the build is not interrupted.
    """
    global remaining
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        remaining = operations
        if mode == "limit" and operations is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[operations], resource.RLIM_INFINITY))
        code = 0
        try:
            if mode == "kill-merge":
                merge_stores([photos / "one", photos / "two"], store, InlineRunner(), Progress(1, "records"))
            else:
                build(photos, store, policy=policy)
        except UserError as error:
            os.write(writer, str(error).encode())
            code = error.exit_code
        except Exception as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            code = 70
        os._exit(code)
    os.close(writer)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(reader, "rb") as pipe:
        return code, pipe.read().decode()


def is_torn(store: Path) -> bool:
    """Return whether a store has a manifest.json although the store is incomplete."""
    try:
        opened = Store.open(store)
        if opened.splits:
            count = sum(1 for path in opened.shard_paths("train") for _ in read(Path(path)))
            split, mean, stats = opened.split("train"), opened.mean_image(), opened.color_stats()
            return count != split.records or not mean.size or not stats.pixels
        return True
    except StoreError:
        return (store / "manifest.json").exists()


def main(photos: Path, work: Path) -> None:
    policy = BuildPolicy(restart=mode.startswith("restart"))
    at, code = 0, -1
    while code != 0 and (not mode.startswith("restart") or at < RESTARTS):
        store = work / f"{at:03d}"
        if mode.startswith("restart"):
            other_settings = PPM.__class__(**{**vars(PPM), "seed": 5})
            try:
                build(photos, store, other_settings, runner=StoppingRunner())
            except Stopped:
                pass
        code, error = build_in_child(photos, store, at, policy)
        torn = is_torn(store)
        again, error_again = build_in_child(photos, store, None, policy)
        line = {"at": at, "code": code, "error": error, "torn": torn, "again": again, "error_again": error_again}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
        at += 2 if mode == "broken" else 1


if __name__ == "__main__":
    mode = sys.argv[3]
    os.fsync, os.scandir = fsync, sorted_scandir
    if mode != "limit":
        lmdb.open = Environment
    sys.addaudithook(audit)
    main(Path(sys.argv[1]), Path(sys.argv[2]))

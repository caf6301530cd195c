"""Journal of a copy: the files that have arrived in the destination and were verified.

If an interrupted copy is run again, it skips the files that the journal lists.

    DST/.copy/source.json               digest of the source's manifest, which identifies the store that is copied
    DST/.copy/train/00000/data.mdb.json size, version and SHA-256 of train/00000/data.mdb; written after the data.mdb
                                        was verified
    DST/.copy/incoming/…                only in a local destination: files that are being transferred

A file counts as arrived only if its size and version in the destination are still those in the journal. The version of
a file is its ETag in object storage, and its modification time in a local folder. The last step of a copy deletes the
folder .copy.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from prep.console import UserError
from prep.remote.folder import Folder, LocalFolder
from prep.schema import Count, Digest, Text, decode
from prep.store.manifest import COPY_FOLDER

T = TypeVar("T")

SOURCE = f"{COPY_FOLDER}/source.json"
_INCOMING = f"{COPY_FOLDER}/incoming"
_REQUESTS_AT_ONCE = 16


@dataclass(frozen=True)
class CopySource:
    """Identity of the store that is copied."""

    manifest: Text  # SHA-256 (hex) of the store's manifest.json
    fingerprint: Text
    name: Text  # argument SRC of the command that began the copy


@dataclass(frozen=True)
class Arrival:
    """A file that arrived and was verified."""

    size_bytes: Count
    version: Text
    sha256: Digest


def read_source(target: Folder) -> CopySource | None:
    """Return the identity of the store that was being copied to `target`; None if `target` has no unfinished copy.

    If source.json is damaged, the result differs from every store.
    """
    try:
        return decode(CopySource, target.read(SOURCE), SOURCE, "")
    except FileNotFoundError:
        return None
    except UserError:
        return CopySource("", "unknown, because the file source.json of the copy is damaged", "an unknown store")


def write_source(target: Folder, source: CopySource) -> None:
    """Write source.json, which says that `target` has an unfinished copy of the store `source`."""
    target.write(SOURCE, json.dumps(asdict(source)).encode())


def record_arrival(target: Folder, path: str, arrival: Arrival) -> None:
    """Note in the journal that a file arrived and was verified."""
    target.write(_entry(path), json.dumps(asdict(arrival)).encode())


def read_arrivals(target: Folder, paths: Iterable[str]) -> dict[str, Arrival]:
    """Return {path: arrival} of the files that the journal lists and that are unchanged in the destination."""
    paths = list(paths)

    def read(path: str) -> Arrival | None:
        try:
            return decode(Arrival, target.read(_entry(path)), path, "")
        except (FileNotFoundError, UserError):
            return None

    entries = dict(zip(paths, _for_each(read, paths), strict=True))
    return unchanged(target, {path: arrival for path, arrival in entries.items() if arrival is not None})


def unchanged(target: Folder, arrivals: dict[str, Arrival]) -> dict[str, Arrival]:
    """Return the `arrivals` whose files still have the noted size and version in the destination."""
    states = target.states(arrivals)
    return {
        path: arrival
        for path, arrival in arrivals.items()
        if path in states and states[path] == (arrival.size_bytes, arrival.version)
    }


def incoming_file(target: LocalFolder, path: str, suffix: str) -> Path:
    """Return the temporary path of a file that is being transferred. `suffix` must be different in every process."""
    return target.root / _INCOMING / suffix / path


def remove_incoming(target: Folder) -> None:
    """Remove the unfinished files of a copy that was killed."""
    if isinstance(target, LocalFolder):
        shutil.rmtree(target.root / _INCOMING, ignore_errors=True)


def remove_journal(target: Folder, paths: Iterable[str]) -> None:
    """Delete the journal of a complete copy of the files `paths`. The file source.json is deleted last."""
    if isinstance(target, LocalFolder):
        shutil.rmtree(target.root / COPY_FOLDER, ignore_errors=True)
        return
    _for_each(lambda path: target.delete([_entry(path)]), paths)
    target.delete([SOURCE])


def _for_each(request: Callable[[str], T], paths: Iterable[str]) -> list[T]:
    """Call `request` for each path, in several threads, and return the results in the order of the paths.

    After Ctrl-C, no further requests are sent.
    """
    threads = ThreadPoolExecutor(_REQUESTS_AT_ONCE)
    try:
        return list(threads.map(request, paths))
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _entry(path: str) -> str:
    return f"{COPY_FOLDER}/{path}.json"

"""Copies a store from one folder to another. Either folder may be local or in object storage (S3, Google Cloud).

A copy has these steps:

1.  Read the source's manifest and verify the checksum in it. Refuse a destination that contains anything other than a
    complete or unfinished copy of the source.
2.  Write source.json of the journal (journal.py), then copy and verify the files in worker processes (copy_task.py).
    Files that the journal lists are skipped if they are still unchanged in the destination.
3.  Check that the verified files in the destination are unchanged. Check that the source's manifest and the journal's
    source.json are unchanged.
4.  If the destination is in object storage, write SHA256SUMS. Then write manifest.json, and read it back from the
    destination.
5.  Delete the journal.

The manifest is written last, so a folder with a manifest is a complete store. A command that opens an unfinished copy
ends with an error that advises to run `alexprep copy` again.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prep.build.preflight import free_bytes
from prep.console import DiskFull, Progress, UserError, bytes_text, count_noun, say
from prep.files import hold_lock
from prep.remote import journal
from prep.remote.contents import (
    CHECKSUMS,
    MANIFEST,
    StoreFile,
    format_checksums,
    parse_checksums,
    read_manifest,
    store_files,
)
from prep.remote.copy_task import CopyTask, copy_file
from prep.remote.folder import FileState, Folder, LocalFolder
from prep.remote.journal import Arrival, CopySource
from prep.remote.urls import open_folder
from prep.workers import Runner, WorkerDied

MB = 1_000_000


@dataclass(frozen=True)
class CopyPlan:
    """Source, destination and files of one copy. Created by `planned_copy`."""

    source: Folder
    target: Folder
    manifest: bytes
    identity: CopySource
    files: tuple[StoreFile, ...]  # all files except the manifest
    states: dict[str, FileState]  # path -> state of the file in the source
    checksums: dict[str, str]  # path -> SHA-256 (hex) from the source's SHA256SUMS
    arrivals: dict[str, Arrival]  # path -> file that an earlier run copied and verified
    is_complete: bool  # whether the destination is already a complete copy
    scratch: Path  # local folder for temporary files of a copy between two buckets; Path() for other copies

    @property
    def size_bytes(self) -> int:
        """Size of all files except the manifest."""
        return sum(state.size_bytes for state in self.states.values())

    @property
    def retries(self) -> int:
        """Number of requests that this process has repeated."""
        return self.source.retries + self.target.retries

    @property
    def arrived_bytes(self) -> int:
        """Size of the files that an earlier run copied."""
        return sum(arrival.size_bytes for arrival in self.arrivals.values())


@dataclass(frozen=True)
class CopyResult:
    """Totals of a finished copy."""

    fingerprint: str
    files: int  # number of files in the store, the manifest included
    bytes: int  # size of all files in the store, in bytes
    copied_files: int  # number of files that this run copied; earlier runs copied the other files
    copied_bytes: int  # size of the files that this run copied
    retries: int  # number of repeated requests, plus number of repeated transfers of whole files
    seconds: float


@contextmanager
def planned_copy(source_name: str, target_name: str) -> Iterator[CopyPlan]:
    """Compare source and destination, and plan the copy. During the `with` block, a local destination is locked.

    Raises UserError if the source is not a complete store. Also raises UserError if the destination contains anything
    other than a complete or unfinished copy of the source. Raises DiskFull if a local destination has too little space.
    """
    source, target = open_folder(source_name), open_folder(target_name)
    if _same_folder(source, target):
        raise UserError(f"{target.name} is the source itself. Name another destination.")
    store, manifest = read_manifest(source)
    identity = CopySource(sha256(manifest).hexdigest(), store.fingerprint, source.name)
    files = tuple(store_files(store))
    states = source.states([*(file.path for file in files), CHECKSUMS])
    for file in files:
        if file.path not in states:
            raise UserError(f"{source.name}: {file.path} is missing. The store is damaged: build or copy it again.")
        size_bytes = states[file.path].size_bytes
        if file.max_bytes is not None and size_bytes > file.max_bytes:
            raise UserError(
                f"{source.name}: {file.path} has {size_bytes:,} bytes, expected at most {file.max_bytes:,}. The store "
                "is damaged: build or copy it again."
            )
    has_checksums = states.pop(CHECKSUMS, None) is not None and source.is_remote
    checksums = parse_checksums(source.read(CHECKSUMS)) if has_checksums else {}
    # SHA256SUMS is ignored if its digest of the manifest is wrong: a program may have replaced all files but
    # SHA256SUMS.
    if checksums.get(MANIFEST) != identity.manifest:
        checksums = {}
    with ExitStack() as resources:
        scratch = Path()
        if isinstance(target, LocalFolder):
            _refuse_other_content(target)  # this check comes before the lock file is written
            with target.disk_errors():
                target.root.mkdir(parents=True, exist_ok=True)
            resources.enter_context(hold_lock(target.root, "build or copy"))
        elif source.is_remote:
            scratch = Path(resources.enter_context(tempfile.TemporaryDirectory(prefix="alexprep-copy-")))
        is_complete = _holds_store(target, identity, states)
        arrivals = {} if is_complete else _arrivals(target, identity, list(states))
        plan = CopyPlan(
            source,
            target,
            manifest,
            identity,
            files,
            states,
            checksums,
            {path: arrival for path, arrival in arrivals.items() if arrival.size_bytes == states[path].size_bytes},
            is_complete,
            scratch,
        )
        if not is_complete and isinstance(target, LocalFolder):
            _check_space(plan, target)
        yield plan


def run_copy(plan: CopyPlan, runner: Runner, progress: Progress) -> CopyResult:
    """Copy and verify the files that have not arrived, then write the manifest. `progress` counts megabytes.

    Raises UserError if a file cannot be copied or is damaged. If the same copy is run again, it continues with the
    files that have not arrived.
    """
    started = time.monotonic()
    target, arrivals = plan.target, dict(plan.arrivals)
    left = [file for file in plan.files if file.path not in arrivals]
    if plan.is_complete:
        left = []
    else:
        journal.remove_incoming(target)
        journal.write_source(target, plan.identity)
    progress.skip((plan.size_bytes if plan.is_complete else plan.arrived_bytes) // MB)
    skipped, retries = progress.done, plan.retries
    tasks = [
        CopyTask(
            _pickled_name(plan.source),
            _pickled_name(target),
            file,
            plan.states[file.path],
            plan.checksums.get(file.path, ""),
            plan.scratch,
        )
        for file in left
    ]
    on_progress = lambda counts: progress.update(skipped + counts.bytes // MB)  # noqa: E731
    for task, copied in runner.map(copy_file, tasks, on_progress):
        if isinstance(copied, WorkerDied):
            raise UserError(
                f"{plan.source.name}/{task.file.path}: the process that checked this file {copied.describe()}. If "
                "memory ran out, use fewer --jobs. Otherwise the file is damaged: run alexprep verify."
            )
        arrivals[task.file.path] = copied.arrival
        retries += copied.retries
    # Tasks that ran in this process have also increased plan.retries. Each retry counts once, because plan.retries is
    # subtracted now and added at the end.
    retries -= plan.retries
    if not plan.is_complete:
        _finish(plan, arrivals)
    if not plan.is_complete or journal.read_source(target) is not None:
        journal.remove_journal(target, [file.path for file in plan.files])
    copied_bytes = sum(plan.states[file.path].size_bytes for file in left) + len(plan.manifest) * (not plan.is_complete)
    return CopyResult(
        plan.identity.fingerprint,
        len(plan.files) + 1,
        plan.size_bytes + len(plan.manifest),
        len(left) + (not plan.is_complete),
        copied_bytes,
        retries + plan.retries,
        time.monotonic() - started,
    )


def _finish(plan: CopyPlan, arrivals: dict[str, Arrival]) -> None:
    """Check the destination, then write SHA256SUMS and the manifest (steps 3 and 4 of the module's docstring).

    Raises UserError if source or destination changed during the copy.
    """
    source, target = plan.source, plan.target
    changed = sorted(arrivals.keys() - journal.unchanged(target, arrivals).keys())
    if changed:
        raise UserError(
            f"{target.name}: {count_noun(len(changed), 'file')} changed after the copy had verified them (first: "
            f"{changed[0]}). Stop the program that writes into this folder, then run the same command again."
        )
    if source.read(MANIFEST) != plan.manifest:
        raise UserError(
            f"{source.name}: the manifest changed during the copy. Remove {target.name}, and copy the store again."
        )
    began = journal.read_source(target)
    if began != plan.identity:
        other = began.name if began else "no store"
        raise UserError(
            f"{target.name}: another command began a copy of {other} here. Name another destination for one of the two "
            "copies."
        )
    if target.is_remote:
        digests = {path: arrival.sha256 for path, arrival in arrivals.items()}
        target.write(CHECKSUMS, format_checksums({**digests, MANIFEST: plan.identity.manifest}))
    target.write(MANIFEST, plan.manifest)
    if target.read(MANIFEST) != plan.manifest:
        target.delete([MANIFEST])
        raise UserError(f"{target.name}/{MANIFEST} reads back with other bytes. Run the same command again.")


def _holds_store(target: Folder, identity: CopySource, states: dict[str, FileState]) -> bool:
    """Return whether the destination is already a complete copy.

    Raises UserError if the destination is a damaged copy or another store.
    """
    try:
        manifest = target.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if sha256(manifest).hexdigest() != identity.manifest:
        other, _ = read_manifest(target)
        what = f"another store (fingerprint {other.fingerprint}, the source has {identity.fingerprint})"
        if other.fingerprint == identity.fingerprint:
            what = "another store, with the same records and with another manifest"
        raise UserError(f"{target.name} is {what}. Name another destination.")
    there = target.states(states)
    wrong = sorted(p for p, state in states.items() if p not in there or there[p].size_bytes != state.size_bytes)
    if wrong:
        raise UserError(
            f"{target.name} has the manifest of this store. Number of files that are missing or have another size: "
            f"{len(wrong):,} (first: {wrong[0]}). Remove {target.name}, and run the same command again."
        )
    return True


def _arrivals(target: Folder, identity: CopySource, paths: list[str]) -> dict[str, Arrival]:
    """Return {path: arrival} for the files of an unfinished copy that have arrived.

    Raises UserError if the destination has files but no unfinished copy, or if the copy is of another store.
    """
    _refuse_other_content(target)
    began = journal.read_source(target)
    if began is None:
        return {}
    if began.manifest != identity.manifest:
        raise UserError(
            f"{target.name} holds an unfinished copy of another store ({began.name}, fingerprint {began.fingerprint}; "
            f"the source has {identity.fingerprint}). Remove {target.name}, or name another destination."
        )
    arrivals = journal.read_arrivals(target, paths)
    say(f"{target.name}: resuming; {len(arrivals):,} of {len(paths):,} files have arrived.")
    return arrivals


def _refuse_other_content(target: Folder) -> None:
    """Raise UserError if the destination has files, but neither a manifest nor an unfinished copy."""
    if not target.states([MANIFEST, journal.SOURCE]) and not target.is_empty():
        raise UserError(f"{target.name} is not empty and holds no unfinished copy. Name another destination.")


def _check_space(plan: CopyPlan, target: LocalFolder) -> None:
    needed, free = plan.size_bytes - plan.arrived_bytes, free_bytes(target.root)
    if needed > free:
        raise DiskFull(
            f"{target.name}: the copy needs {bytes_text(needed)}, {bytes_text(free)} are free. Free some space, or "
            "name a folder on another disk."
        )


def _same_folder(source: Folder, target: Folder) -> bool:
    if isinstance(source, LocalFolder) and isinstance(target, LocalFolder):
        return os.path.realpath(source.root) == os.path.realpath(target.root)
    return source.name == target.name


def _pickled_name(folder: Folder) -> str:
    """Return the name by which a worker process can open the folder."""
    return os.path.abspath(folder.name) if isinstance(folder, LocalFolder) else folder.name

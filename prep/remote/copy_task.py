"""Copies one file of a store, and verifies the copy. Worker processes run the tasks of a copy.

If the source is in object storage, or both folders are local, a file is first written under a temporary name. The
content of the temporary file is compared with the manifest, which has a SHA-256 over all keys and values of each shard.
A file from object storage is also compared with SHA256SUMS. In a local destination, the temporary file then gets its
final name.

If the destination is in object storage, the local source file (or the temporary file, if the source is in object
storage, too) is compared with the manifest and sent. The copy is then read back from the server. The bytes from the
server must have the SHA-256 of the file that was sent. The server's own checksum is not sufficient, because the ETag of
a multipart upload is not a digest of the content, and because not every server computes checksums. Reading the files
back doubles the traffic. S3 and Google charge nothing for traffic inside a region, and their usual fee for other
traffic.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from prep.console import UserError, disk_error
from prep.files import unique_suffix
from prep.remote import journal
from prep.remote.contents import Damaged, StoreFile, check_content
from prep.remote.folder import CountBytes, FileState, Folder, LocalFolder
from prep.remote.object_store import ObjectFolder
from prep.remote.urls import open_folder
from prep.workers import TaskProgress

TRIES = 3  # largest number of times that a file is transferred if it arrives with wrong content


@dataclass(frozen=True)
class CopyTask:
    """The task of copying one file. A task is pickled and sent to a worker process."""

    source: str  # path or URL of the source folder
    target: str  # path or URL of the destination
    file: StoreFile
    state: FileState  # state of the file in the source
    checksum: str  # SHA-256 (hex) of the file in the source's SHA256SUMS; empty if SHA256SUMS is not used
    scratch: Path  # local folder for temporary files of a copy between two buckets; Path() for other copies


@dataclass(frozen=True)
class Copied:
    """The result of a CopyTask."""

    arrival: journal.Arrival
    retries: int  # number of repeated requests, plus number of repeated transfers of the file


class ByteCounter:
    """Counts the bytes of a file as they are transferred.

    Bytes that are transferred a second time are not counted again.
    """

    def __init__(self, task_progress: TaskProgress) -> None:
        self._progress, self._counted = task_progress, 0

    def __call__(self, position: int) -> None:
        """Record that the first `position` bytes of the file have been transferred."""
        if position > self._counted:
            self._progress.count(position - self._counted)
            self._counted = position


def copy_file(task: CopyTask, task_progress: TaskProgress) -> Copied:
    """Copy a file, verify it and note in the journal that it has arrived.

    Raises UserError if the content is wrong TRIES times.
    """
    source, target = open_folder(task.source), open_folder(task.target)
    retries_before, count = source.retries + target.retries, ByteCounter(task_progress)
    for number in range(1, TRIES + 1):
        try:
            arrival = _copy_once(task, source, target, count)
            break
        except Damaged as damage:
            if number == TRIES:
                raise UserError(f"{damage}, {TRIES} times. The file was not copied.") from None
        except FileNotFoundError as error:
            raise UserError(
                f"{error.filename or task.file.path} was deleted during the copy. Run the same command again."
            ) from None
    journal.record_arrival(target, task.file.path, arrival)
    return Copied(arrival, source.retries + target.retries - retries_before + number - 1)


def _copy_once(task: CopyTask, source: Folder, target: Folder, count: CountBytes) -> journal.Arrival:
    path = task.file.path
    if isinstance(source, LocalFolder) and isinstance(target, ObjectFolder):
        local = source.root / path
        try:
            digest = check_content(task.file, local)
        except Damaged as damage:
            raise UserError(f"{source.name}: {damage}. List all damage with: alexprep verify") from None
        return _upload(target, path, local, digest, count)
    if isinstance(target, LocalFolder):
        temporary = journal.incoming_file(target, path, unique_suffix())
        folder = temporary.parents[path.count("/")]
    else:
        folder = task.scratch / unique_suffix()
        temporary = folder / path
    try:
        digest = _download(task, source, temporary, count)
        if isinstance(target, ObjectFolder):
            return _upload(target, path, temporary, digest, lambda position: None)
        assert isinstance(target, LocalFolder)
        target.move_in(temporary, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return journal.Arrival(*target.states([path])[path], digest)


def _download(task: CopyTask, source: Folder, temporary: Path, count: CountBytes) -> str:
    """Copy the file to `temporary`, sync it to the disk and check its content. Returns the file's SHA-256 (hex)."""
    digest = sha256()
    disk = task.target if task.scratch == Path() else f"{task.scratch} (to use another folder, set TMPDIR)"
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            for chunk in source.chunks(task.file.path, task.state):
                file.write(chunk)
                digest.update(chunk)
                count(file.tell())
            file.flush()
            os.fsync(file.fileno())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise disk_error(
            error,
            f"{disk}: {error.strerror or error}. Correct this error, then run the same command again. Files that "
            "have arrived are kept.",
        ) from None
    if task.checksum and digest.hexdigest() != task.checksum:
        what = f"SHA-256 {digest.hexdigest()}, SHA256SUMS says {task.checksum}"
        raise Damaged(f"{source.name}/{task.file.path}: {what}")
    try:
        return check_content(task.file, temporary)
    except Damaged as damage:
        raise Damaged(f"{source.name}: {damage}") from None


def _upload(target: ObjectFolder, path: str, local: Path, digest: str, count: CountBytes) -> journal.Arrival:
    """Send a local file and read it back. Raises Damaged unless the bytes read back have the SHA-256 `digest`."""
    state = target.upload(path, local, count)
    stored = sha256()
    for chunk in target.chunks(path, state):
        stored.update(chunk)
    if stored.hexdigest() != digest:
        raise Damaged(f"{target.name}/{path} reads back with SHA-256 {stored.hexdigest()}, but {digest} was sent")
    return journal.Arrival(*state, digest)

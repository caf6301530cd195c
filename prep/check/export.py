"""Exports the records of a split as image files in class folders. An export can be resumed and overwrites no file.

The file `.alexprep-export.json` in the folder of the export holds the fingerprint of the split. This marker file is
written first, so the same command can resume the export. A folder that has files but no such marker file is refused.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from io import TextIOWrapper
from itertools import chain
from pathlib import Path

import numpy as np

from prep.console import Progress, UserError, WrongArgument, disk_error
from prep.files import atomic_file, check_output_folder, write_atomic
from prep.images.codec import checked_datum
from prep.inputs.names import name_text
from prep.schema import decode, open_regular, read_regular
from prep.store import lmdb_shard
from prep.store.datum import DatumError
from prep.store.extra import Column, StoredColumns
from prep.store.manifest import Settings, Store, StoreError
from prep.workers import Runner, TaskProgress, WorkerDied

_EXTENSIONS = {"jpeg": (".jpg", ".jpeg"), "ppm": (".ppm",)}
_MAX_NAME_BYTES = 255
EXTRA_CSV = "extra.csv"  # values of the extra fields
_ROWS_AT_ONCE = 65_536
MARKER = ".alexprep-export.json"  # a hidden file: a build from the exported folder does not read it


@dataclass(frozen=True)
class _ExportTask:
    """One shard to export."""

    path: str
    out: Path
    classes: tuple[str, ...]
    settings: Settings


def export_split(store: Store, split: str, out: Path, runner: Runner, progress: Progress) -> None:
    """Write the image of every record of a split to `out`/CLASS/NAME (for NAME see `file_name`).

    If the split has extra fields, their values are written to `out`/extra.csv.

    A file that already has the bytes of its record is not written again, so a second call resumes an interrupted
    export. Raises WrongArgument if `out` holds anything but an export of this split. Raises UserError if a file of the
    export already exists with other bytes. Raises StoreError if a record is damaged.
    """
    _begin_or_resume(out, {"split": split, "fingerprint": store.split(split).fingerprint})
    tasks = [_ExportTask(path, out, store.classes, store.settings) for path in store.shard_paths(split)]
    on_progress = lambda counts: progress.update(counts.done, size_bytes=counts.bytes)  # noqa: E731
    files: dict[str, list[bytes]] = {}
    for task, result in runner.map(_export_shard, tasks, on_progress):
        if isinstance(result, WorkerDied):
            raise StoreError(
                f"{task.path}: the process that read this shard {result.describe()}. "
                "Check the store with: alexprep verify"
            )
        files[task.path] = result
    if store.split(split).extra:
        write_extra(store, split, out / EXTRA_CSV, [file for task in tasks for file in files[task.path]])


def write_extra(store: Store, split: str, path: Path, files: Sequence[bytes]) -> None:
    """Write the extra fields of all records as a CSV file that prep.extra.csv_values reads.

    `files` are the paths of the images in the order of the records. A vector has the columns FIELD.0, FIELD.1 and so
    on. Numbers are written with enough digits to be read back exactly. Raises StoreError if a column is damaged.
    """
    fields = sorted(store.split(split).extra.items())
    header = ["path"]
    for name, field in fields:
        header += [f"{name}.{k}" for k in range(field.width)] if field.type == "vector" else [name]
    try:
        with closing(StoredColumns(store, split)) as columns, atomic_file(path) as binary:
            text = TextIOWrapper(binary, "utf-8", "surrogateescape", newline="", write_through=True)
            writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(header)
            for first in range(0, len(files), _ROWS_AT_ONCE):
                rows = files[first : first + _ROWS_AT_ONCE]
                taken = columns.take(np.arange(first, first + len(rows)))
                cells = [_cells(taken[name]) for name, _ in fields]
                for file, *values in zip(rows, *cells, strict=True):
                    writer.writerow([os.fsdecode(file), *chain.from_iterable(values)])
            text.detach()
    except OSError as error:
        raise disk_error(error, f"{path}: {error.strerror or error}.") from error


def _cells(column: Column) -> list[list[str]]:
    """Return the CSV cells of a column: one list for each row."""
    if column.type == "text":
        return [[text] for text in column.texts()]
    return [[str(number) for number in row] for row in column.values.reshape(len(column), -1)]


def _begin_or_resume(out: Path, identity: dict[str, str]) -> None:
    """Make the folder `out` with its marker file. Raises WrongArgument for a folder with anything but this export."""
    check_output_folder(out)
    marker = out / MARKER
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in out.iterdir() if not path.name.startswith(f".{MARKER}."))
        if MARKER in names:
            with suppress(UserError):
                if decode(dict[str, str], read_regular(marker, 4096, ""), str(marker), "") == identity:
                    return
            raise WrongArgument(f"{out}: the folder has an export of another split or store. Name an empty folder.")
        if names:
            raise WrongArgument(f"{out}: the folder has other files (first: {names[0]}). Name an empty folder.")
        write_atomic(marker, json.dumps(identity).encode())
    except OSError as error:
        raise disk_error(error, f"{out}: {error.strerror or error}.") from error


def _export_shard(task: _ExportTask, task_progress: TaskProgress) -> list[bytes]:
    """Write the images of a shard. Returns the paths of the images relative to `task.out`, in record order."""
    files = []
    for key, value in lmdb_shard.read(Path(task.path)):
        try:
            datum = checked_datum(value, task.settings, len(task.classes))
        except DatumError as error:
            raise StoreError(
                f"{task.path}, key {name_text(key)}: {error}. Check the store with: alexprep verify"
            ) from None
        name = task.classes[datum.label]
        # The name of a nested class is a path, such as a/airfield.
        is_path = all(_is_file_name(part) for part in os.fsencode(name).split(b"/"))
        folder = task.out / (name if is_path else f"class_{datum.label:04d}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.path.join(os.fsencode(folder), file_name(datum.source, key, task.settings.format))
            _write_new_file(file, datum.data)
        except OSError as error:
            text = f"{folder}: {error.strerror or error}. Run the same command again to resume."
            raise disk_error(error, text) from None
        files.append(os.path.relpath(file, os.fsencode(task.out)))
        task_progress.count(len(datum.data))
    return files


def file_name(source: bytes, key: bytes, format: str) -> bytes:
    """Return the file name of an exported record: the name of the input.

    If the name does not end in an extension of `format`, such an extension is appended. If the result is not a valid
    file name, the key of the record replaces the name of the input.
    """
    name = source.rsplit(b"/", 1)[-1]
    extension = os.path.splitext(name)[1].lower().decode("ascii", "replace")
    if extension not in _EXTENSIONS[format]:
        name += _EXTENSIONS[format][0].encode()
    return name if _is_file_name(name) else key + _EXTENSIONS[format][0].encode()


def _is_file_name(name: bytes) -> bool:
    """Return whether `name` is a valid name of a single file or folder. A name that contains `/` is not valid."""
    return name not in (b"", b".", b"..") and not set(name) & set(b"/\0") and len(name) <= _MAX_NAME_BYTES


def _write_new_file(path: bytes, content: bytes) -> None:
    """Write a file atomically. Raises UserError if the file exists with other bytes."""
    try:
        with open_regular(os.fsdecode(path), "Remove it, and run the same command again.") as file:
            same = file.read(len(content) + 1) == content
        if not same:
            raise UserError(f"{name_text(path)} exists with other content. Name an empty folder.")
        return
    except FileNotFoundError:
        pass
    temporary = os.path.join(os.path.dirname(path), b".%d.tmp" % os.getpid())
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        _rename_to_new(temporary, path)
    except FileExistsError:
        _write_new_file(path, content)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _rename_to_new(old: bytes, new: bytes) -> None:
    """Rename a file. Raises FileExistsError if the file `new` exists.

    On a file system without hard links, the function replaces an existing file instead.
    """
    try:
        os.link(old, new)
    except FileExistsError:
        raise
    except OSError:  # the file system (for example FAT) has no hard links
        os.replace(old, new)

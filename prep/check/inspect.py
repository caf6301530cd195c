"""Describes a store or one of its records, and exports the records of a split as a folder of image files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lmdb

from prep.console import Progress, UserError, bytes_text, count_noun, disk_error
from prep.inputs.names import name_text
from prep.store import lmdb_shard
from prep.store.datum import Datum, DatumError
from prep.store.manifest import Split, Store, StoreError
from prep.workers import Runner, TaskProgress, WorkerDied

_EXTENSIONS = {"jpeg": (".jpg", ".jpeg"), "ppm": (".ppm",)}
_MAX_NAME_BYTES = 255


def describe_store(store: Store) -> dict[str, Any]:
    """Everything in the manifest, with record counts by class, as JSON. No record is read."""
    return {
        "store": str(store.root),
        "fingerprint": store.fingerprint,
        "settings": asdict(store.settings),
        "tools": dict(store.tools),
        "classes": list(store.classes),
        "splits": {name: _describe_split(store, split) for name, split in store.splits.items()},
    }


def _describe_split(store: Store, split: Split) -> dict[str, Any]:
    account = split.account
    return {
        "records": split.records,
        "bytes": split.bytes,
        "bytes_per_record": round(split.bytes / split.records, 1),
        "pixels": split.pixels,
        "shards": len(split.shards),
        "fingerprint": split.fingerprint,
        "inputs": account["inputs"],
        "kept": account["kept"],
        "converted": account["converted"],
        "exif_orientation": account["exif_orientation"],
        "bad": account["bad"],
        "records_of_class": dict(zip(store.classes, split.label_counts, strict=True)),
    }


def summary_lines(store: Store) -> Iterator[str]:
    """The content of `describe_store` as lines for a person."""
    settings = store.settings
    format = f"jpeg, quality {settings.quality}" if settings.format == "jpeg" else settings.format
    shape = "whole images" if settings.keep_aspect else "central squares"
    yield f"{store.root}: {format}, {shape}, shorter side {settings.side_px} px, filter {settings.filter}"
    yield f"  fingerprint {store.fingerprint}, order seed {settings.seed}"
    yield "  made with " + ", ".join(f"{name} {version}" for name, version in store.tools.items())
    for name, split in store.splits.items():
        account, counts = split.account, [count for count in split.label_counts if count]
        yield (
            f"{name}: {count_noun(split.records, 'record')}, {bytes_text(split.bytes)} in "
            f"{count_noun(len(split.shards), 'shard')}, {bytes_text(split.bytes / split.records)} each"
        )
        yield (
            f"  {len(counts):,} of {count_noun(len(store.classes), 'class', 'classes')} have records, "
            f"{min(counts):,} to {max(counts):,} each"
        )
        bad = sum(account["bad"].values())
        yield f"  {count_noun(account['inputs'], 'input')}: {account['kept']:,} kept, {bad:,} left out"
        for title, group in (("converted", account["converted"]), ("EXIF orientation", account["exif_orientation"])):
            if group:
                yield f"  {title}: " + ", ".join(f"{count:,} {kind}" for kind, count in sorted(group.items()))
        for reason, count in account["bad"].items():
            yield f"  left out: {count:,} {reason}"
        if account["converted"] or bad:
            yield f"  {store.root / name / 'inputs.jsonl'} names them"


def find_record(store: Store, split: str, key: str, runner: Runner) -> tuple[str, Datum]:
    """(path of the shard, record) of a key, whose leading zeros may be omitted.

    Raises StoreError if no shard has the key, or the record is damaged.
    """
    if not (key.isascii() and key.isdigit()):
        raise StoreError(f"--key {key!r}: expected a number, as {name_text(lmdb_shard.record_key(17))} or 17.")
    padded_key = key.zfill(8).encode()
    tasks = [(path, padded_key) for path in store.shard_paths(split)]
    for (path, _), result in runner.map(_read_record, tasks, lambda counts: None):
        if isinstance(result, WorkerDied):
            raise StoreError(
                f"{path}: the process that read it {result.describe()}. Check the store with: alexprep verify"
            )
        if result is not None:
            return path, result
    raise StoreError(
        f"{store.root} has no key {name_text(padded_key)} in {split} ({store.split(split).records:,} records)."
    )


def _read_record(task: tuple[str, bytes], task_progress: TaskProgress) -> Datum | None:
    path, key = task
    try:
        with lmdb.open(path, readonly=True, lock=False) as env, env.begin() as txn:
            value = txn.get(key)
        return None if value is None else Datum.decode(value)
    except (lmdb.Error, DatumError) as error:
        raise StoreError(f"{path}, key {name_text(key)}: {error}. Check the store with: alexprep verify") from None


@dataclass(frozen=True)
class _ExportTask:
    """One shard to export."""

    path: str
    out: Path
    classes: tuple[str, ...]
    format: str


def export_split(store: Store, split: str, out: Path, runner: Runner, report: Progress) -> None:
    """Write the image of every record of a split to `out`/CLASS/NAME, under the name of its input.

    A file that already has the same bytes is left alone, so a second call resumes the first. Raises UserError if a file
    of that name has other bytes, or a record is damaged.
    """
    tasks = [_ExportTask(path, out, store.classes, store.settings.format) for path in store.shard_paths(split)]
    on_progress = lambda counts: report.update(counts.done, size_bytes=counts.bytes)  # noqa: E731
    for task, result in runner.map(_export_shard, tasks, on_progress):
        if isinstance(result, WorkerDied):
            raise StoreError(
                f"{task.path}: the process that read it {result.describe()}. Check the store with: alexprep verify"
            )


def _export_shard(task: _ExportTask, task_progress: TaskProgress) -> None:
    for key, value in lmdb_shard.read(Path(task.path)):
        try:
            datum = Datum.decode(value)
        except DatumError as error:
            raise StoreError(
                f"{task.path}, key {name_text(key)}: {error}. Check the store with: alexprep verify"
            ) from None
        name = task.classes[datum.label] if datum.label < len(task.classes) else ""
        folder = task.out / (name if _is_file_name(os.fsencode(name)) else f"class_{datum.label:04d}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write_new_file(os.path.join(os.fsencode(folder), file_name(datum.source, key, task.format)), datum.data)
        except OSError as error:
            text = f"{folder}: {error.strerror or error}. Give the same command again to resume."
            raise disk_error(error, text) from None
        task_progress.count(len(datum.data))


def file_name(source: bytes, key: bytes, format: str) -> bytes:
    """The input's own name, with an extension that fits the stored format; the key, if that is not a file name."""
    name = source.rsplit(b"/", 1)[-1]
    extension = os.path.splitext(name)[1].lower().decode("ascii", "replace")
    if extension not in _EXTENSIONS[format]:
        name += _EXTENSIONS[format][0].encode()
    return name if _is_file_name(name) else key + _EXTENSIONS[format][0].encode()


def _is_file_name(name: bytes) -> bool:
    """Whether a name is that of one file or folder and leads nowhere else."""
    return name not in (b"", b".", b"..") and not set(name) & set(b"/\0") and len(name) <= _MAX_NAME_BYTES


def _write_new_file(path: bytes, content: bytes) -> None:
    """Write a file atomically; raises UserError if it exists with other bytes."""
    try:
        with open(path, "rb") as file:
            same = file.read() == content
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
    """Rename a file; on a disk with hard links, raises FileExistsError if another worker wrote `new` first."""
    try:
        os.link(old, new)
    except FileExistsError:
        raise
    except OSError:  # FAT and other file systems without hard links
        os.replace(old, new)

"""What a store holds, for a person or a program; one of its records; and all of them as a folder of images again."""

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

_ENDINGS = {"jpeg": (".jpg", ".jpeg"), "ppm": (".ppm",)}
_LONGEST_NAME = 255


def describe(store: Store) -> dict[str, Any]:
    """All that the manifest says, with counts by class; no record is read."""
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


def find_record(store: Store, split: str, key: str, runner: Runner) -> tuple[str, Datum]:
    """The shard that has a key, and its record; `key` may leave out leading zeros.

    Raises StoreError where no shard has it, or the record is damaged.
    """
    if not (key.isascii() and key.isdigit()):
        raise StoreError(f"--key {key!r}: expected a number, as {name_text(lmdb_shard.record_key(17))} or 17.")
    wanted = key.zfill(8).encode()
    tasks = [(path, wanted) for path in store.shard_paths(split)]
    for (path, _), found in runner.map(_get, tasks, lambda counts: None):
        if isinstance(found, WorkerDied):
            raise StoreError(f"{path}: the process that read it {found.describe()}. Look closer with: alexprep verify")
        if found is not None:
            return path, found
    raise StoreError(
        f"{store.root} has no key {name_text(wanted)} in {split} ({store.split(split).records:,} records)."
    )


def _get(task: tuple[str, bytes], task_progress: TaskProgress) -> Datum | None:
    path, key = task
    try:
        with lmdb.open(path, readonly=True, lock=False) as env, env.begin() as txn:
            value = txn.get(key)
        return None if value is None else Datum.decode(value)
    except (lmdb.Error, DatumError) as error:
        raise StoreError(f"{path}, key {name_text(key)}: {error}. Look closer with: alexprep verify") from None


@dataclass(frozen=True)
class _Export:
    path: str
    out: Path
    classes: tuple[str, ...]
    format: str


def export_split(store: Store, split: str, out: Path, runner: Runner, report: Progress) -> None:
    """Write every record of a split to `out`/CLASS/NAME, the names being those of the photographs.

    A file that is there with the same bytes is left alone, so a second call goes on where the first ended. Raises
    UserError where a file of that name has other bytes, and where a record is damaged.
    """
    tasks = [_Export(path, out, store.classes, store.settings.format) for path in store.shard_paths(split)]
    on_progress = lambda counts: report.update(counts.done, size_bytes=counts.bytes)  # noqa: E731
    for task, result in runner.map(_export_shard, tasks, on_progress):
        if isinstance(result, WorkerDied):
            raise StoreError(
                f"{task.path}: the process that read it {result.describe()}. Look closer with: alexprep verify"
            )


def _export_shard(task: _Export, task_progress: TaskProgress) -> None:
    for key, value in lmdb_shard.read(Path(task.path)):
        try:
            datum = Datum.decode(value)
        except DatumError as error:
            raise StoreError(f"{task.path}, key {name_text(key)}: {error}. Look closer with: alexprep verify") from None
        name = task.classes[datum.label] if datum.label < len(task.classes) else ""
        folder = task.out / (name if _is_name(os.fsencode(name)) else f"class_{datum.label:04d}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(os.path.join(os.fsencode(folder), file_name(datum.source, key, task.format)), datum.data)
        except OSError as error:
            text = f"{folder}: {error.strerror or error}. Give the same command again to go on."
            raise disk_error(error, text) from None
        task_progress.count(len(datum.data))


def file_name(source: bytes, key: bytes, format: str) -> bytes:
    """The photograph's own name, with an ending that fits what the record holds; the key's where it cannot be one."""
    name = source.rsplit(b"/", 1)[-1]
    ending = os.path.splitext(name)[1].lower().decode("ascii", "replace")
    if ending not in _ENDINGS[format]:
        name += _ENDINGS[format][0].encode()
    return name if _is_name(name) else key + _ENDINGS[format][0].encode()


def _is_name(name: bytes) -> bool:
    """Whether it can be one file's or folder's name, and nothing else."""
    return name not in (b"", b".", b"..") and not set(name) & set(b"/\0") and len(name) <= _LONGEST_NAME


def _write(path: bytes, content: bytes) -> None:
    """Whole or not at all; raises UserError where the file is there with other bytes."""
    try:
        with open(path, "rb") as file:
            same = file.read() == content
        if not same:
            raise UserError(f"{name_text(path)} is there and holds something else. Name an empty folder.")
        return
    except FileNotFoundError:
        pass
    temporary = os.path.join(os.path.dirname(path), b".%d.tmp" % os.getpid())
    try:
        with open(temporary, "wb") as file:
            file.write(content)
        _rename_new(temporary, path)
    except FileExistsError:
        _write(path, content)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _rename_new(old: bytes, new: bytes) -> None:
    """Rename a file; raises FileExistsError, where the disk can link, if another worker was first."""
    try:
        os.link(old, new)
    except FileExistsError:
        raise
    except OSError:  # FAT and the like
        os.replace(old, new)


def summary_lines(store: Store) -> Iterator[str]:
    """What `describe` says, for a person."""
    settings = store.settings
    kind = f"jpeg, quality {settings.quality}" if settings.format == "jpeg" else settings.format
    shape = "whole pictures" if settings.keep_aspect else "central squares"
    yield f"{store.root}: {kind}, {shape}, shorter side {settings.side_px} px, filter {settings.filter}"
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
        for title, found in (("converted", account["converted"]), ("EXIF orientation", account["exif_orientation"])):
            if found:
                yield f"  {title}: " + ", ".join(f"{count:,} {how}" for how, count in sorted(found.items()))
        for why, count in account["bad"].items():
            yield f"  left out: {count:,} {why}"
        if account["converted"] or bad:
            yield f"  {store.root / name / 'inputs.jsonl'} names them"

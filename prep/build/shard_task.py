"""One shard's work: a pure function of its inputs and the settings, to a temporary folder, synced, renamed, recorded.

The record of a finished shard is store/SPLIT/.build/NNNNN.json (counts, digest, moments, fates) with NNNNN.npy (the
sum of its central squares). It is written last, by rename: a shard without one is built again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lmdb

from prep.console import DiskFull, UserError, disk_error
from prep.files import save_array, sync_folder, write_atomic
from prep.images.codec import MAX_FILE_BYTES, BadImage, DecodedImage, check_rescaled_size, decode_image, encode_image
from prep.images.color_stats import PixelSums
from prep.images.rescale import rescale
from prep.inputs.listing import Input
from prep.inputs.names import name_text
from prep.inputs.reader import InputReader
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.manifest import Settings, Shard
from prep.workers import TaskProgress

_NO_ROOM = ("Input/output error", "No space left", "quota", "File too large")  # the first: a page fitted in part


@dataclass(frozen=True)
class ShardTask:
    """All that building one shard takes; small enough to send to a worker or another machine."""

    number: int
    first_index: int  # of its first record in the split: keys go on from there
    inputs: tuple[Input, ...]
    reader: InputReader
    split: str
    folder: Path  # of the split, in the store
    settings: Settings
    skip_bad: bool
    deadly: frozenset[str] = frozenset()  # inputs that killed their workers twice: left out unread

    @property
    def path(self) -> str:
        """The shard's folder, relative to the store."""
        return f"{self.split}/{self.number:05d}"


def record_path(folder: Path, number: int) -> Path:
    """Where a finished shard of the split in `folder` is recorded."""
    return folder / ".build" / f"{number:05d}.json"


def build_shard(task: ShardTask, task_progress: TaskProgress) -> None:
    """Build and record one shard, counting each input.

    Raises UserError for a bad picture (unless the task skips them) and DiskFull for a full disk.
    """
    temporary = task.folder / ".build" / f"{task.number:05d}.{os.getpid()}.tmp"
    final = task.folder / f"{task.number:05d}"
    record = record_path(task.folder, task.number)
    shutil.rmtree(temporary, ignore_errors=True)
    result = ShardResult(task, task_progress)
    try:
        records, size, digest = lmdb_shard.write(temporary, result.records())
        shutil.rmtree(final, ignore_errors=True)  # renamed by a build that was killed before it could record
        os.rename(temporary, final)
        sync_folder(task.folder)
        save_array(record.with_suffix(".npy"), result.sums.square_sum())
        summary = result.summary(Shard(task.path, records, size, digest))
        write_atomic(record, json.dumps(summary).encode())
    except lmdb.Error as error:
        if any(text in str(error) for text in _NO_ROOM):
            raise DiskFull(f"{task.folder}: {error}") from error
        raise UserError(f"{task.folder}: {error}. Give the same command again once that is mended.") from error
    except OSError as error:
        told = disk_error(error, f"{task.folder}: {error.strerror or error}")
        if isinstance(told, DiskFull):  # the parent knows how much is needed
            raise told from error
        raise UserError(
            f"{told}. Give the same command again once that is mended: the shards that are finished are kept."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ShardResult:
    """Reads, rescales and encodes one shard's inputs in order, and adds up what is known while pixels are in hand."""

    def __init__(self, task: ShardTask, task_progress: TaskProgress) -> None:
        self.task, self.task_progress = task, task_progress
        self.sums = PixelSums(task.settings.side_px)
        self.labels: Counter[int] = Counter()
        self.fates: list[dict[str, Any]] = []

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Each (key, value); keys of inputs that are left out are not given again."""
        for number, item in enumerate(self.task.inputs):
            self.task_progress.begin(number)
            value = self._record(item)
            self.task_progress.count(len(value or b""), bad=value is None)
            if value is not None:
                yield lmdb_shard.record_key(self.task.first_index + number), value

    def _record(self, item: Input) -> bytes | None:
        settings = self.task.settings
        try:
            if name_text(item.path) in self.task.deadly:
                raise BadImage("killed the process that read it, twice")
            picture = read_input(self.task, item)
        except BadImage as why:
            if not self.task.skip_bad:
                raise UserError(
                    f"{name_text(item.path)}: {why}. Mend it, or pass --on-bad skip to leave it out; "
                    "the shards that are finished are kept."
                ) from None
            self.fates.append({"source": name_text(item.path), "fate": "bad", "why": str(why)})
            return None
        pixels = rescale(picture.pixels, settings.side_px, settings.keep_aspect, settings.filter)
        height, width = pixels.shape[:2]
        self.sums.add(pixels)
        self.labels[item.label] += 1
        self._note(item, picture)
        return Datum(
            height, width, encode_image(pixels, settings.format, settings.quality), item.label, item.path
        ).encode()

    def _note(self, item: Input, picture: DecodedImage) -> None:
        if picture.converted or picture.orientation != 1:
            fate: dict[str, Any] = {"source": name_text(item.path), "fate": "kept"}
            if picture.converted:
                fate |= {"fate": "converted", "how": list(picture.converted)}
            if picture.orientation != 1:
                fate["exif_orientation"] = picture.orientation
            self.fates.append(fate)

    def summary(self, built: Shard) -> dict[str, Any]:
        """What the shard's record says, as JSON."""
        return {
            "shard": asdict(built),
            "moments": self.sums.moments.to_json(),
            "labels": sorted(self.labels.items()),
            "fates": self.fates,
        }


def read_input(task: ShardTask, item: Input) -> DecodedImage:
    """Read and decode one input; raises BadImage with the reason."""
    if item.size > MAX_FILE_BYTES:
        raise BadImage(f"{item.size:,} bytes: more than {MAX_FILE_BYTES:,}")
    content = task.reader.read(item)
    picture = decode_image(content) if isinstance(content, bytes) else DecodedImage(content, (), 1)
    check_rescaled_size(picture.pixels, task.settings.side_px, task.settings.keep_aspect)
    return picture

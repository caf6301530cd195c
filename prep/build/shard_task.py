"""Builds one shard in a worker process: reads, rescales, encodes and stores its inputs.

The content of a shard depends only on its inputs and the settings. The shard is written to a temporary folder and
synced to disk, and its data.mdb is renamed. The rename also replaces an older data.mdb. So two processes, even on two
machines, can build the same shard at the same time, and data.mdb is always complete. Then the two files of the shard's
summary are written atomically to store/SPLIT/.build: NNNNN.npy (sum of the central squares of the images) and
NNNNN.json (counts, digest, colour moments, outcomes of inputs). A shard without a summary is built again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from prep.console import DiskFull, UserError, disk_error
from prep.files import save_array, sync_folder, unique_suffix, write_atomic
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

# LMDB's error messages for a full disk contain one of these texts. If LMDB could write only a part of a page, its
# message is "Input/output error".
_NO_SPACE = ("Input/output error", "No space left", "quota", "File too large")


@dataclass(frozen=True)
class ShardTask:
    """Everything that is needed to build one shard. A task is pickled and sent to a worker process."""

    number: int
    first_index: int  # position of the first input in the split's record order; the key of a record is this position
    inputs: tuple[Input, ...]
    reader: InputReader
    split: str
    folder: Path  # the split's folder in the store
    settings: Settings
    skip_bad: bool
    crashing: frozenset[str] = frozenset()  # inputs that crashed two or more worker processes; not read again
    build_id: str = ""  # BuildPlan.build_id


def summary_path(folder: Path, number: int) -> Path:
    """Path of the summary file of shard `number`; `folder` is the folder of the split."""
    return folder / ".build" / f"{number:05d}.json"


def build_shard(task: ShardTask, task_progress: TaskProgress) -> None:
    """Build one shard and write its summary. Counts each input in `task_progress`.

    Raises UserError for a bad input (unless the task skips bad inputs) or a failing disk, DiskFull for a full disk.
    """
    builder = ShardBuilder(task, task_progress)
    store_shard(task.folder, task.number, builder.records(), builder.results)


def store_shard(
    folder: Path,
    number: int,
    records: Iterable[tuple[bytes, bytes]],
    results: Callable[[Shard], tuple[npt.NDArray[np.int64], dict[str, Any]]],
) -> None:
    """Write the (key, value) pairs `records` as shard `number` of the split's folder, then the shard's two summaries.

    `results`, called when the shard is written, returns the sum of the central squares and the summary. Raises
    UserError for a failing disk, DiskFull for a full disk.
    """
    temporary = folder / ".build" / f"{number:05d}.{unique_suffix()}"
    final = folder / f"{number:05d}"
    path = summary_path(folder, number)
    try:
        count, size, digest = lmdb_shard.write(temporary, records)
        final.mkdir(exist_ok=True)  # `final` exists if a build was killed before writing the summary
        os.replace(temporary / "data.mdb", final / "data.mdb")
        sync_folder(final)
        sync_folder(folder)
        square_sum, summary = results(Shard(f"{folder.name}/{number:05d}", count, size, digest))
        save_array(path.with_suffix(".npy"), square_sum)
        write_atomic(path, json.dumps(summary).encode())
    except lmdb.Error as error:
        if any(text in str(error) for text in _NO_SPACE):
            raise DiskFull(f"{folder}: {error}") from error
        raise UserError(f"{folder}: {error}. Correct this error, then run the same command again.") from error
    except OSError as error:
        reported = disk_error(error, f"{folder}: {error.strerror or error}")
        if isinstance(reported, DiskFull):  # the parent process adds the needed disk space to the message
            raise reported from error
        raise UserError(
            f"{reported}. Correct this error, then run the same command again: finished shards are kept."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class ShardBuilder:
    """Builds the records of one shard in order. Sums pixels, counts labels and collects the outcomes of inputs."""

    def __init__(self, task: ShardTask, task_progress: TaskProgress) -> None:
        self.task, self.task_progress = task, task_progress
        self.sums = PixelSums(task.settings.side_px)
        self.labels: Counter[int] = Counter()
        self.outcomes: list[dict[str, Any]] = []  # lines of inputs.jsonl

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the (key, value) of each record. If an input is left out, its key is not used."""
        for index, item in enumerate(self.task.inputs):
            self.task_progress.begin(index)
            value = self._record(item)
            self.task_progress.count(len(value or b""), bad=value is None)
            if value is not None:
                yield lmdb_shard.record_key(self.task.first_index + index), value

    def _record(self, item: Input) -> bytes | None:
        settings = self.task.settings
        try:
            if name_text(item.path) in self.task.crashing:
                raise BadImage("killed the process that read it, twice")
            image = read_input(self.task, item)
        except BadImage as reason:
            if not self.task.skip_bad:
                raise UserError(
                    f"{name_text(item.path)}: {reason}. Correct this input, or pass --on-bad skip to leave it out; "
                    "finished shards are kept."
                ) from None
            self.outcomes.append({"source": name_text(item.path), "fate": "bad", "why": str(reason)})
            return None
        pixels = rescale(image.pixels, settings.side_px, settings.keep_aspect, settings.filter)
        height, width = pixels.shape[:2]
        self.sums.add(pixels)
        self.labels[item.label] += 1
        self._add_outcome(item, image)
        data = encode_image(pixels, settings.format, settings.quality)
        return Datum(height, width, data, item.label, item.path).encode()

    def _add_outcome(self, item: Input, image: DecodedImage) -> None:
        if image.converted or image.orientation != 1:
            outcome: dict[str, Any] = {"source": name_text(item.path), "fate": "kept"}
            if image.converted:
                outcome |= {"fate": "converted", "how": list(image.converted)}
            if image.orientation != 1:
                outcome["exif_orientation"] = image.orientation
            self.outcomes.append(outcome)

    def results(self, built: Shard) -> tuple[npt.NDArray[np.int64], dict[str, Any]]:
        """Return (sum of the central squares of the images, the shard's summary as a JSON object)."""
        return self.sums.square_sum(), {
            "shard": asdict(built),
            "build": self.task.build_id,
            "moments": self.sums.moments.to_json(),
            "labels": sorted(self.labels.items()),
            "fates": self.outcomes,
        }


def read_input(task: ShardTask, item: Input) -> DecodedImage:
    """Read and decode one input. Raises BadImage, with the reason, if the input cannot be stored."""
    if item.size > MAX_FILE_BYTES:
        raise BadImage(f"{item.size:,} bytes: more than {MAX_FILE_BYTES:,}")
    content = task.reader.read(item)
    image = decode_image(content) if isinstance(content, bytes) else DecodedImage(content, (), 1)
    check_rescaled_size(image.pixels, task.settings.side_px, task.settings.keep_aspect)
    return image

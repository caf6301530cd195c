"""Builds one shard in a worker process: reads, rescales, encodes and writes the inputs of the shard.

The content of a shard depends only on its inputs and the settings. The shard is written to a temporary folder and
synced to disk, and then its data.mdb is renamed to the final path. If there is an older data.mdb, the rename replaces
it. Two processes, even on two machines, can therefore build the same shard at the same time, and data.mdb is always
complete. After data.mdb, the two summary files of the shard are written atomically into store/SPLIT/.build. NNNNN.npy
holds the sum of the central squares of the images. NNNNN.json holds counts, digest, colour moments and the lines for
inputs.jsonl. A shard without a summary is built again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import numpy.typing as npt

from prep.build.limits import DEFAULT_LIMITS, InputLimits
from prep.console import DiskFull, UserError, disk_error, escaped
from prep.files import save_array, sync_folder, unique_suffix, write_atomic
from prep.images.codec import BadImage, DecodedImage, check_rescaled_size, check_size, decode_image, encode_image
from prep.images.color_stats import PixelSums
from prep.images.limits import MAX_FILE_BYTES, cpu_time_limit
from prep.images.rescale import rescale
from prep.inputs.listing import Input
from prep.inputs.names import name_text
from prep.inputs.reader import InputReader
from prep.store import lmdb_shard
from prep.store.datum import Datum
from prep.store.input_log import WARNED
from prep.store.manifest import Settings, Shard
from prep.workers import TaskProgress

# LMDB's error messages for a full disk contain one of these texts. If LMDB could write only a part of a page, its error
# message is "Input/output error".
_NO_SPACE = ("Input/output error", "No space left", "quota", "File too large")


@dataclass(frozen=True)
class ShardTask:
    """Everything that is needed to build one shard. A task is pickled and sent to a worker process."""

    number: int
    # Position of the first input in the record order of the split; positions are the keys of the records.
    first_index: int
    inputs: tuple[Input, ...]
    reader: InputReader
    split: str
    folder: Path  # the split's folder in the store
    settings: Settings
    skip_bad: bool
    # Path -> reason, for inputs that are bad without being read again: they crashed workers or took too much CPU time.
    unreadable: Mapping[str, BadImage] = field(default_factory=dict)
    build_id: str = ""  # BuildPlan.build_id
    limits: InputLimits = DEFAULT_LIMITS


def summary_path(folder: Path, number: int) -> Path:
    """Return the path of the summary file of shard `number`. `folder` is the folder of the split."""
    return folder / ".build" / f"{number:05d}.json"


def build_shard(task: ShardTask, task_progress: TaskProgress) -> None:
    """Build one shard and write its summary. Each processed input is counted in `task_progress`.

    Raises UserError if the disk fails, or if an input is bad and the task does not skip bad inputs. Raises DiskFull if
    the disk is full.
    """
    builder = ShardBuilder(task, task_progress)
    store_shard(task.folder, task.number, builder.records(), builder.results)


def store_shard(
    folder: Path,
    number: int,
    records: Iterable[tuple[bytes, bytes]],
    results: Callable[[Shard], tuple[npt.NDArray[np.int64], dict[str, Any]]],
) -> None:
    """Write the (key, value) pairs `records` as shard `number` into the split's folder, and then two summary files.

    `results` is called after the shard is written, and returns the sum of the central squares and the summary. Raises
    UserError if the disk fails, and DiskFull if the disk is full.
    """
    temporary = folder / ".build" / f"{number:05d}.{unique_suffix()}"
    final = folder / f"{number:05d}"
    path = summary_path(folder, number)
    try:
        count, size, digest = lmdb_shard.write(temporary, records)
        final.mkdir(exist_ok=True)  # the folder `final` exists if a build was killed before writing the summary
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
    """Builds the records of one shard in order. Also sums pixels, counts labels and collects lines for inputs.jsonl."""

    def __init__(self, task: ShardTask, task_progress: TaskProgress) -> None:
        self.task, self.task_progress = task, task_progress
        self.sums = PixelSums(task.settings.side_px)
        self.labels: Counter[int] = Counter()
        self.largest_px = 0  # number of pixels of the largest input that was kept
        self.outcomes: list[dict[str, Any]] = []  # the lines for inputs.jsonl

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield the key and the value of each record.

        If an input is left out, its key is not used for another input.
        """
        for index, item in enumerate(self.task.inputs):
            self.task_progress.begin(index, self.task.limits.time_limit_s)
            value = self._record(item)
            self.task_progress.count(len(value or b""), bad=value is None)
            if value is not None:
                yield lmdb_shard.record_key(self.task.first_index + index), value

    def _record(self, item: Input) -> bytes | None:
        settings = self.task.settings
        try:
            image = read_input(self.task, item)
            try:
                pixels = rescale(image.pixels, settings.side_px, settings.keep_aspect, settings.filter)
            except MemoryError:
                raise BadImage("too little memory to rescale it") from None
        except BadImage as reason:
            if not self.task.skip_bad:
                raise UserError(
                    f"{name_text(item.path)}: {reason}. Correct this input, or pass --on-bad skip to leave it out; "
                    "finished shards are kept."
                ) from None
            outcome = {"source": name_text(item.path), "fate": "bad", "why": str(reason), **reason.limit}
            self.outcomes.append(outcome)
            return None
        height, width = pixels.shape[:2]
        self.sums.add(pixels)
        self.labels[item.label] += 1
        self.largest_px = max(self.largest_px, image.file_pixels)
        self._add_outcome(item, image)
        data = encode_image(pixels, settings.format, settings.quality)
        return Datum(height, width, data, item.label, item.path).encode()

    def _add_outcome(self, item: Input, image: DecodedImage) -> None:
        if image.converted or image.warnings or image.orientation != 1:
            outcome: dict[str, Any] = {"source": name_text(item.path), "fate": "kept"}
            if image.converted:
                outcome |= {"fate": "converted", "how": list(image.converted)}
            if image.warnings:
                outcome |= {"fate": WARNED, "warnings": list(image.warnings)}
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
            "largest_px": self.largest_px,
        }


def read_input(task: ShardTask, item: Input) -> DecodedImage:
    """Read and decode one input. Raises BadImage, with the reason, if no record can be made from the input.

    An exception of a library also becomes a BadImage. UserError is passed on.
    """
    if name_text(item.path) in task.unreadable:
        raise task.unreadable[name_text(item.path)]
    if item.size > MAX_FILE_BYTES:
        raise BadImage(f"{item.size:,} bytes: more than {MAX_FILE_BYTES:,}")
    try:
        content = task.reader.read(item)
    except (UserError, BadImage):
        raise
    except Exception as error:  # the library that reads an archive can raise any exception for damaged bytes
        raise BadImage(f"cannot be read: {escaped(str(error) or repr(error))}") from None
    options = task.limits.decode_options(task.settings)
    if isinstance(content, bytes):
        with cpu_time_limit(task.limits.time_limit_s, task.limits.too_slow()):
            image = decode_image(content, options)
    else:
        height, width = content.shape[:2]
        check_size(width, height, options)
        image = DecodedImage(content, (), 1, file_pixels=width * height)
    task.limits.check_warnings(image)
    check_rescaled_size(image.pixels, task.settings.side_px, task.settings.keep_aspect)
    return image

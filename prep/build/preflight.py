"""What can be known before a long build: files that are no pictures, the room and the time that it will take."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from prep.build.shard_task import ShardResult, ShardTask
from prep.images.codec import MAX_FILE_BYTES, BadImage, has_image_signature
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import InputReader
from prep.workers import Runner, TaskProgress, WorkerDied

_PAGE_BYTES = 4096  # LMDB gives every record of a photograph whole pages
_LOOK_S_EACH = 0.1e-3  # of the look, a few hundredths of what building one picture takes
_LEAST_LOOK_S = 2.0
_CHUNK = 256


@dataclass(frozen=True)
class Estimate:
    """Room and time that some inputs will take, judged by a sample of them."""

    bytes: int  # on the disk
    seconds: float  # with all jobs, reading aside where the source is slow only now and then
    sampled: int  # pictures


def look(reader: InputReader, inputs: Listing, jobs: int) -> list[tuple[str, str]]:
    """(name, why) of the inputs whose size or first bytes show that they are no pictures.

    Nothing is decoded, and it ends after a few hundredths of the time that the build will take: on a slow source it
    sees only some of the inputs. The build itself judges every one.
    """
    deadline = time.monotonic() + max(_LEAST_LOOK_S, len(inputs) * _LOOK_S_EACH / jobs)

    def some(first: int) -> list[tuple[str, str]]:
        if time.monotonic() > deadline:
            return []
        chunk = [inputs[index] for index in range(first, min(first + _CHUNK, len(inputs)))]
        return [(name_text(item.path), why) for item in chunk if (why := _plainly_bad(reader, item))]

    with ThreadPoolExecutor(8) as pool:
        return [bad for found in pool.map(some, range(0, len(inputs), _CHUNK)) for bad in found]


def _plainly_bad(reader: InputReader, item: Input) -> str:
    """Why an input cannot be a picture; empty where it can."""
    if not item.size:
        return "empty file"
    if item.size > MAX_FILE_BYTES:
        return f"{item.size:,} bytes: more than {MAX_FILE_BYTES:,}"
    try:
        head = reader.head(item, 8)
    except BadImage as why:
        return str(why)
    return "" if has_image_signature(head) else "not a picture in a format that is known"


def estimate(tasks: Sequence[ShardTask], inputs: int, runner: Runner) -> Estimate | None:
    """What `inputs` like those of `tasks` will take; they are built in memory. None where none of them is a picture."""
    count, size, seconds = 0, 0, 0.0
    for _, result in runner.map(_measure, tasks, lambda counts: None):
        if not isinstance(result, WorkerDied):  # the build will meet the same file and name it
            count, size, seconds = count + result[0], size + result[1], seconds + result[2]
    if not count:
        return None
    return Estimate(size * inputs // count, seconds / count * inputs / runner.jobs, count)


def _measure(task: ShardTask, task_progress: TaskProgress) -> tuple[int, int, float]:
    """Pictures, bytes in pages of LMDB, and seconds of a few inputs."""
    warm = replace(task, inputs=task.inputs[:1])
    list(ShardResult(warm, TaskProgress()).records())  # loading the libraries is not part of the time
    began = time.monotonic()
    sizes = [len(value) for _, value in ShardResult(task, task_progress).records()]
    return len(sizes), sum(-(-(size + 16) // _PAGE_BYTES) * _PAGE_BYTES for size in sizes), time.monotonic() - began


def free_bytes(path: Path) -> int:
    """Free on the disk that `path` is, or would be, on."""
    while not path.exists():
        path = path.absolute().parent
    return shutil.disk_usage(path).free

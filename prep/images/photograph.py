"""Prepares single photographs like the inputs of a build, and cuts out their central squares.

`prepare_photographs` works in a separate process, so a file that crashes this process or keeps it busy does not harm
the caller.
"""

from __future__ import annotations

import stat
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prep.console import UserError, escaped
from prep.images.central_square import central_square
from prep.images.codec import BadImage, DecodeOptions, check_rescaled_size, decode_image, encode_image
from prep.images.jpeg import decode_jpeg
from prep.images.limits import MAX_FILE_BYTES, MAX_PIXELS, TIME_LIMIT_S, cpu_time_limit, too_slow_text
from prep.images.rescale import rescale
from prep.schema import open_regular
from prep.store.manifest import Settings
from prep.workers import NOT_STARTED, TaskProgress, WorkerDied, WorkerPool


class Photograph(NamedTuple):
    """A photograph that was prepared like a record of a store."""

    # The central square of the rescaled photograph, uint8 (side_px, side_px, 3), RGB. If the records of the store are
    # JPEGs, the rescaled photograph was also encoded as JPEG and decoded again.
    square: npt.NDArray[np.uint8]
    orientation: int  # EXIF orientation, which is not applied to `square`; 1 if the file has no orientation
    warnings: tuple[str, ...] = ()  # warnings of the decoder about damage that the decoder ignored


def prepare_photograph(path: Path, settings: Settings, max_pixels: int = MAX_PIXELS) -> Photograph:
    """Prepare an image file in the same way as `alexprep build-lmdb` with `settings`.

    Raises BadImage, with the reason, if the file cannot be read, is too large, takes too long to decode, or is not an
    image.
    """
    content = _read(path)
    options = DecodeOptions(max_pixels, settings.background, settings.reduce_above, 2 * settings.side_px)
    with cpu_time_limit(TIME_LIMIT_S, BadImage(too_slow_text(TIME_LIMIT_S))):
        image = decode_image(content, options)
    check_rescaled_size(image.pixels, settings.side_px, settings.keep_aspect)
    pixels = rescale(image.pixels, settings.side_px, settings.keep_aspect, settings.filter)
    if settings.format == "jpeg":
        pixels = decode_jpeg(encode_image(pixels, "jpeg", settings.quality))
    square = np.ascontiguousarray(central_square(pixels, settings.side_px))
    return Photograph(square, image.orientation, image.warnings)


def _read(path: Path) -> bytes:
    """Return the content of a file.

    Raises BadImage for a file that cannot be read or is too large, and for a device or FIFO.
    """
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise BadImage("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):  # reading a FIFO or a device may never end
            raise BadImage("not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise BadImage(f"{status.st_size:,} bytes: more than {MAX_FILE_BYTES:,}")
        with open_regular(path) as file:
            return file.read(MAX_FILE_BYTES)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror or error}") from None


class _Task(NamedTuple):
    path: Path
    settings: Settings
    max_pixels: int


def prepare_photographs(
    paths: Sequence[Path], settings: Settings, max_pixels: int = MAX_PIXELS
) -> Iterator[tuple[Path, Photograph | BadImage]]:
    """Prepare image files, in order, in a separate process. Yields (path, photograph), or (path, error) for a bad file.

    A file is also bad if the process crashes or uses too much CPU time while reading it. A process that has ended is
    replaced before the next file. Raises UserError if the process ends before reading a file.
    """
    tasks = [_Task(path, settings, max_pixels) for path in paths]
    with WorkerPool(1, preload=__name__) as workers, closing(workers.map(_prepare, tasks, lambda counts: None)) as done:
        for task, result in done:
            if isinstance(result, WorkerDied):
                if result.index == NOT_STARTED:
                    raise UserError(f"A worker process {result.describe()} before reading a file. Try again.")
                crashed = f"the decoding process {result.describe()}"
                result = BadImage(too_slow_text(TIME_LIMIT_S) if result.is_too_slow else crashed)
            yield task.path, result


def _prepare(task: _Task, task_progress: TaskProgress) -> Photograph | BadImage:
    task_progress.begin(0, TIME_LIMIT_S)
    try:
        return prepare_photograph(*task)
    except BadImage as error:
        return error
    except Exception as error:  # for example MemoryError, or ValueError for a name with a NUL byte
        return BadImage(f"cannot be used: {escaped(str(error) or repr(error))}")
    finally:
        task_progress.count()

"""Inputs that are byte ranges of several files, for example of the tar files of a WebDataset.

`Input.location` has the index of the file in its upper 23 bits, and the offset in this file in its lower 40 bits.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prep.console import UserError
from prep.images.codec import BadImage
from prep.images.limits import MAX_FILE_BYTES
from prep.inputs.classes import SPLIT_OF_FOLDER, examples
from prep.inputs.listing import Input
from prep.inputs.names import name_text
from prep.schema import regular_descriptor

_OFFSET_BITS = 40
_MAX_FILES = 1 << 23
_COMPRESSED_TAR = re.compile(r".*\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz)", re.IGNORECASE)
_SPLIT_WORDS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def pack_location(file_index: int, offset: int) -> int:
    """Return `Input.location` of an input that begins at byte `offset` of file `file_index`.

    Raises UserError if `file_index` or `offset` is too large.
    """
    if file_index >= _MAX_FILES or offset >= 1 << _OFFSET_BITS:
        raise UserError(
            f"file {file_index:,}, byte {offset:,}: at most {_MAX_FILES:,} files of {1 << _OFFSET_BITS:,} bytes each "
            "can be read. Divide the data into several splits or smaller files."
        )
    return file_index << _OFFSET_BITS | offset


def unpack_location(location: int) -> tuple[int, int]:
    """Split a location into the index of the file and the offset in this file."""
    return location >> _OFFSET_BITS, location & ((1 << _OFFSET_BITS) - 1)


class OpenFile:
    """A file that is open for reading at any offset, until the object is deleted."""

    def __init__(self, path: str) -> None:
        self.descriptor = regular_descriptor(path, "Put the file back.")

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes at `offset`, or fewer bytes at the end of the file. Raises BadImage if reading fails."""
        try:
            return os.pread(self.descriptor, size, offset)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None


def open_file(path: str) -> OpenFile:
    """Return the file `path`, opened once for many reads. Raises UserError if the file cannot be opened."""
    try:
        status = os.stat(path)
        return _opened(path, status.st_dev, status.st_ino, status.st_mtime_ns)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}.") from None


@lru_cache(maxsize=128)
def _opened(path: str, device: int, inode: int, mtime_ns: int) -> OpenFile:
    """Return the open file `path`.

    device, inode and mtime_ns identify the file, so that a new file at the same path is opened again.
    """
    return OpenFile(path)


@dataclass(frozen=True)
class ShardReader:
    """Reads inputs that are byte ranges of the files `files` (see root_and_files)."""

    root: Path
    files: tuple[str, ...]

    def read(self, item: Input) -> bytes:
        """Return the bytes of an input.

        Raises BadImage if reading fails, and UserError if a file has become shorter.
        """
        return self.head(item, min(item.size, MAX_FILE_BYTES + 1))

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of an input. Raises the same errors as `read`."""
        index, offset = unpack_location(item.location)
        path = str(self.root / self.files[index])
        content = open_file(path).read_at(offset, min(size, item.size))
        if len(content) < min(size, item.size):
            raise UserError(f"{path} became shorter during reading. Download the file again.")
        return content


def root_and_files(paths: Sequence[Path]) -> tuple[Path, tuple[str, ...]]:
    """Return a root, and the names of the files `paths` relative to it.

    The root is the folder of the files, or, if there is only one file, the file itself.
    """
    if len(paths) == 1:
        return paths[0], ("",)
    return paths[0].parent, tuple(path.name for path in paths)


def files_by_split(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group files by split. The name of a file contains the split as a word.

    For example, `imagenet-train-0001.tar` belongs to train. The words `validation` and `valid` mean val. Files without
    such a word have the key "".
    """
    groups: dict[str, list[Path]] = {}
    for path in sorted(paths):
        words = re.split(r"[^a-z]+", path.name.lower())
        split = next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "")
        groups.setdefault(split, []).append(path)
    return groups


def split_of_folder(name: str) -> str | None:
    """Return the split that the name of a folder means. Returns None if the name means no split."""
    return SPLIT_OF_FOLDER.get(name.lower())


def refuse_unreadable(paths: Sequence[Path], suffix: str) -> None:
    """Raise UserError if one of `paths` is a compressed tar, or a broken link whose name ends with `suffix`."""
    broken = [path.name for path in paths if path.suffix.lower() == suffix and not path.exists()]
    if broken:
        raise UserError(
            f"{paths[0].parent}: {examples(broken)}: a link to a {suffix} file that does not exist. Restore the file, "
            "or remove the link."
        )
    packed = [path.name for path in paths if _COMPRESSED_TAR.fullmatch(path.name) and path.is_file()]
    if packed:
        raise UserError(
            f"{paths[0].parent}: {examples(packed)}: compressed, so its members cannot be read directly. Decompress "
            "it, or move it away if it is not a part of the data set."
        )


def entries_beside(folder: Path, files: Sequence[Path]) -> tuple[tuple[str, str], ...]:
    """Return the name of each file and folder beside the shards `files` in `folder`, with the reason to leave it out.

    Hidden files and shards of other splits are not returned. Raises UserError if a shard is compressed, or is a link to
    a file that does not exist.
    """
    suffix = files[0].suffix.lower()
    names = [path for path in sorted(folder.iterdir()) if path.name[0] != "."] if folder.is_dir() else []
    refuse_unreadable(names, suffix)
    return tuple(
        (name_text(os.fsencode(path.name)), f"a {'folder' if path.is_dir() else 'file'} beside the {suffix} files")
        for path in names
        if path.suffix.lower() != suffix
    )

"""Images in zip archives, which are read without unpacking. No name in an archive is used as a path on the disk.

An input is given by the offset of its local header. Worker processes therefore need not read the directory of the
archive. Members may be stored without compression, or compressed with deflate, bzip2 or LZMA. The CRC-32 of every
member is checked. An archive may contain one split, or the folders train and val at any depth, as in
tiny-imagenet-200.zip or in Kaggle's download.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prep.console import UserError, progress, say
from prep.images.codec import BadImage
from prep.images.limits import MAX_FILE_BYTES
from prep.inputs.archive import checked_name
from prep.inputs.archive_folders import ArchiveContents
from prep.inputs.classes import has_image_name
from prep.inputs.formats.shards import open_file
from prep.inputs.formats.zip_directory import ZipEntry, count_entries, iterate_entries
from prep.inputs.listing import Input
from prep.inputs.names import name_text

# Local header: signature, version, flags, method, time, date, CRC-32, sizes, lengths.
_LOCAL = struct.Struct("<4s5H3L2H")
KAGGLE_LABELS = "LOC_val_solution.csv"
_CHUNK_BYTES = 1 << 16
_SPLIT_FOLDERS = {b"train": "train", b"val": "val", b"validation": "val", b"test": "test"}


@dataclass(frozen=True)
class ZipReader:
    """Reads inputs that are members of the zip archive `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """Return the bytes of a member.

        Raises BadImage if the member is damaged, and UserError if the archive is missing.
        """
        content, crc32 = self._read(item, min(item.size, MAX_FILE_BYTES) + 1)
        if len(content) != item.size:
            raise BadImage(f"{len(content):,} bytes in the zip archive, but its directory says {item.size:,}")
        if crc32 != zlib.crc32(content):
            actual = f"{zlib.crc32(content):08x}"
            raise BadImage(f"CRC-32 {actual}, but the zip archive says {crc32:08x}: the member is damaged")
        return content

    def read_text(self, item: Input) -> bytes:
        """Return the bytes of a member that is a label file. Raises UserError if the member is damaged."""
        try:
            return self.read(item)
        except BadImage as reason:
            raise UserError(f"{self.root}: {name_text(item.path)}: {reason}. Download the archive again.") from None

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of a member. Raises BadImage if the bytes cannot be read."""
        return self._read(item, size)[0]

    def _read(self, item: Input, max_bytes: int) -> tuple[bytes, int]:
        """Return the first `max_bytes` of a member, and the CRC-32 that the archive states.

        The CRC-32 may be 0 if only a part of the member is read.
        """
        file = open_file(str(self.root))
        header = file.read_at(item.location, _LOCAL.size)
        if len(header) < _LOCAL.size or not header.startswith(b"PK\3\4"):
            raise BadImage(f"no member at byte {item.location:,} of the zip archive")
        _, _, flags, method, _, _, crc32, _, _, name_bytes, extra_bytes = _LOCAL.unpack(header)
        start = item.location + _LOCAL.size + name_bytes + extra_bytes
        if method == 0:
            content, end = file.read_at(start, min(item.size, max_bytes)), start + item.size
        else:
            content, end = self._decompress(method, start, max_bytes)
        if flags & 8 and end:  # the CRC-32 follows the content, after an optional signature
            descriptor = file.read_at(end, 8).removeprefix(b"PK\7\x08")[:4]
            crc32 = int.from_bytes(descriptor, "little")
        return content, crc32

    def _decompress(self, method: int, start: int, max_bytes: int) -> tuple[bytes, int]:
        """Return the first `max_bytes` of a compressed member, and the position after its compressed bytes.

        The position is 0 if the end of the compressed bytes was not reached.
        """
        file = open_file(str(self.root))
        try:
            decompressor, position = _make_decompressor(method, file.read_at(start, 9), start)
            content = bytearray()
            while not decompressor.eof and len(content) < max_bytes:
                block = file.read_at(position, _CHUNK_BYTES)
                if not block:
                    raise BadImage("truncated in the zip archive")
                position += len(block)
                content += decompressor.decompress(block, max_bytes - len(content))
                while not decompressor.eof and len(content) < max_bytes and _has_more(decompressor):
                    content += decompressor.decompress(_rest(decompressor), max_bytes - len(content))
        except (zlib.error, OSError, lzma.LZMAError, ValueError) as error:
            if isinstance(error, BadImage):
                raise
            raise BadImage(f"damaged in the zip archive: {error}") from None
        return bytes(content), position - len(decompressor.unused_data) if decompressor.eof else 0


def _has_more(decompressor: Any) -> bool:
    """Return whether a decompressor can give more bytes without more input."""
    return bool(getattr(decompressor, "unconsumed_tail", b"")) or not getattr(decompressor, "needs_input", True)


def _rest(decompressor: Any) -> bytes:
    """Return the bytes that zlib's decompressor has not consumed. Other decompressors keep such bytes themselves."""
    rest: bytes = getattr(decompressor, "unconsumed_tail", b"")
    return rest


def _make_decompressor(method: int, head: bytes, start: int) -> tuple[Any, int]:
    """Return the decompressor of a member, and the position of the member's first compressed byte.

    `start` is the position of the member's content, and `head` are the first bytes of this content.
    """
    if method == 8:
        return zlib.decompressobj(-15), start
    if method == 12:
        return bz2.BZ2Decompressor(), start
    # LZMA data begin with a version number of two bytes, followed by the size of the properties, which must be 5.
    if method != 14 or len(head) < 9 or head[2] != 5:
        raise ValueError(f"compression method {method}")
    literal, dictionary_bytes = head[4], int.from_bytes(head[5:9], "little")
    filters = {
        "id": lzma.FILTER_LZMA1,
        "dict_size": dictionary_bytes,
        **{"lc": literal % 9, "lp": literal // 9 % 5, "pb": literal // 45},
    }
    return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[filters]), start + 9


@dataclass(frozen=True)
class ZipLayout:
    """The splits and label files of a zip archive, found by the names of its members."""

    # Split -> folder of the split in the archive, with a slash at the end; {} if the archive is a single split.
    splits: dict[str, bytes]
    is_tiny_imagenet: bool
    val_labels: Input | None  # Kaggle's LOC_val_solution.csv


def zip_layout(path: Path) -> ZipLayout:
    """Find the splits in a zip archive.

    Splits are found only if every photograph is in a folder named train, val, validation or test, and if these folders
    lie in the same folder. Raises UserError if the archive is damaged.
    """
    found: dict[str, bytes] = {}
    parents, is_tiny, outside, labels, double = set(), False, False, None, None
    for name, entry in _checked_entries(path):
        is_tiny = is_tiny or name.endswith((b"/val_annotations.txt", b"_boxes.txt"))
        if name.rpartition(b"/")[2] == KAGGLE_LABELS.encode():
            labels = Input(name, 0, entry.size, 0, entry.offset)
        if outside or not has_image_name(name):
            continue
        parts = name.split(b"/")
        index = next((k for k, part in enumerate(parts[:-1]) if part.lower() in _SPLIT_FOLDERS), None)
        if index is None:
            outside = True
            continue
        parents.add(b"/".join(parts[:index]))
        split, folder = _SPLIT_FOLDERS[parts[index].lower()], b"/".join(parts[: index + 1]) + b"/"
        if found.setdefault(split, folder) != folder:
            double = double or (split, found[split], folder)
    if outside or len(parents) > 1:
        return ZipLayout({}, is_tiny, labels)
    if double:
        first, second = (name_text(folder) for folder in double[1:])
        raise UserError(
            f"{path}: {first} and {second} are both the split {double[0]}. Unpack one of these folders separately."
        )
    test = found.pop("test", None)
    if test and found:
        say(f"{path}: the folder {name_text(test)} is left out.")
    return ZipLayout(dict(sorted(found.items())), is_tiny, labels)


def zip_contents(path: Path, inside: bytes, split: str) -> ArchiveContents:
    """Return the members of a zip archive in the folder `inside`, which ends with a slash (b"" for all members).

    In the result, `inside` is removed from the names of the members. A member is refused if its name is unsafe, if it
    is a link, if it is encrypted, or if its compression method is not known. Raises UserError if the archive is damaged
    or truncated.
    """
    contents = ArchiveContents(path.stat().st_mtime_ns)
    with progress(f"{split}: listing", count_entries(path), "members") as listing_progress:
        for count, (name, entry) in enumerate(_checked_entries(path, contents), 1):
            if not count % 4096:
                listing_progress.update(count)
            if not name.startswith(inside) or len(name) == len(inside):
                continue
            if entry.is_folder:
                contents.folders.add(name[len(inside) :])
            else:
                contents.add(name[len(inside) :], entry.size, entry.offset, entry.reason)
    return contents


def member_named(contents: ArchiveContents, name: bytes) -> Input | None:
    """Return the last member with this name."""
    images = contents.images
    return next((images[k] for k in reversed(range(len(images))) if images.path(k) == name), None)


def _checked_entries(path: Path, contents: ArchiveContents | None = None) -> Iterator[tuple[bytes, ZipEntry]]:
    """Yield (name, entry) for each entry of the directory with a safe name.

    Entries with unsafe names are added to `contents` as refused.
    """
    for entry in iterate_entries(path):
        hidden = None if contents is None else contents.hidden
        name, reason = checked_name(entry.name.rstrip(b"/") if entry.is_folder else entry.name, entry.is_folder, hidden)
        if reason and contents is not None:
            contents.add(name, reason=reason)
        if name and not reason:
            yield name, entry

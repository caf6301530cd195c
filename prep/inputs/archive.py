"""Photographs inside tar archives, read in place: nothing is unpacked, and no name in an archive is used as a path.

ILSVRC2012_img_train.tar is a tar of tars, one for each class; ILSVRC2012_img_val.tar is flat; any other may hold class
folders. A tar is stored as it is, also inside another, so an input is an offset and a length in the one file, which
any worker reads on its own. The names are those that the same photographs have in folders: same records, same order.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from prep.console import Progress, UserError, count_noun, progress
from prep.images.codec import MAX_FILE_BYTES, BadImage
from prep.inputs.labels import shown
from prep.inputs.listing import Input, Listing
from prep.inputs.reader import Found, say_empty

_EXTENDED = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, b"X")
_MOST_HEADER = 1 << 20
_MOST_PADDING = 16 << 20  # tapes have the longest records; more zeros are a download that stopped on the way


@dataclass(frozen=True)
class Archive:
    """Inputs that are members of the tar file `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """A member's bytes; raises BadImage where they cannot be read."""
        return self.head(item, min(item.size, MAX_FILE_BYTES + 1))

    def head(self, item: Input, size: int) -> bytes:
        """A member's first bytes; raises BadImage where they cannot be read."""
        try:
            content = os.pread(_handle(str(self.root)), min(size, item.size), item.at)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None
        if len(content) < min(size, item.size):
            raise UserError(f"{self.root} has become shorter while it was read. Get it again.")
        return content


@lru_cache(maxsize=4)
def _handle(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def list_archive(path: Path, flat: bool) -> Found:
    """List a tar file; `flat`: photographs in one folder are flat, not of one class.

    Members that are no files, have unsafe names, or were replaced by a later one of the same name are refused by name.
    Raises UserError for a file that is no tar, is compressed, or was cut short.
    """
    size = path.stat().st_size
    taken = _Taken(path.stat().st_mtime_ns)
    with open(path, "rb") as file, progress(f"{path.name}: listing", size, "bytes") as report:
        for member in _members(file, path, 0, size, report):
            name, why = _safe(member)
            if why or not name:
                taken.add(name, member, why)
            elif member.isreg() and name.lower().endswith(b".tar"):
                folder = name.rsplit(b"/", 1)[-1][: -len(".tar")]
                taken.folders.add(folder)
                inside = _members(file, path, member.offset_data, member.offset_data + member.size, report)
                for photograph in inside:
                    inner, why = _safe(photograph)
                    if not photograph.isdir():
                        taken.add(inner and folder + b"/" + inner.rsplit(b"/", 1)[-1], photograph, why)
            elif member.isdir():
                taken.folders.add(name)
            else:
                taken.add(name, member, "")
    return _found(path, taken, flat)


class _Taken:
    """What was found, in the archive's order."""

    def __init__(self, stamp_ns: int) -> None:
        self.stamp_ns = stamp_ns  # of the archive: it stands for each of its members
        self.photographs = Listing()
        self.folders: set[bytes] = set()
        self.refused: list[tuple[str, str]] = []

    def add(self, name: bytes, member: tarfile.TarInfo, why: str) -> None:
        if why:
            self.refused.append((shown(name), why))
        elif name:
            self.photographs.add(name, 0, member.size, self.stamp_ns, member.offset_data)
            if b"/" in name:
                self.folders.add(name.rpartition(b"/")[0])


class _Member(tarfile.TarInfo):
    """Its long names and extended headers are read into memory, so their size is bounded."""

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in _EXTENDED and self.size > _MOST_HEADER:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(archive)  # type: ignore[misc,no-any-return]  # tarfile's own hook


def _members(file: BinaryIO, path: Path, start: int, end: int, report: Progress) -> Iterator[tarfile.TarInfo]:
    """The members of the tar that lies in bytes `start` to `end` of a file; raises UserError where it is torn.

    tarfile takes a damaged header in the middle for the end, so what it stopped at is looked at here.
    """
    damaged = f"{path}: no tar archive, or a damaged one, at byte"
    if _compressed(file, start):
        raise UserError(f"{path} is compressed, so nothing in it can be read in place. Decompress it first.")
    file.seek(start)
    try:
        tar = tarfile.TarFile(fileobj=file, mode="r", tarinfo=_Member, encoding="utf-8", errors="surrogateescape")
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # it would keep all of them: a gigabyte for ImageNet
            if member.size < 0:
                raise tarfile.ReadError(f"{shown(_bytes(member.name))} has a size below zero")
            if member.offset_data + (member.size if member.isreg() else 0) > end:
                raise UserError(
                    f"{path} is cut short: {shown(_bytes(member.name))} ends at byte "
                    f"{member.offset_data + member.size:,} of {end:,}. Get it again."
                )
            report.update(min(member.offset_data, report.total))
            yield member
        zeros = _zeros(file, tar.offset, end)
    except UserError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"{damaged} {file.tell():,} ({error}). Get it again.") from None
    if tar.offset + zeros < end and zeros <= _MOST_PADDING:
        raise UserError(f"{damaged} {tar.offset + zeros:,}. Get it again.")
    if not tarfile.BLOCKSIZE <= zeros <= _MOST_PADDING:
        raise UserError(
            f"{path} is cut short: at byte {tar.offset:,} it has {zeros:,} zero bytes where a tar ends in "
            f"{2 * tarfile.BLOCKSIZE:,} to {_MOST_PADDING:,}. Get it again."
        )


def _zeros(file: BinaryIO, at: int, end: int) -> int:
    """How many zero bytes lie from byte `at` on: none but the mark and the padding of a tar's end, if it is whole."""
    file.seek(at)
    count = 0
    while at + count < end and count <= _MOST_PADDING:
        block = file.read(min(1 << 20, end - at - count))
        count += len(block) - len(block.lstrip(b"\0"))
        if not block or block.strip(b"\0"):
            break
    return count


def _compressed(file: BinaryIO, start: int) -> bool:
    file.seek(start)
    return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"))


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _safe(member: tarfile.TarInfo) -> tuple[bytes, str]:
    """A member's name and why it is not taken; both empty for what is no input: names beginning with a dot."""
    name = _bytes(member.name)
    parts = [part for part in name.split(b"/") if part != b"."]
    if member.isdir() and not parts:
        return b"", ""
    if name.startswith(b"/") or b".." in parts or b"" in parts:
        return name, "its name leads out of the archive"
    if not parts or any(part.startswith(b".") for part in parts):
        return b"", ""
    if member.issym() or member.islnk():
        return name, "a link, not a file"
    if not (member.isdir() or member.isreg()) or member.issparse():
        return name, "neither a plain file nor a folder"
    return b"/".join(parts), ""


def _order(found: Listing) -> Sequence[int]:
    """By class, name and place in the archive. ILSVRC's archives are in that order as they are, which saves memory."""

    def key(i: int) -> bytes:
        return found.path(i).replace(b"/", b"\0") + b"\0" + found[i].at.to_bytes(8)

    if all(key(i) < key(i + 1) for i in range(len(found) - 1)):
        return range(len(found))
    return array("q", sorted(range(len(found)), key=key))


def _found(path: Path, taken: _Taken, flat: bool) -> Found:
    """Sorted by class and name, as a folder's listing is. As in unpacking, the last member of a name counts."""
    found, refused = taken.photographs, taken.refused
    if not len(found):
        raise UserError(f"{path}: {count_noun(len(refused), 'odd member')} and not one photograph.")
    order = _order(found)
    loose = next((found.path(i) for i in order if b"/" not in found.path(i)), None)
    if loose and taken.folders:
        raise UserError(
            f"{path}: {count_noun(len(taken.folders), 'folder')} and photographs side by side (first: "
            f"{shown(loose)}). Expected class folders alone, or photographs alone with --labels."
        )
    within = min((found.path(i).count(b"/") for i in order), default=0) - 1  # folders around those of classes
    around = {tuple(found.path(i).split(b"/")[:within]) for i in order} if within > 0 else {()}
    if len(around) > 1:
        first, second = (shown(b"/".join(parts)) for parts in sorted(around)[:2])
        raise UserError(f"{path}: class folders in {first} and in {second}. Expected those of one split.")
    cut = sum(len(part) + 1 for part in next(iter(around)))
    classes_at = {name[cut:] for name in taken.folders if name.count(b"/") == within}
    flat = loose is not None or (flat and len(classes_at) == 1)
    folders = sorted(classes_at)
    label_of = {folder: label for label, folder in enumerate(folders)}
    counts = [0] * len(folders)
    listing = Listing()
    for place, i in enumerate(order):
        item = found[i]
        if place + 1 < len(order) and found.path(order[place + 1]) == item.path:
            refused.append((shown(item.path), "another member of the same name follows in the archive"))
            continue
        item = replace(item, path=item.path[cut:])
        folder, _, name = item.path.rpartition(b"/")
        if folder.count(b"/"):
            refused.append((shown(item.path), "in a folder inside that of a class"))
            continue
        label = 0 if flat else label_of[folder]
        listing.add(name if flat else item.path, label, item.size, item.stamp_ns, item.at)
        if not flat:
            counts[label] += 1
    classes = () if flat else tuple(shown(folder) for folder in folders)
    say_empty(path, [name for name, count in zip(classes, counts, strict=False) if not count])
    return Found(listing, classes, flat, tuple(refused))

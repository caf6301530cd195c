"""Images in tar archives, read in place: no archive is unpacked.

A name in an archive is never used as a path on the disk. ILSVRC2012_img_train.tar contains one tar for each class.
ILSVRC2012_img_val.tar is flat. Other archives may contain class folders. The members of a tar are not compressed, even
in a tar inside another tar. So each input is a byte range of the archive file, given by offset and length, and every
worker process reads its inputs from the archive file. An input has the name that its file has in the unpacked archive.
So an archive and the folder unpacked from it give the same records in the same order.
"""

from __future__ import annotations

import os
import tarfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from prep.console import UserError, count_noun, progress
from prep.images.codec import MAX_FILE_BYTES, BadImage
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs
from prep.inputs.tar_members import BoundedFile, iterate_members, name_bytes


@dataclass(frozen=True)
class TarReader:
    """Reads inputs that are members of the tar file `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """The bytes of a member. Raises BadImage if reading fails, UserError if the archive became shorter."""
        return self.head(item, min(item.size, MAX_FILE_BYTES + 1))

    def head(self, item: Input, size: int) -> bytes:
        """The first `size` bytes of a member. Raises the same errors as `read`."""
        try:
            content = os.pread(_file_descriptor(str(self.root)), min(size, item.size), item.location)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None
        if len(content) < min(size, item.size):
            raise UserError(f"{self.root} became shorter during reading. Download the archive again.")
        return content


@lru_cache(maxsize=4)
def _file_descriptor(path: str) -> int:
    return os.open(path, os.O_RDONLY)


def list_archive(path: Path, flat: bool) -> FoundInputs:
    """List the images of a tar file.

    If no image is in a folder, the list has no classes. The list also has no classes if `flat` is true and all images
    are in one folder. A member is refused if it is neither a plain file nor a folder, or if its name leads out of the
    archive. An image is refused if it is in a folder inside a class folder, or if a later member has the same name.
    Raises UserError for a file that is not a tar, is compressed, is damaged or was cut short.
    """
    size = path.stat().st_size
    contents = ArchiveContents(path.stat().st_mtime_ns)
    with BoundedFile(path) as file, progress(f"{path.name}: listing", size, "bytes") as listing_progress:
        for member in iterate_members(file, path, 0, size, listing_progress):
            name, reason = checked_member_name(member)
            if reason or not name:
                contents.add(name, reason=reason)
            elif member.isreg() and name.lower().endswith(b".tar"):
                folder = name.rsplit(b"/", 1)[-1][: -len(".tar")]
                contents.folders.add(folder)
                start = member.offset_data
                for inner in iterate_members(file, path, start, start + member.size, listing_progress):
                    name, reason = checked_member_name(inner)
                    if not inner.isdir():
                        name = name and folder + b"/" + name.rsplit(b"/", 1)[-1]
                        contents.add(name, inner.size, inner.offset_data, reason)
            elif member.isdir():
                contents.folders.add(name)
            else:
                contents.add(name, member.size, member.offset_data)
    return found_inputs(path, contents, flat)


class ArchiveContents:
    """The images (in the order of the archive), folders and refused members of an archive."""

    def __init__(self, mtime_ns: int) -> None:
        self.mtime_ns = mtime_ns  # modification time of the archive, stored for each member
        self.images = Listing()
        self.folders: set[bytes] = set()
        self.refused: list[tuple[str, str]] = []  # (name, reason)

    def add(self, name: bytes, size: int = 0, location: int = 0, reason: str = "") -> None:
        """Add an image and its folder, or, if there is a `reason` to refuse it, a refused member. Ignores b""."""
        if reason:
            self.refused.append((name_text(name), reason))
        elif name:
            self.images.add(name, 0, size, self.mtime_ns, location)
            if b"/" in name:
                self.folders.add(name.rpartition(b"/")[0])


def checked_name(name: bytes, is_folder: bool) -> tuple[bytes, str]:
    """(name, reason to refuse). Both are empty for ignored members: the root, and names with a part such as `.git`."""
    parts = [part for part in name.split(b"/") if part != b"."]
    if is_folder and not parts:
        return b"", ""
    if name.startswith(b"/") or b".." in parts or b"" in parts:
        return name, "its name leads out of the archive"
    if not parts or any(part.startswith(b".") for part in parts):
        return b"", ""
    return b"/".join(parts), ""


def checked_member_name(member: tarfile.TarInfo) -> tuple[bytes, str]:
    """Like `checked_name`, for a member of a tar: links and special files are refused, too."""
    name, reason = checked_name(name_bytes(member), member.isdir())
    if name and not reason and (member.issym() or member.islnk()):
        return name, "a link, not a file"
    if name and not reason and (not (member.isdir() or member.isreg()) or member.issparse()):
        return name, "neither a plain file nor a folder"
    return name, reason


def _sorted_indices(images: Listing) -> Sequence[int]:
    """Indices of `images` sorted by class, name and offset: for sorted `images` a range, which saves memory."""

    def key(i: int) -> bytes:
        return images.path(i).replace(b"/", b"\0") + b"\0" + images[i].location.to_bytes(8)

    if all(key(i) < key(i + 1) for i in range(len(images) - 1)):
        return range(len(images))
    return array("q", sorted(range(len(images)), key=key))


def found_inputs(path: Path, contents: ArchiveContents, flat: bool) -> FoundInputs:
    """Find class folders or a flat folder in the contents of the archive (or folder of archives) `path`.

    Sort the images by class and name, like the files of a folder. Of members with equal names, keep the last. If `flat`
    is true and all images are in one folder, there are no classes. Raises UserError if there is no image, or if the
    folders are not the class folders of one split.
    """
    images, refused = contents.images, contents.refused
    if not len(images):
        raise UserError(f"{path}: no image found; {count_noun(len(refused), 'member')} refused.")
    order = _sorted_indices(images)
    unfiled = next((images.path(i) for i in order if b"/" not in images.path(i)), None)
    if unfiled and contents.folders:
        raise UserError(
            f"{path}: {count_noun(len(contents.folders), 'folder')} and images side by side (first image: "
            f"{name_text(unfiled)}). Expected class folders alone, or images alone with --labels."
        )
    depth = min((images.path(i).count(b"/") for i in order), default=0) - 1  # folder levels above the class folders
    parents = {tuple(images.path(i).split(b"/")[:depth]) for i in order} if depth > 0 else {()}
    if len(parents) > 1:
        first, second = (name_text(b"/".join(parts)) for parts in sorted(parents)[:2])
        raise UserError(f"{path}: class folders in {first} and in {second}. Expected the class folders of one split.")
    prefix_bytes = sum(len(part) + 1 for part in next(iter(parents)))
    class_folders = {name[prefix_bytes:] for name in contents.folders if name.count(b"/") == depth}
    is_flat = unfiled is not None or (flat and len(class_folders) == 1)
    label_of = {folder: label for label, folder in enumerate(sorted(class_folders))}
    listing = Listing()
    for position, i in enumerate(order):
        item = images[i]
        if position + 1 < len(order) and images.path(order[position + 1]) == item.path:
            refused.append((name_text(item.path), "another member of the same name follows in the archive"))
            continue
        item = replace(item, path=item.path[prefix_bytes:])
        folder, _, name = item.path.rpartition(b"/")
        if b"/" in folder:
            refused.append((name_text(item.path), "in a folder inside a class folder"))
            continue
        label = 0 if is_flat else label_of[folder]
        listing.add(name if is_flat else item.path, label, item.size, item.mtime_ns, item.location)
    classes = () if is_flat else tuple(name_text(folder) for folder in label_of)
    return FoundInputs(listing, classes, is_flat, tuple(refused))

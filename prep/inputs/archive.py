"""Images in tar archives, which are read without unpacking the archives.

A name in an archive is never used as a path on the disk. An archive contains one tar for each class, as
ILSVRC2012_img_train.tar does, or images without folders, as ILSVRC2012_img_val.tar does, or class folders. The members
of a tar are not compressed, even if the tar is inside another tar. Each input is therefore a byte range of the archive
file, given by offset and length, and every worker process reads its inputs directly from the archive file. The name of
an input is the name that its file has in the unpacked archive. An archive and the folder unpacked from it therefore
give the same records in the same order.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from prep.console import UserError, progress
from prep.images.codec import BadImage
from prep.images.limits import MAX_FILE_BYTES
from prep.inputs.archive_folders import (
    LINK,
    MAX_DEPTH,
    ArchiveContents,
    ClassTar,
    found_inputs,
    refuse_folders_in_class_tars,
)
from prep.inputs.listing import Input
from prep.inputs.reader import FoundInputs
from prep.inputs.tar_members import BoundedFile, iterate_members, name_bytes
from prep.schema import regular_descriptor


@dataclass(frozen=True)
class TarReader:
    """Reads inputs that are members of the tar file `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """Return the bytes of a member.

        Raises BadImage if reading fails, and UserError if the archive has become shorter.
        """
        return self.head(item, min(item.size, MAX_FILE_BYTES + 1))

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of a member. Raises the same errors as `read`."""
        try:
            content = os.pread(_file_descriptor(str(self.root)), min(size, item.size), item.location)
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None
        if len(content) < min(size, item.size):
            raise UserError(f"{self.root} became shorter during reading. Download the archive again.")
        return content


@lru_cache(maxsize=4)
def _file_descriptor(path: str) -> int:
    return regular_descriptor(path, "Put the archive back.")


def list_archive(path: Path, flat: bool, classes_are_given: bool = False) -> FoundInputs:
    """List the images of a tar file.

    The list has no classes if no image is in a folder, or if `flat` is true and all images are in a single folder. A
    member is refused if it is neither a plain file nor a folder. A member is also refused if its name leads out of the
    archive. An image is refused if a later member has the same name. For `classes_are_given`, see list_folder. System
    folders and files, hidden files, and files beside class folders are ignored. Raises UserError for a file that is not
    a tar, is compressed, is damaged or is truncated.
    """
    size = path.stat().st_size
    contents, class_tars = ArchiveContents(path.stat().st_mtime_ns), list[ClassTar]()
    with BoundedFile(path) as file, progress(f"{path.name}: listing", size, "bytes") as listing_progress:
        for member in iterate_members(file, path, 0, size, listing_progress):
            name, reason = checked_member_name(member, contents.hidden)
            if reason or not name:
                contents.add(name, reason=reason)
            elif member.isreg() and name.lower().endswith(b".tar"):
                class_tar = ClassTar(contents, name.rpartition(b"/")[2])
                class_tars.append(class_tar)
                start = member.offset_data
                for inner in iterate_members(file, path, start, start + member.size, listing_progress):
                    name, reason = checked_member_name(inner)
                    if not inner.isdir():
                        class_tar.add(name, inner.size, inner.offset_data, reason)
            elif member.isdir():
                contents.folders.add(name)
            else:
                contents.add(name, member.size, member.offset_data)
    refuse_folders_in_class_tars(str(path), class_tars)
    return found_inputs(path, contents, flat, classes_are_given)


def checked_name(name: bytes, is_folder: bool, hidden: set[bytes] | None = None) -> tuple[bytes, str]:
    """Return the name of a member, and a reason if the member is refused.

    For ignored members, name and reason are empty. A member is ignored if it is the root folder, or if it or one of its
    folders is hidden (`.git`). If the set `hidden` is given, folders whose names begin with a dot are added to the set.
    """
    parts = [part for part in name.split(b"/") if part != b"."]
    if is_folder and not parts:
        return b"", ""
    if name.startswith(b"/") or b".." in parts or b"" in parts:
        return name, "the name leads out of the archive"
    if len(parts) > MAX_DEPTH:
        return name, f"in more than {MAX_DEPTH} folders"
    first_hidden = next((k for k, part in enumerate(parts) if part.startswith(b".")), None)
    if hidden is not None and first_hidden is not None and (is_folder or first_hidden < len(parts) - 1):
        hidden.add(b"/".join(parts[: first_hidden + 1]))
    if not parts or first_hidden is not None:
        return b"", ""
    return b"/".join(parts), ""


def checked_member_name(member: tarfile.TarInfo, hidden: set[bytes] | None = None) -> tuple[bytes, str]:
    """Check the name of a member of a tar as `checked_name` does. Also refuse links and special files."""
    name, reason = checked_name(name_bytes(member), member.isdir(), hidden)
    if name and not reason and (member.issym() or member.islnk()):
        return name, LINK
    if name and not reason and (not (member.isdir() or member.isreg()) or member.issparse()):
        return name, "neither a plain file nor a folder"
    return name, reason

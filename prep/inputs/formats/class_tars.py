"""A folder with one tar for each class, such as the folder into which ILSVRC2012_img_train.tar was unpacked.

The name of a tar without `.tar` is the name of a class. The tars are read without unpacking them
(prep/inputs/archive.py).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from prep.console import progress
from prep.inputs.archive import checked_member_name
from prep.inputs.archive_folders import ArchiveContents, ClassTar, found_inputs, refuse_folders_in_class_tars
from prep.inputs.classes import NO_CLASS, STRAY_FILE, is_no_class_folder
from prep.inputs.formats.shards import ShardReader, pack_location, refuse_unreadable
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs
from prep.inputs.tar_members import BoundedFile, iterate_members


def list_class_tars(folder: Path, split: str) -> tuple[ShardReader, FoundInputs]:
    """List the images of all tars in `folder`. An input has the name CLASS/FILE, as in unpacked class folders.

    The images in folders inside a tar are listed, too, but the names of these folders are ignored. Files and folders
    beside the tars are left out; `FoundInputs.ignored` has their names and the reason. Raises UserError if a tar is
    compressed, damaged or truncated, or is a link to a file that does not exist.
    """
    entries = sorted(folder.iterdir())
    tars = [path for path in entries if is_tar_name(path) and path.is_file()]
    refuse_unreadable([path for path in entries if path.name[0] != "."], ".tar")
    contents, class_tars = ArchiveContents(0), []
    with progress(f"{split}: listing", len(tars), "archives") as listing_progress:
        for index, path in enumerate(tars):
            status = path.stat()
            contents.mtime_ns = status.st_mtime_ns
            class_tar = ClassTar(contents, os.fsencode(path.name))
            class_tars.append(class_tar)
            with BoundedFile(path) as file:
                for member in iterate_members(file, path, 0, status.st_size):
                    name, reason = checked_member_name(member)
                    if not member.isdir():
                        class_tar.add(name, member.size, pack_location(index, member.offset_data), reason)
            listing_progress.advance()
    refuse_folders_in_class_tars(str(folder), class_tars)
    found = found_inputs(folder, contents, flat=False)
    listed = {path.name for path in tars}
    beside = [path for path in entries if path.name not in listed and (path.is_dir() or path.name[0] != ".")]
    ignored = [(name_text(os.fsencode(path.name)), _reason(path)) for path in beside]
    return ShardReader(folder, tuple(path.name for path in tars)), replace(found, ignored=(*found.ignored, *ignored))


def _reason(path: Path) -> str:
    """Return the reason why a file or folder beside the tars is left out."""
    if not path.is_dir():
        return STRAY_FILE
    return NO_CLASS if is_no_class_folder(os.fsencode(path.name)) else "a folder beside the class tars"


def is_tar_name(path: Path) -> bool:
    """Return whether the name of a file ends in `.tar` and the file is not hidden."""
    return path.name.lower().endswith(".tar") and not path.name.startswith(".")

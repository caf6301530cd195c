"""Images in folders: one folder for each class, or one flat folder.

With class folders, the label of an image is the position of its class folder in sorted order, from 0.
"""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prep.console import UserError, count_noun, progress
from prep.images.codec import MAX_FILE_BYTES, BadImage
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs, warn_of_empty_classes

# Number of class folders in a batch that eight threads list. Threads hide the latency of a slow file system. The
# number is limited because the listed files of a batch are held in memory.
_FOLDERS_AT_ONCE = 32
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


@dataclass(frozen=True)
class FolderReader:
    """Reads inputs that are files below `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """The bytes of a file. Raises BadImage if reading fails, UserError if size or modification time changed."""
        return self._read(item, MAX_FILE_BYTES + 1, check=True)

    def head(self, item: Input, size: int) -> bytes:
        """The first `size` bytes of a file. Raises BadImage if the file cannot be read."""
        return self._read(item, size, check=False)

    def _read(self, item: Input, size: int, check: bool) -> bytes:
        try:  # without O_NONBLOCK, os.open would block forever if a FIFO has replaced the file
            handle = os.open(os.path.join(os.fsencode(self.root), item.path), os.O_RDONLY | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                status = os.fstat(handle)
                if check and (status.st_size, status.st_mtime_ns) != (item.size, item.mtime_ns):
                    raise UserError(
                        f"{name_text(item.path)} was changed after it was listed: {item.size:,} bytes then, "
                        f"{status.st_size:,} now, modified at {item.mtime_ns / 1e9:.3f} then, "
                        f"{status.st_mtime_ns / 1e9:.3f} now (seconds since 1970). "
                        "Run the same command again when no program writes to the source."
                    )
                if not stat.S_ISREG(status.st_mode):
                    raise BadImage(f"a {_kind(status.st_mode)}, not a file")
                return file.read(min(size, status.st_size)) if size else b""
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None


def list_folder(root: Path, split: str, follow_links: bool) -> FoundInputs:
    """List the files of class folders or of a flat folder, sorted by the bytes of their names. No file is opened.

    Symbolic links that lead out of `root` are refused unless `follow_links` is true. Names that begin with a dot are
    ignored. Raises UserError if `root` contains no files, or both folders and files.
    """
    base = os.fsencode(root.resolve()) + b"/"
    entries = _list_entries(os.fsencode(root), base, follow_links)
    folders = [entry.name for entry in entries if stat.S_ISDIR(entry.mode)]
    files = [entry for entry in entries if stat.S_ISREG(entry.mode)]
    refused = [(name_text(entry.name), entry.reason) for entry in entries if entry.mode == 0]
    if folders and files:
        raise UserError(
            f"{root}: {count_noun(len(folders), 'folder')} and {count_noun(len(files), 'file')} side by side "
            f"(first file: {name_text(files[0].name)}). Expected class folders alone, or images alone with --labels."
        )
    listing = Listing()
    if files:
        for entry in files:
            listing.add(entry.name, 0, entry.size, entry.mtime_ns)
        return FoundInputs(listing, (), True, tuple(refused))
    if not folders:
        raise UserError(f"{root}: the folder is empty. Expected a folder for each class, or images and --labels.")
    classes = tuple(name_text(name) for name in folders)
    empty_classes = []
    paths = [os.path.join(os.fsencode(root), name) for name in folders]
    with progress(f"{split}: listing", len(folders), "folders") as listing_progress, ThreadPoolExecutor(8) as pool:
        for first in range(0, len(folders), _FOLDERS_AT_ONCE):
            chunk = paths[first : first + _FOLDERS_AT_ONCE]
            listed = pool.map(_list_entries, chunk, [base] * len(chunk), [follow_links] * len(chunk))
            for label, entries in enumerate(listed, first):
                count_before = len(listing)
                for entry in entries:
                    name = folders[label] + b"/" + entry.name
                    if stat.S_ISREG(entry.mode):
                        listing.add(name, label, entry.size, entry.mtime_ns)
                    else:
                        refused.append((name_text(name), entry.reason or f"a {_kind(entry.mode)}, not a file"))
                if len(listing) == count_before:
                    empty_classes.append(classes[label])
                listing_progress.advance()
    if not len(listing):
        raise UserError(f"{root}: {count_noun(len(folders), 'class folder')} without any file.")
    warn_of_empty_classes(root, empty_classes)
    return FoundInputs(listing, classes, False, tuple(refused))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    mode: int  # stat.S_IFREG or stat.S_IFDIR; 0 for an entry that is refused
    size: int = 0
    mtime_ns: int = 0
    reason: str = ""  # why the entry is refused


def _list_entries(folder: bytes, base: bytes, follow_links: bool) -> list[_Entry]:
    """Entries of a folder, sorted by name. Links out of `base` are refused unless `follow_links` is true."""
    found = []
    try:
        scan = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{name_text(folder)}: {error.strerror or error}.") from None
    with scan as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            try:
                if entry.is_symlink() and not follow_links:
                    target = os.path.realpath(entry.path, strict=True)
                    if not target.startswith(base):
                        reason = f"a symbolic link out of the source, to {name_text(target)}; --follow-links follows it"
                        found.append(_Entry(entry.name, 0, reason=reason))
                        continue
                status = entry.stat()
            except OSError as error:
                reason = f"cannot be read: {error.strerror or error}"
                found.append(_Entry(entry.name, 0, reason=reason))
                continue
            mode = stat.S_IFMT(status.st_mode)
            if mode in (stat.S_IFREG, stat.S_IFDIR):
                found.append(_Entry(entry.name, mode, status.st_size, status.st_mtime_ns))
            else:
                found.append(_Entry(entry.name, 0, reason=f"a {_kind(mode)}, not a file"))
    return sorted(found, key=lambda entry: entry.name)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "device")

"""Photographs in folders: one folder for each class, or one flat folder."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prep.console import UserError, count_noun, progress
from prep.images.codec import MAX_FILE_BYTES, BadImage
from prep.inputs.labels import shown
from prep.inputs.listing import Input, Listing
from prep.inputs.reader import Found, say_empty

_AT_ONCE = 32  # class folders: enough to hide a slow file system's answers, few enough to hold


_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


@dataclass(frozen=True)
class Folder:
    """Inputs that are files below `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """A file's bytes; raises BadImage where it cannot be read, UserError where it is not the one listed."""
        return self._bytes(item, MAX_FILE_BYTES + 1, check=True)

    def head(self, item: Input, size: int) -> bytes:
        """A file's first bytes; raises BadImage where it cannot be read."""
        return self._bytes(item, size, check=False)

    def _bytes(self, item: Input, size: int, check: bool) -> bytes:
        try:  # a FIFO that took the file's place would otherwise be waited for without end
            handle = os.open(os.path.join(os.fsencode(self.root), item.path), os.O_RDONLY | os.O_NONBLOCK)
            with open(handle, "rb") as file:
                found = os.fstat(handle)
                if check and (found.st_size, found.st_mtime_ns) != (item.size, item.stamp_ns):
                    raise UserError(
                        f"{shown(item.path)} was changed after it was listed: {item.size:,} bytes then, "
                        f"{found.st_size:,} now, modified at {item.stamp_ns / 1e9:.3f} then, "
                        f"{found.st_mtime_ns / 1e9:.3f} now (seconds since 1970). "
                        "Give the same command again once nothing writes to the source."
                    )
                if not stat.S_ISREG(found.st_mode):
                    raise BadImage(f"a {_kind(found.st_mode)}, not a file")
                return file.read(min(size, found.st_size)) if size else b""
        except OSError as error:
            raise BadImage(f"cannot be read: {error.strerror or error}") from None


def list_folder(root: Path, split: str, follow_links: bool) -> Found:
    base = os.fsencode(root.resolve()) + b"/"
    entries = _entries(os.fsencode(root), base, follow_links)
    folders = [entry.name for entry in entries if stat.S_ISDIR(entry.mode)]
    files = [entry for entry in entries if stat.S_ISREG(entry.mode)]
    refused = [(shown(entry.name), entry.why) for entry in entries if entry.mode == 0]
    if folders and files:
        raise UserError(
            f"{root}: {count_noun(len(folders), 'folder')} and {count_noun(len(files), 'file')} side by side "
            f"(first file: {shown(files[0].name)}). Expected class folders alone, or photographs alone with --labels."
        )
    listing = Listing()
    if files:
        for entry in files:
            listing.add(entry.name, 0, entry.size, entry.stamp_ns)
        return Found(listing, (), True, tuple(refused))
    if not folders:
        raise UserError(f"{root}: the folder is empty. Expected a folder for each class, or photographs and --labels.")
    classes = tuple(shown(name) for name in folders)
    empty = []
    paths = [os.path.join(os.fsencode(root), name) for name in folders]
    with progress(f"{split}: listing", len(folders), "folders") as report, ThreadPoolExecutor(8) as pool:
        for first in range(0, len(folders), _AT_ONCE):
            chunk = paths[first : first + _AT_ONCE]
            listed = pool.map(_entries, chunk, [base] * len(chunk), [follow_links] * len(chunk))
            for label, entries in enumerate(listed, first):
                before = len(listing)
                for entry in entries:
                    name = folders[label] + b"/" + entry.name
                    if stat.S_ISREG(entry.mode):
                        listing.add(name, label, entry.size, entry.stamp_ns)
                    else:
                        refused.append((shown(name), entry.why or f"a {_kind(entry.mode)}, not a file"))
                if len(listing) == before:
                    empty.append(classes[label])
                report.advance()
    if not len(listing):
        raise UserError(f"{root}: {count_noun(len(folders), 'class folder')} and not one file in them.")
    say_empty(root, empty)
    return Found(listing, classes, False, tuple(refused))


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    mode: int  # its kind as in st_mode; 0: not to be taken
    size: int = 0
    stamp_ns: int = 0
    why: str = ""


def _entries(folder: bytes, base: bytes, follow_links: bool) -> list[_Entry]:
    """What a folder holds, sorted by name; links are resolved, and refused where they lead out of `base`."""
    found = []
    try:
        scanned = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{shown(folder)}: {error.strerror or error}.") from None
    with scanned as entries:
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            try:
                if entry.is_symlink() and not follow_links:
                    target = os.path.realpath(entry.path, strict=True)
                    if not target.startswith(base):
                        why = f"a symbolic link out of the source, to {shown(target)}; --follow-links takes it"
                        found.append(_Entry(entry.name, 0, why=why))
                        continue
                status = entry.stat()
            except OSError as error:
                found.append(_Entry(entry.name, 0, why=f"cannot be looked at: {error.strerror or error}"))
                continue
            mode = stat.S_IFMT(status.st_mode)
            if mode in (stat.S_IFREG, stat.S_IFDIR):
                found.append(_Entry(entry.name, mode, status.st_size, status.st_mtime_ns))
            else:
                found.append(_Entry(entry.name, 0, why=f"a {_kind(mode)}, not a file"))
    return sorted(found, key=lambda entry: entry.name)


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "device")

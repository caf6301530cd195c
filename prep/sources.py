"""Where photographs come from: folders of classes, a flat folder with labels, or archives of either.

Listing opens nothing but label files and archives. A name that begins with a dot is no input; any other entry ends in
the listing, or in `refused` with the reason: nothing is passed over without a word.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from prep.console import UserError, count_noun, progress, say
from prep.labels import read_labels, shown
from prep.listing import Input, Listing
from prep.manifest import SPLITS
from prep.picture import MAX_FILE_BYTES, BadPicture

Content = bytes | npt.NDArray[np.uint8]  # a file's bytes, or RGB pixels where a record holds bare ones

_AT_ONCE = 32  # class folders: enough to hide a slow file system's answers, few enough to hold
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


class Place(Protocol):
    """Reads inputs; small enough to send to a worker or another machine."""

    @property
    def root(self) -> Path:
        """Where the inputs are, for messages."""

    def read(self, item: Input) -> Content:
        """What one input holds. Raises BadPicture where it cannot be read, UserError where it has changed."""

    def head(self, item: Input, size: int) -> bytes:
        """The first `size` bytes of one input, or fewer; raises BadPicture where it cannot be read."""


@dataclass(frozen=True)
class Source:
    """All inputs of one split, in the order of class and name, and the entries that are none."""

    place: Place
    split: str
    classes: tuple[str, ...]
    inputs: Listing
    refused: tuple[tuple[str, str], ...] = ()  # (name, why)


@dataclass(frozen=True)
class Folder:
    """Inputs that are files below `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """A file's bytes; raises BadPicture where it cannot be read, UserError where it is not the one listed."""
        return self._bytes(item, MAX_FILE_BYTES + 1, check=True)

    def head(self, item: Input, size: int) -> bytes:
        """A file's first bytes; raises BadPicture where it cannot be read."""
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
                    raise BadPicture(f"a {_kind(found.st_mode)}, not a file")
                return file.read(min(size, found.st_size)) if size else b""
        except OSError as error:
            raise BadPicture(f"cannot be read: {error.strerror or error}") from None


def find_splits(source: Path, split: str | None) -> dict[str, Path]:
    """What to build each split of: SOURCE/train and SOURCE/val, or their archives, where SOURCE has them, else SOURCE.

    Raises UserError for a SOURCE that is missing, neither a folder nor an archive, or lacks the split that was named.
    """
    if source.is_file():
        guess = next((name for name in SPLITS if source.stem == name or f"img_{name}" in source.name), SPLITS[0])
        return {split or guess: source}
    if not source.is_dir():
        raise UserError(f"{source}: {'not a folder or an archive' if source.exists() else 'no such folder'}.")
    inside = {}
    for name in SPLITS:
        archives = (source / f"ILSVRC2012_img_{name}.tar", source / f"{name}.tar")
        found = [path for path in (source / name, *archives) if path.is_dir() or (path in archives and path.is_file())]
        if found:
            inside[name] = found[0]
    if split is None:
        _tell_beside(source, inside)
        return inside or {SPLITS[0]: source}
    if not inside:
        return {split: source}
    if split not in inside:
        raise UserError(f"--split {split}: {source} has {' and '.join(inside)} but no {split}.")
    return {split: inside[split]}


def _tell_beside(source: Path, inside: dict[str, Path]) -> None:
    """Say what is left aside where one folder looks like a split: it may be a class of that name."""
    if inside and len(inside) < len(SPLITS):
        others = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name not in (*SPLITS, "test"))
        if others:
            found = " and ".join(path.name for path in inside.values())
            say(
                f"{source}: taking {found}; {count_noun(len(others), 'folder')} beside it not (first: {others[0]}). "
                "Are they classes? Then build from a folder of another layout."
            )


def read_source(
    path: Path,
    split: str,
    labels: Path | None,
    label_order: str | None,
    known: Sequence[str],
    follow_links: bool = False,
) -> Source:
    """List one split, from a folder or a tar archive.

    Class folders give classes and labels by their sorted names. Flat photographs need `labels`, see prep.labels;
    `known` are the classes that the store already has, empty where it has none. Symbolic links that lead out of the
    folder are refused unless `follow_links`. Raises UserError for a source that holds neither, labels that do not fit,
    and classes other than `known`.
    """
    if path.is_file():
        from prep.archive import Archive, list_archive

        place: Place = Archive(path)
        found = list_archive(path, flat=labels is not None)
    else:
        place = Folder(path)
        found = _list_folder(path, split, follow_links)
    if found.flat:
        named, classes = read_labels(
            labels, [found.listing.path(i) for i in range(len(found.listing))], path, label_order, known
        )
        inputs = Listing()
        for item in found.listing:
            inputs.add(item.path, named[item.path], item.size, item.stamp_ns, item.at)
        return Source(place, split, classes, inputs, found.refused)
    if labels is not None:
        say(f"{path}: class folders give the labels of {split}; --labels is not needed there.")
    _same_classes(found.classes, known, path)
    return Source(place, split, found.classes, found.listing, found.refused)


@dataclass(frozen=True)
class Found:
    """What a folder or an archive holds: photographs with the labels of their class folders, or flat ones."""

    listing: Listing
    classes: tuple[str, ...]
    flat: bool
    refused: tuple[tuple[str, str], ...]


def _list_folder(root: Path, split: str, follow_links: bool) -> Found:
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


def say_empty(root: Path, empty: Sequence[str]) -> None:
    """Tell of classes that have no photograph."""
    if empty:
        say(f"{root}: {count_noun(len(empty), 'class', 'classes')} without a photograph (first: {empty[0]}).")


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


def _same_classes(found: Sequence[str], known: Sequence[str], root: Path) -> None:
    if known and tuple(found) != tuple(known):
        odd = sorted(set(found) ^ set(known))
        raise UserError(
            f"{root}: {len(found)} classes, the store has {len(known)}"
            + (f" (first that only one of them has: {odd[0]})" if odd else "")
            + ". Splits of one store share their classes."
        )

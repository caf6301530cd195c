"""Images in folders: one folder for each class, at any depth, or one folder with all images.

The label of an image in a class folder is the position of this folder in the order of the classes, counted from 0.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from prep.console import Progress, UserError, count_noun, progress, say
from prep.images.codec import BadImage
from prep.images.limits import MAX_FILE_BYTES
from prep.inputs.classes import (
    INNER_FOLDER,
    NO_CLASS,
    STRAY_FILE,
    SYSTEM_FILE,
    class_names,
    examples,
    has_image_name,
    is_no_class_folder,
    is_system_file,
    may_be_image,
    order_classes,
)
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs

# Number of class folders that eight threads list as one batch. Threads hide the latency of a slow file system. A batch
# is limited, because its listed files are held in memory.
_FOLDERS_AT_ONCE = 32
_CLASS_TAR = re.compile(r"(.*/)?n\d{8}\.tar")
_KINDS = {stat.S_IFDIR: "folder", stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket"}


@dataclass(frozen=True)
class FolderReader:
    """Reads inputs that are files below `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """Return the bytes of a file.

        Raises BadImage if reading fails, and UserError if size or modification time have changed.
        """
        return self._read(item, MAX_FILE_BYTES + 1, check=True)

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of a file. Raises BadImage if the file cannot be read."""
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


def list_folder(
    root: Path, split: str, follow_links: bool, flat: bool = False, classes_are_given: bool = False
) -> FoundInputs:
    """List the files of class folders, or of one folder with all images, sorted by the bytes of their names.

    No file is opened. A class folder is a folder at any depth that contains images, or that contains nothing. The class
    name of a class folder is its path. A class folder may be inside another class folder if the store or a file names
    all classes (`classes_are_given`). If `root` contains only one folder, and this folder contains folders, this folder
    is used instead of `root`. System folders, hidden names, and files beside class folders are ignored.

    If `root` contains both images and folders, the images are listed in two cases: if all folders are empty, or if
    `flat` is true and there are at least as many images as folders. Otherwise, UserError is raised if there are more
    than ten images and more images than folders. In all other cases, only the class folders are listed.

    Symbolic links that lead out of `root` are refused unless `follow_links` is true. Raises UserError if `root`
    contains no files, if a class folder is a link that is not followed, or if the classes are ambiguous.
    """
    with ThreadPoolExecutor(8) as pool, progress(f"{split}: listing", 0, "folders") as listing_progress:
        walk = _Walk(root, follow_links, pool, listing_progress)
        folder, entries = walk.enter_single_folders()
        if walk.is_flat(folder, entries, flat):
            return walk.flat_inputs(entries)
        walk.add_level(b"", entries, ())
    if not walk.class_folders:
        raise UserError(f"{root}: the folder is empty. Expected a folder for each class, or images and --labels.")
    if not len(walk.listing):
        raise UserError(f"{root}: {count_noun(len(walk.class_folders), 'class folder')} without any file.")
    walk.refuse_aliases()
    walk.refuse_class_tars()
    names = class_names(walk.class_folders, str(folder), classes_are_given)
    classes = order_classes(names, str(folder))
    label_of = {name: label for label, name in enumerate(classes)}
    listing = walk.listing.relabelled([label_of[name] for name in names])
    return FoundInputs(listing, classes, False, tuple(walk.refused), tuple(walk.ignored), folder)


@dataclass(frozen=True, slots=True)
class _Entry:
    name: bytes
    mode: int  # stat.S_IFREG for a file, stat.S_IFDIR for a folder, 0 for an entry that is refused
    size: int = 0
    mtime_ns: int = 0
    reason: str = ""  # the reason why the entry is refused; empty if it is not refused
    is_folder_link: bool = False  # whether the entry is a refused link to a folder or to a path that does not exist
    is_file_link: bool = False  # whether the entry is a refused link to a file
    is_link: bool = False  # whether the entry is a link that is followed


class _Walk:
    """Lists folders level by level, and adds class folders and their files in the order of their names."""

    def __init__(self, root: Path, follow_links: bool, pool: ThreadPoolExecutor, progress: Progress) -> None:
        self.root, self.follow_links, self.pool, self.progress = root, follow_links, pool, progress
        self.base = os.fsencode(root.resolve()) + b"/"
        self.folder = os.fsencode(root)  # the folder that contains the class folders
        self.listing = Listing()  # the labels in the listing are indices into `class_folders`
        self.class_folders: list[bytes] = []  # paths of the class folders, relative to `folder`
        self.refused: list[tuple[str, str]] = []
        self.ignored: list[tuple[str, str]] = []
        self.has_linked_folders = False

    def enter_single_folders(self) -> tuple[Path, list[_Entry]]:
        """Return the folder that contains the class folders, and its entries.

        The folder is `root`, or the only folder in `root`, or the only folder in that folder, and so on.
        """
        entries = self._scan(self.folder)
        while True:
            folders, files, links = _sorted_out(entries)
            if len(folders) != 1 or links or any(may_be_image(file.name) for file in files):
                return Path(os.fsdecode(self.folder)), entries
            below = os.path.join(self.folder, folders[0].name)
            inner = self._scan(below)
            inner_folders, inner_files, inner_links = _sorted_out(inner)
            if not (inner_folders or inner_links) or any(may_be_image(file.name) for file in inner_files):
                return Path(os.fsdecode(self.folder)), entries
            self._ignore_strays(b"", entries)
            self.folder, entries = below, inner

    def is_flat(self, folder: Path, entries: Sequence[_Entry], flat: bool) -> bool:
        """Return whether the images are in `folder` itself.

        Raises UserError if images lie beside folders that are not empty, and it is unclear which of them to list.
        """
        folders, files, links = _sorted_out(entries)
        if not folders and not links:
            return bool(files) or any(entry.mode == 0 for entry in entries)
        images = [file for file in files if may_be_image(file.name)]
        if not images:
            return False
        has_content = any(self._scan(os.path.join(self.folder, entry.name)) for entry in folders)
        if (flat and len(images) >= len(folders)) or not has_content:
            return True
        if len(images) > max(10, len(folders)):
            raise UserError(
                f"{folder}: {count_noun(len(folders), 'folder')} and {count_noun(len(images), 'photograph')} side by "
                f"side (first: {name_text(images[0].name)}). Name the label file of the photographs with --labels "
                "FILE, or move the photographs away from the class folders."
            )
        say(
            f"{folder}: left out {count_noun(len(images), 'photograph')} beside the class folders (first: "
            f"{name_text(images[0].name)})."
        )
        return False

    def flat_inputs(self, entries: Sequence[_Entry]) -> FoundInputs:
        """Return the files of a folder without class folders."""
        for entry in entries:
            if stat.S_ISDIR(entry.mode):
                reason = NO_CLASS if is_no_class_folder(entry.name) else "a folder beside the photographs"
                self.ignored.append((name_text(entry.name), reason))
            else:
                self._add_file(b"", entry, 0)
        if not len(self.listing) and not self.refused:
            raise UserError(f"{self.root}: no photograph in this folder. Expected a folder for each class, or images.")
        folder = Path(os.fsdecode(self.folder))
        return FoundInputs(self.listing, (), True, tuple(self.refused), tuple(self.ignored), folder)

    def add_level(self, parent: bytes, entries: Sequence[_Entry], around: tuple[tuple[int, int], ...]) -> None:
        """Add the class folders in the folder `parent` and below it.

        `parent` is a path below `folder`, or empty for `folder` itself. `around` has the device and inode numbers of
        the folders that contain `parent`. These numbers reveal a link from `parent` to a folder that contains it.
        """
        folders, _, links = _sorted_out(entries)
        if links:
            self._refuse_links(parent, links)
        self.has_linked_folders = self.has_linked_folders or any(entry.is_link for entry in folders)
        self._ignore_strays(parent, entries)
        self.progress.total += len(folders)
        status = os.stat(os.path.join(self.folder, parent))
        around = (*around, (status.st_dev, status.st_ino))
        for first in range(0, len(folders), _FOLDERS_AT_ONCE):
            paths = [parent + entry.name for entry in folders[first : first + _FOLDERS_AT_ONCE]]
            scanned = self.pool.map(self._scan, [os.path.join(self.folder, path) for path in paths])
            for path, found in zip(paths, scanned, strict=True):
                self._add_folder(path, found, around)
                self.progress.advance()

    def refuse_aliases(self) -> None:
        """Raise UserError if two class folders are the same folder, because each photograph would have two labels."""
        found: dict[bytes, bytes] = {}
        for path in self.class_folders if self.has_linked_folders else ():
            other = found.setdefault(os.path.realpath(os.path.join(self.folder, path)), path)
            if other != path:
                raise UserError(
                    f"{name_text(self.folder)}: the class folders {name_text(other)} and {name_text(path)} are the "
                    "same folder, because of a link: each photograph would have two labels. Remove the link."
                )

    def _add_folder(self, path: bytes, entries: Sequence[_Entry], around: tuple[tuple[int, int], ...]) -> None:
        """Add `path` as a class folder if it contains images or is empty, and add the class folders in `path`."""
        folders, files, links = _sorted_out(entries)
        if (folders or links) and not any(may_be_image(file.name) for file in files):
            status = os.stat(os.path.join(self.folder, path))
            if (status.st_dev, status.st_ino) in around:
                link = name_text(os.path.join(self.folder, path))
                raise UserError(f"{link} links to a folder that contains the link. Remove the link.")
            self.add_level(path + b"/", entries, around)
            return
        self.class_folders.append(path)
        for entry in entries:
            if stat.S_ISDIR(entry.mode) and is_no_class_folder(entry.name):
                self.ignored.append((name_text(path + b"/" + entry.name), NO_CLASS))
            elif not _may_have_classes(entry):
                self._add_file(path + b"/", entry, len(self.class_folders) - 1)
        for below in [path + b"/" + entry.name for entry in entries if _may_have_classes(entry)]:
            if self._has_images(below):
                self._add_folder(below, self._scan(os.path.join(self.folder, below)), around)
            else:
                self.ignored.append((name_text(below), INNER_FOLDER))

    def _has_images(self, path: bytes) -> bool:
        """Return whether there are images in the folder `path` or in one of its subfolders."""
        folders, files, _ = _sorted_out(self._scan(os.path.join(self.folder, path)))
        inner = (path + b"/" + folder.name for folder in folders if not folder.is_link)
        return any(may_be_image(file.name) for file in files) or any(map(self._has_images, inner))

    def _add_file(self, parent: bytes, entry: _Entry, label: int) -> None:
        name = parent + entry.name
        if stat.S_ISREG(entry.mode) and is_system_file(entry.name):
            self.ignored.append((name_text(name), SYSTEM_FILE))
        elif stat.S_ISREG(entry.mode):
            self.listing.add(name, label, entry.size, entry.mtime_ns)
        else:
            self.refused.append((name_text(name), entry.reason or f"a {_kind(entry.mode)}, not a file"))

    def _ignore_strays(self, parent: bytes, entries: Sequence[_Entry]) -> None:
        for entry in entries:
            name = name_text(parent + entry.name)
            if stat.S_ISDIR(entry.mode) and is_no_class_folder(entry.name):
                self.ignored.append((name, NO_CLASS))
            elif stat.S_ISREG(entry.mode):
                self.ignored.append((name, SYSTEM_FILE if is_system_file(entry.name) else STRAY_FILE))
            elif entry.mode == 0 and entry.is_file_link:
                self.ignored.append((name, STRAY_FILE))
            elif entry.mode == 0:
                self.refused.append((name, entry.reason))

    def refuse_class_tars(self) -> None:
        """Raise UserError if only some of ILSVRC's class tars are unpacked, so that tars lie beside class folders."""
        classes = {name_text(path) for path in self.class_folders}
        beside = [name for name, reason in self.ignored if reason == STRAY_FILE and _CLASS_TAR.fullmatch(name)]
        packed = [name for name in beside if name.removesuffix(".tar") not in classes]
        if packed:
            raise UserError(
                f"{name_text(self.folder)}: {len(packed):,} class tars that are not unpacked ({examples(packed)}) "
                f"beside {count_noun(len(classes), 'class folder')}. Unpack these tars, too, each into its own folder."
            )

    def _refuse_links(self, parent: bytes, links: Sequence[_Entry]) -> None:
        text = ", ".join(f"{name_text(parent + link.name)}: {link.reason}" for link in links[:3])
        advice = "Restore the folder to which the link leads" if self.follow_links else "Pass --follow-links"
        what = "class folder is a symbolic link" if len(links) == 1 else "class folders are symbolic links"
        raise UserError(
            f"{name_text(self.folder)}: {len(links):,} {what} that cannot be followed ({text}). {advice}, or remove "
            "the links that are not classes."
        )

    def _scan(self, folder: bytes) -> list[_Entry]:
        return sorted(_entries(folder, self.base, self.follow_links), key=lambda entry: entry.name)


def _may_have_classes(entry: _Entry) -> bool:
    """Return whether an entry of a class folder is a folder (not a link) that may contain class folders."""
    is_folder = stat.S_ISDIR(entry.mode) and not entry.is_link
    return is_folder and not has_image_name(entry.name) and not is_no_class_folder(entry.name)


def _sorted_out(entries: Sequence[_Entry]) -> tuple[list[_Entry], list[_Entry], list[_Entry]]:
    """Return three lists: folders that may be classes, files, and refused links to folders."""
    folders = [entry for entry in entries if stat.S_ISDIR(entry.mode) and not is_no_class_folder(entry.name)]
    files = [entry for entry in entries if stat.S_ISREG(entry.mode)]
    return folders, files, [entry for entry in entries if entry.is_folder_link and not is_no_class_folder(entry.name)]


def _entries(folder: bytes, base: bytes, follow_links: bool) -> Iterator[_Entry]:
    """Yield the entries of a folder.

    Links that lead out of `base` are refused unless `follow_links` is true. Hidden files are left out.
    """
    try:
        scan = os.scandir(folder)
    except OSError as error:
        raise UserError(f"{name_text(folder)}: {error.strerror or error}.") from None
    with scan as entries:
        for entry in entries:
            if entry.name.startswith(b".") and not entry.is_dir(follow_symlinks=False):
                continue
            try:
                if entry.is_symlink() and not follow_links:
                    target = os.path.realpath(entry.path, strict=True)
                    if not target.startswith(base):
                        reason = f"a symbolic link out of the source, to {name_text(target)}; see --follow-links"
                        is_folder = os.path.isdir(target)
                        yield _Entry(entry.name, 0, 0, 0, reason, is_folder, not is_folder)
                        continue
                status = entry.stat()
            except OSError as error:
                reason = f"cannot be read: {error.strerror or error}"
                is_link = entry.is_symlink() and not has_image_name(entry.name)
                yield _Entry(entry.name, 0, reason=reason, is_folder_link=is_link)
                continue
            mode = stat.S_IFMT(status.st_mode)
            if mode in (stat.S_IFREG, stat.S_IFDIR):
                yield _Entry(entry.name, mode, status.st_size, status.st_mtime_ns, is_link=entry.is_symlink())
            else:
                yield _Entry(entry.name, 0, reason=f"a {_kind(mode)}, not a file")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "device")

"""Finds the class folders in an archive, or its only folder with images, by the rules of prep/inputs/folder.py."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.classes import (
    INNER_FOLDER,
    NO_CLASS,
    STRAY_FILE,
    SYSTEM_FILE,
    class_names,
    has_image_name,
    is_no_class_folder,
    is_system_file,
    may_be_image,
    order_classes,
)
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs

LINK = "a link, not a file"
MAX_DEPTH = 50  # largest number of components of a member's path
_DOUBLE = "another member of the same name follows in the archive"


class ArchiveContents:
    """The images of an archive (in the order of the archive), the refused members, and the folders."""

    def __init__(self, mtime_ns: int) -> None:
        self.mtime_ns = mtime_ns  # modification time of the archive, stored for each member
        self.images = Listing()
        self.folders: set[bytes] = set()
        self.refused: list[tuple[str, str]] = []  # (name, reason)
        # Folders whose members are left out: their names begin with a dot, or they are system folders in a class tar.
        self.hidden: set[bytes] = set()

    def add(self, name: bytes, size: int = 0, location: int = 0, reason: str = "") -> None:
        """Add an image to `images`, or to `refused` if a `reason` to refuse the image is given. Also add its folder.

        The folder of a refused image is added too, so that its class exists even if all images of the class are
        refused. An empty name is ignored.
        """
        folder, _, file = name.rpartition(b"/")
        parts = folder.split(b"/")
        is_safe = len(parts) < MAX_DEPTH and not {b"", b".", b".."}.intersection(parts)
        if reason:
            self.refused.append((name_text(name), reason))
            if reason == LINK and b"/" in name and not name.startswith(b"/") and b".." not in name.split(b"/"):
                # A class that has only links becomes a class without photographs.
                self.folders.add(name.rpartition(b"/")[0])
        elif name:
            self.images.add(name, 0, size, self.mtime_ns, location)
        if folder and (not reason or (is_safe and has_image_name(file))):
            self.folders.add(folder)


class ClassTar:
    """A tar whose name is the name of a class.

    All images of the tar are added to `contents`, whatever folders the images are in.
    """

    def __init__(self, contents: ArchiveContents, tar_name: bytes) -> None:
        self.contents = contents
        self.class_name = tar_name[: -len(".tar")]
        self.inner: dict[bytes, bytes] = {}  # folder inside the tar -> name of an image in this folder
        contents.folders.add(self.class_name)

    def add(self, name: bytes, size: int, location: int, reason: str) -> None:
        """Add a file or link of the tar, with the name CLASS/FILE. Files in system folders are left out."""
        folder, _, base = name.rpartition(b"/")
        if _no_class_part(folder):
            self.contents.hidden.add(self.class_name + b"/" + _no_class_part(folder))
            return
        if folder not in self.inner and may_be_image(base) and not is_system_file(base):
            self.inner[folder] = name
        self.contents.add(name and self.class_name + b"/" + base, size, location, reason)


def refuse_folders_in_class_tars(where: str, tars: Sequence[ClassTar]) -> None:
    """Raise UserError if it is unclear whether the tars or the folders inside them are the classes.

    The images of a tar may be in one folder. The name of this folder must be the name of the tar, or must be the same
    in all tars (for example `images`).
    """
    alike: set[bytes] = set()
    for tar in tars:
        own = [folder for folder in tar.inner if folder.rpartition(b"/")[2] not in (b"", tar.class_name)]
        alike |= {folder.rpartition(b"/")[2] for folder in own}
        if len(tar.inner) > 1 or len(alike) > 1:
            name = name_text(tar.inner[own[0]] if own else next(iter(tar.inner.values())))
            raise UserError(
                f"{where}: {name_text(tar.class_name)}.tar has its images in folders ({name}), so it is unclear "
                "whether the tars or the folders are the classes. Unpack the tars into one folder and name this folder "
                "as SOURCE, or make one tar for each class, with no folders in the tar."
            )


def found_inputs(path: Path, contents: ArchiveContents, flat: bool, classes_are_given: bool = False) -> FoundInputs:
    """Find the class folders, or the only folder with images, in the archive (or folder of archives) `path`.

    `contents` has the members of the archive. The rules for folders are those of prep.inputs.folder.list_folder. If
    several members have the same name, the last of these members is kept. If `flat` is true and all images are in one
    folder, the result has no classes. Raises UserError if there is no image, if a class folder is a link, or if the
    classes are ambiguous.
    """
    refused = contents.refused
    if not len(contents.images):
        raise UserError(f"{path}: no image found; {count_noun(len(refused), 'member')} refused.")
    tree = _Tree(path, contents)
    tree.enter_single_folders()
    is_flat = tree.is_flat(flat)
    if not is_flat:
        tree.find_class_folders(tree.root)
        tree.check_links()
        is_flat = flat and len(tree.class_folders) == 1
    ordered = sorted(tree.class_folders, key=lambda folder: folder.split(b"/"))
    below_root = [folder[len(tree.root) :] for folder in ordered]
    names = [] if is_flat else class_names(below_root, str(path), classes_are_given)
    classes = order_classes(names, str(path))
    position = {name: label for label, name in enumerate(classes)}
    label_of = {folder: position[name] for folder, name in zip(ordered, names, strict=False)}
    listing = Listing()
    for index in tree.indices:
        item = contents.images[index]
        folder, slash, name = item.path.rpartition(b"/")
        if is_flat and (folder in tree.class_folders or folder + slash == tree.root):
            listing.add(name, 0, item.size, item.mtime_ns, item.location)
        elif folder in label_of:
            replaced = replace(item, path=item.path[len(tree.root) :], label=label_of[folder])
            listing.add(replaced.path, replaced.label, replaced.size, replaced.mtime_ns, replaced.location)
        elif is_flat or folder + slash in tree.inner_folders:
            tree.ignored.append((name_text(item.path), STRAY_FILE))
        else:
            tree.ignored.append((name_text(item.path), INNER_FOLDER))
    return FoundInputs(listing, classes, is_flat, tuple(refused), tuple(tree.ignored))


class _Tree:
    """The folders of an archive, and which of them are class folders.

    In `root`, `has_images`, `inner_folders` and the keys of `folders_in`, the path of a folder ends with a slash, and
    b"" is the top folder of the archive. All other paths have no slash at the end.
    """

    def __init__(self, path: Path, contents: ArchiveContents) -> None:
        self.path, self.contents = path, contents
        self.ignored = [(name_text(folder), NO_CLASS) for folder in sorted(contents.hidden)]
        self.indices = self._kept_images()
        self.has_images: set[bytes] = set()  # folders that directly contain images
        self.folders_in: defaultdict[bytes, set[bytes]] = defaultdict(set)  # folder -> the folders directly inside it
        self.root = b""
        self.class_folders: list[bytes] = []
        self.inner_folders: set[bytes] = set()  # folders that are not class folders, but contain class folders
        folders = {folder for folder in contents.folders if not _no_class_part(folder)}
        for index in self.indices:
            folder, slash, name = contents.images.path(index).rpartition(b"/")
            if may_be_image(name):
                self.has_images.add(folder + slash)
        for folder in folders:
            while folder:
                parent, slash, _ = folder.rpartition(b"/")
                self.folders_in[parent + slash].add(folder)
                folder = parent

    def _kept_images(self) -> Sequence[int]:
        """Return the indices of the images, sorted by folder, name and offset.

        Images in system folders, and system files, are left out.
        """
        images, kept = self.contents.images, array("q")
        junk: set[bytes] = set()
        order = _sorted_indices(images)
        no_class: dict[bytes, bytes] = {}  # folder -> result of _no_class_part for this folder
        for position, index in enumerate(order):
            path = images.path(index)
            folder, _, name = path.rpartition(b"/")
            if folder not in no_class:
                no_class[folder] = _no_class_part(folder)
            if no_class[folder]:
                junk.add(no_class[folder])
            elif position + 1 < len(order) and images.path(order[position + 1]) == path:
                self.contents.refused.append((name_text(path), _DOUBLE))
            elif is_system_file(name):
                self.ignored.append((name_text(path), SYSTEM_FILE))
            else:
                kept.append(index)
        junk |= {part for folder in self.contents.folders if (part := _no_class_part(folder))}
        self.ignored += [(name_text(folder), NO_CLASS) for folder in sorted(junk)]
        if len(kept) == len(order):
            return order
        return kept

    def enter_single_folders(self) -> None:
        """While the root contains only one folder, and that folder has folders but no images, make it the root."""
        while self.root not in self.has_images and len(self.folders_in[self.root]) == 1:
            below = next(iter(self.folders_in[self.root])) + b"/"
            if below in self.has_images or not self.folders_in[below]:
                return
            self.inner_folders.add(self.root)
            self.root = below

    def is_flat(self, flat: bool) -> bool:
        """Return whether the images are in the root itself.

        Raises UserError if the root contains folders with images, and also more than ten images and more images than
        folders.
        """
        folders = self.folders_in[self.root]
        if not folders:
            return True
        if self.root not in self.has_images:
            return False
        beside = [name for name in self._names_in_root() if may_be_image(name)]
        has_content = any(folder + b"/" in self.has_images or self.folders_in[folder + b"/"] for folder in folders)
        if (flat and len(beside) >= len(folders)) or not has_content:
            return True
        if len(beside) > max(10, len(folders)):
            raise UserError(
                f"{self.path}: {count_noun(len(folders), 'folder')} and {count_noun(len(beside), 'photograph')} side "
                f"by side (first: {name_text(beside[0])}). Expected class folders alone, or images alone with --labels."
            )
        say(
            f"{self.path}: left out {count_noun(len(beside), 'photograph')} beside the class folders (first: "
            f"{name_text(beside[0])})."
        )
        return False

    def _names_in_root(self) -> Iterator[bytes]:
        for index in self.indices:
            folder, slash, name = self.contents.images.path(index).rpartition(b"/")
            if folder + slash == self.root:
                yield name

    def find_class_folders(self, folder: bytes) -> None:
        """Collect the class folders in `folder` and below it. `folder` ends with a slash or is the root."""
        self.inner_folders.add(folder)
        for below in sorted(self.folders_in[folder]):
            self._add_folder(below)

    def _add_folder(self, folder: bytes) -> None:
        inside = sorted(self.folders_in[folder + b"/"])
        if inside and folder + b"/" not in self.has_images:
            self.find_class_folders(folder + b"/")
            return
        self.class_folders.append(folder)
        for below in inside:
            if self._has_images(below):
                self._add_folder(below)

    def _has_images(self, folder: bytes) -> bool:
        """Return whether there are images in a folder or in one of its subfolders."""
        return folder + b"/" in self.has_images or any(map(self._has_images, self.folders_in[folder + b"/"]))

    def check_links(self) -> None:
        """Raise UserError if a link lies beside class folders, because the link may be a class.

        A link whose name has a file extension other than `.tar` is not a class, and is ignored.
        """
        inner = {name_text(folder) for folder in self.inner_folders}
        for entry in list(self.contents.refused):
            parent, slash, name = entry[0].rpartition("/")
            if entry[1] != LINK or parent + slash not in inner:
                continue
            if "." not in name or name.endswith(".tar"):
                raise UserError(
                    f"{self.path}: {entry[0]} is a link beside the class folders, and a link in an archive cannot be "
                    "followed. Make the archive again with the option --dereference of tar, or without this link."
                )
            self.contents.refused.remove(entry)
            self.ignored.append((entry[0], STRAY_FILE))


def _no_class_part(folder: bytes) -> bytes:
    """Return the path of the first folder in `folder` that is never a class (`a/__MACOSX` for `a/__MACOSX/b`).

    Returns b"" if there is no such folder.
    """
    parts = folder.split(b"/") if folder else []
    first = next((k for k, part in enumerate(parts) if is_no_class_folder(part)), None)
    return b"" if first is None else b"/".join(parts[: first + 1])


def _sorted_indices(images: Listing) -> Sequence[int]:
    """Return the indices of all `images`, sorted by folder, name and offset.

    If `images` is already sorted, returns a range, which saves memory.
    """

    def key(i: int) -> tuple[bytes, bytes, int]:
        folder, _, name = images.path(i).rpartition(b"/")
        return folder.replace(b"/", b"\0"), name, images[i].location

    if all(key(i) < key(i + 1) for i in range(len(images) - 1)):
        return range(len(images))
    return array("q", sorted(range(len(images)), key=key))

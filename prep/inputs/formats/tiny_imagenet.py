"""Tiny ImageNet, unpacked or as the zip archive that is offered for download.

The training images are in CLASS/images, beside CLASS_boxes.txt. The validation images are in the folder `images`.
val_annotations.txt has a line for each image: name, class and the corners of a box, separated by tabs. The name of an
input is CLASS/FILE in train, as in class folders. In val, the name is FILE, as in a folder of images with a label file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.archive_folders import ArchiveContents, found_inputs
from prep.inputs.classes import NO_PHOTOGRAPH, STRAY_FILE, examples, may_be_image
from prep.inputs.folder import FolderReader, list_folder
from prep.inputs.formats.labelled import LabelledRows
from prep.inputs.formats.zip_archive import ZipReader, member_named, zip_contents
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs, InputReader, ListOptions
from prep.schema import MAX_TEXT_BYTES, read_regular

_ANNOTATIONS = b"val_annotations.txt"


@dataclass(frozen=True)
class ImagesFolderReader:
    """Reads an input CLASS/FILE from the file CLASS/images/FILE below `root`."""

    root: Path

    def read(self, item: Input) -> bytes:
        """Return the bytes of a file. Raises the same errors as FolderReader.read."""
        return FolderReader(self.root).read(_in_images_folder(item))

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of a file. Raises BadImage if the file cannot be read."""
        return FolderReader(self.root).head(_in_images_folder(item), size)


def _in_images_folder(item: Input) -> Input:
    folder, _, name = item.path.rpartition(b"/")
    return replace(item, path=folder + b"/images/" + name)


def list_tiny_imagenet(
    path: Path, inside: bytes, split: str, options: ListOptions, store_classes: Sequence[str]
) -> tuple[InputReader, FoundInputs]:
    """List a split in the folder `path`, or in the folder `inside` of the zip archive `path`.

    Raises UserError if the split has no images, if val_annotations.txt cannot be read, or if the archive is damaged.
    """
    if path.is_file():
        return _list_zip(path, inside, split, options, store_classes)
    annotations = path / _ANNOTATIONS.decode()
    if annotations.is_file() and (path / "images").is_dir():
        found = list_folder(path / "images", split, options.follow_links, flat=True)
        labels = _parse_annotations(
            read_regular(annotations, MAX_TEXT_BYTES, "Download the data set again."), str(annotations)
        )
        return FolderReader(path / "images"), _labelled(str(path), found, labels, options, store_classes)
    found = list_folder(path, split, options.follow_links)
    if not all(found.listing.path(k).split(b"/")[1:-1] == [b"images"] for k in range(len(found.listing))):
        return FolderReader(found.root or path), found
    listing = Listing()
    for item in found.listing:
        listing.add(item.path.replace(b"/images/", b"/", 1), item.label, item.size, item.mtime_ns)
    return ImagesFolderReader(found.root or path), replace(found, listing=listing)


def _without_images_folder(path: bytes) -> bytes:
    return b"/".join(part for part in path.split(b"/") if part != b"images")


def _list_zip(
    path: Path, inside: bytes, split: str, options: ListOptions, store_classes: Sequence[str]
) -> tuple[InputReader, FoundInputs]:
    reader, contents = ZipReader(path), zip_contents(path, inside, split)
    annotations = member_named(contents, _ANNOTATIONS)
    kept, ignored = ArchiveContents(contents.mtime_ns), []
    kept.refused, kept.hidden = contents.refused, contents.hidden
    # The empty folders are kept, so that a class without an image is found.
    kept.folders = {folder for path in contents.folders if (folder := _without_images_folder(path))}
    for item in contents.images:
        if item.path.endswith((_ANNOTATIONS, b"_boxes.txt")):
            ignored.append((name_text(item.path), STRAY_FILE))
        else:
            kept.add(_without_images_folder(item.path), item.size, item.location)
    found = found_inputs(path, kept, flat=annotations is not None)
    if annotations is not None:
        where = f"{path}: {name_text(inside + _ANNOTATIONS)}"
        found = _labelled(
            str(path), found, _parse_annotations(reader.read_text(annotations), where), options, store_classes
        )
    return reader, replace(found, ignored=(*found.ignored, *ignored))


def _parse_annotations(content: bytes, where: str) -> dict[bytes, str]:
    """Return {name of an image: class}. Raises UserError if a line has no class, or if an image has two classes."""
    labels: dict[bytes, str] = {}
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").splitlines(), 1):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split(b"\t")]
        if len(cells) < 2 or not cells[1]:
            raise UserError(f"{where}, line {number}: {name_text(line[:40])}, expected name, tab and class.")
        name, label = cells[0], name_text(cells[1])
        if labels.setdefault(name, label) != label:
            raise UserError(f"{where}, line {number}: {name_text(name)} has two labels, {labels[name]} and {label}.")
    return labels


def _labelled(
    origin: str, found: FoundInputs, labels: dict[bytes, str], options: ListOptions, store_classes: Sequence[str]
) -> FoundInputs:
    """Return the images of the split val with their labels. An image without a label is refused."""
    rows = LabelledRows(origin)
    rows.labels_are_names = True
    listed = [found.listing.path(k) for k in range(len(found.listing))]
    surplus = [name_text(name) for name in sorted(labels.keys() - set(listed))]
    if surplus:
        say(
            f"{origin}: {count_noun(len(surplus), 'line')} of {_ANNOTATIONS.decode()} without an image: "
            f"{examples(surplus)}."
        )
    for item in found.listing:
        if item.path in labels or may_be_image(item.path):
            rows.add(item.path, labels.get(item.path, ""), item.size, item.mtime_ns, item.location)
        else:
            rows.ignored.append((name_text(item.path), NO_PHOTOGRAPH))
    labelled = rows.found((), options, store_classes, in_class_folders=False)
    refused, ignored = (*found.refused, *labelled.refused), (*found.ignored, *labelled.ignored)
    return replace(labelled, refused=refused, ignored=ignored)

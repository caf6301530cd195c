"""Finds the splits in SOURCE, the argument of `alexprep build-lmdb`, and lists their images.

A split is a folder or a tar archive. Class folders or a label file give the labels. Image files are not opened. Files
and folders whose names begin with a dot are ignored. Every other entry is either listed as an input or added to
`Source.refused` with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.archive import TarReader, list_archive
from prep.inputs.classes import refuse_empty_classes, wanted_classes, with_classes
from prep.inputs.folder import FolderReader, list_folder
from prep.inputs.labels import read_labels
from prep.inputs.listing import Listing
from prep.inputs.reader import DEFAULT_OPTIONS, FoundInputs, InputReader, ListOptions, Source
from prep.store.manifest import SPLITS


def find_splits(source: Path, split: str | None) -> dict[str, Path]:
    """Find the splits of a SOURCE: {split: folder or archive with its images}.

    The splits are the folders `train` and `val` in SOURCE, or archives such as `train.tar` or `ILSVRC2012_img_val.tar`.
    If SOURCE contains none of these, SOURCE itself is the only split. Raises UserError if SOURCE is missing, is neither
    a folder nor a file, or lacks the wanted `split`.
    """
    if source.is_file():
        named = next((name for name in SPLITS if source.stem == name or f"img_{name}" in source.name), SPLITS[0])
        return {split or named: source}
    if not source.is_dir():
        raise UserError(f"{source}: {'not a folder or an archive' if source.exists() else 'no such folder'}.")
    found = {}
    for name in SPLITS:
        archives = (source / f"ILSVRC2012_img_{name}.tar", source / f"{name}.tar")
        paths = [path for path in (source / name, *archives) if path.is_dir() or (path in archives and path.is_file())]
        if paths:
            found[name] = paths[0]
    if split is None:
        _report_ignored_folders(source, found)
        return found or {SPLITS[0]: source}
    if not found:
        return {split: source}
    if split not in found:
        raise UserError(f"--split {split}: {source} has {' and '.join(found)} but no {split}.")
    return {split: found[split]}


def _report_ignored_folders(source: Path, found: dict[str, Path]) -> None:
    """If only one split was found, print which other folders are ignored: `train` may be the name of a class."""
    if found and len(found) < len(SPLITS):
        others = sorted(path.name for path in source.iterdir() if path.is_dir() and path.name not in (*SPLITS, "test"))
        if others:
            taken = " and ".join(path.name for path in found.values())
            say(
                f"{source}: building from {taken}; ignoring {count_noun(len(others), 'other folder')} (first: "
                f"{others[0]}). If all of these folders are classes, move them into one folder named train."
            )


def list_source(
    path: Path,
    split: str,
    options: ListOptions = DEFAULT_OPTIONS,
    store_classes: Sequence[str] = (),
) -> Source:
    """List one split from a folder or a tar archive.

    Class folders give the labels. Images without class folders need a label file (prep/inputs/labels). `store_classes`
    are the classes of the store or of the split that was listed before, in the order of the labels; empty if there are
    none yet. These classes keep their labels. Raises UserError if no image is found, if labels do not fit the images,
    if a class has no image, or if the classes are not those of the store.
    """
    if path.is_file():
        reader: InputReader = TarReader(path)
        found = list_archive(path, flat=options.labels is not None)
    else:
        found = list_folder(path, split, options.follow_links, flat=options.labels is not None)
        reader = FolderReader(found.root or path)
    return label_inputs(reader, found, split, options, store_classes)


def label_inputs(
    reader: InputReader, found: FoundInputs, split: str, options: ListOptions, store_classes: Sequence[str]
) -> Source:
    """The split with the inputs `found`, labelled as list_source says."""
    path = reader.root
    if found.is_flat:
        names = [found.listing.path(i) for i in range(len(found.listing))]
        label_of, classes = read_labels(options.labels, names, path, options.label_order, store_classes)
        inputs = Listing()
        for item in found.listing:
            inputs.add(item.path, label_of[item.path], item.size, item.mtime_ns, item.location)
        return Source(reader, split, classes, inputs, found.refused, found.ignored)
    if options.labels is not None:
        say(f"{path}: class folders give the labels of {split}; --labels is ignored.")
    inputs, classes = found.listing, found.classes
    wanted, owner = wanted_classes(options.class_file, classes, store_classes)
    if wanted:
        inputs = with_classes(classes, inputs, wanted, owner, str(path), options.allow_empty_classes)
        classes = wanted
    if not options.allow_empty_classes:
        counts = inputs.label_counts(len(classes)).tolist()
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        refuse_empty_classes(str(path), empty, found.refused)
    return Source(reader, split, classes, inputs, found.refused, found.ignored)

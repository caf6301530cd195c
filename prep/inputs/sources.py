"""Lists the images of one split of a SOURCE, the argument of `alexprep build-lmdb`.

A split is a folder, an archive or a list of files, in one of the layouts of prep/inputs/formats/layouts.py. Class
folders, a label file or the format itself give the labels. Image files are not opened. Files and folders whose names
begin with a dot are ignored. Every other file is listed as an input, or is added to `Source.refused` or
`Source.ignored` with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

from prep.console import UserError, say
from prep.inputs.archive import TarReader, list_archive
from prep.inputs.archive_folders import found_inputs
from prep.inputs.classes import (
    NO_PHOTOGRAPH,
    may_be_image,
    read_class_file,
    refuse_empty_classes,
    wanted_classes,
    with_classes,
)
from prep.inputs.folder import FolderReader, list_folder
from prep.inputs.formats.class_tars import list_class_tars
from prep.inputs.formats.csv_list import list_csv
from prep.inputs.formats.layouts import SplitSource, find_splits, split_source
from prep.inputs.formats.parquet import list_parquet
from prep.inputs.formats.shards import entries_beside
from prep.inputs.formats.tiny_imagenet import list_tiny_imagenet
from prep.inputs.formats.webdataset import list_webdataset
from prep.inputs.formats.zip_archive import KAGGLE_LABELS, ZipReader, zip_contents
from prep.inputs.labels import read_labels
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.inputs.reader import DEFAULT_OPTIONS, FoundInputs, InputReader, ListOptions, Source
from prep.inputs.selection import EXCLUDED, named_by_position, selected_classes, without

__all__ = ["find_splits", "label_inputs", "list_source"]


def list_source(
    where: SplitSource | Path,
    split: str,
    options: ListOptions = DEFAULT_OPTIONS,
    store_classes: Sequence[str] = (),
) -> Source:
    """List one split.

    `where` is a value in the result of find_splits, or the path of a folder or archive. The layout of a path is
    recognized.

    The labels come from class folders or from the format itself. Images with neither class folders nor labels in the
    format need a label file (prep/inputs/labels). `store_classes` are the classes of the store, or of the split that
    was listed before, in the order of the labels. If there are no such classes, `store_classes` is empty. The classes
    of the store keep their labels. Raises UserError if no image is found, if the labels do not fit the images, if a
    class has no image, or if the classes differ from those of the store.
    """
    where = split_source(where) if isinstance(where, Path) else where
    reader, found = _find_inputs(where, split, options, store_classes)
    if found.is_flat and where.labels is not None and options.labels is None and split == "val":
        with TemporaryDirectory() as folder:
            path = Path(folder) / KAGGLE_LABELS
            path.write_bytes(ZipReader(where.path).read_text(where.labels))
            source = _label_flat_inputs(reader, found, split, replace(options, labels=path), store_classes)
            source = replace(source, labels_from=where.path)
    elif found.is_flat:
        source = _label_flat_inputs(reader, found, split, options, store_classes)
    else:
        found = _select_classes(found, options, store_classes, str(reader.root))
        source = label_inputs(reader, found, split, options, store_classes)
    return _without_excluded(source, options)


def _select_classes(found: FoundInputs, options: ListOptions, store_classes: Sequence[str], where: str) -> FoundInputs:
    """Replace class folders that are numbers by class names. Then leave out classes that --classes does not name."""
    wanted = store_classes or (read_class_file(options.class_file) if options.class_file else ())
    classes = named_by_position(found.classes, wanted, options.label_order, where)
    listing, classes, left_out = selected_classes(found.listing, classes, options.class_file, where)
    return replace(found, listing=listing, classes=classes, ignored=(*found.ignored, *left_out))


def _label_flat_inputs(
    reader: InputReader, found: FoundInputs, split: str, options: ListOptions, store_classes: Sequence[str]
) -> Source:
    """Give labels to images without class folders. Images of classes that --classes does not name are left out."""
    try:
        return label_inputs(reader, found, split, options, store_classes)
    except UserError:
        if options.class_file is None:
            raise
        with suppress(UserError):
            everything = replace(options, class_file=None, allow_empty_classes=True)
            source = label_inputs(reader, found, split, everything, ())
            if set(read_class_file(options.class_file, set(source.classes))) < set(source.classes):
                labelled = FoundInputs(source.inputs, source.classes, False, source.refused, source.ignored)
                labelled = _select_classes(labelled, options, (), str(reader.root))
                selected = label_inputs(reader, labelled, split, replace(options, labels=None), store_classes)
                return replace(selected, labels_from=source.labels_from, label_lines=source.label_lines)
        raise


def _without_excluded(source: Source, options: ListOptions) -> Source:
    """Leave out the files that --exclude names. Raises UserError if a class has no photograph left."""
    if options.exclude is None:
        return source
    refused = {name.encode(): name for name, _ in source.refused}
    paths = (source.inputs.path(k) for k in range(len(source.inputs)))
    excluded = options.exclude.find(chain(paths, refused), source.split)
    inputs = without(source.inputs, excluded)
    if not options.allow_empty_classes:
        before, after = (listing.label_counts(len(source.classes)).tolist() for listing in (source.inputs, inputs))
        pairs = zip(source.classes, before, after, strict=True)
        empty = [name for name, count, left in pairs if count and not left]
        refuse_empty_classes(f"{source.reader.root}: after --exclude {options.exclude.file}", empty)
    return replace(
        source,
        inputs=inputs,
        refused=tuple(entry for entry in source.refused if entry[0].encode() not in excluded),
        ignored=(*source.ignored, *((name_text(path), EXCLUDED) for path in sorted(excluded))),
    )


def _find_inputs(
    where: SplitSource, split: str, options: ListOptions, store_classes: Sequence[str]
) -> tuple[InputReader, FoundInputs]:
    """Return the reader and the inputs of a split, before the labels are compared with the classes of the store."""
    path, flat = where.path, options.labels is not None
    are_given = bool(store_classes or options.class_file)  # whether the store or --classes FILE names all classes
    match where.layout:
        case "tar":
            return TarReader(path), list_archive(path, flat, are_given)
        case "class-tars":
            return list_class_tars(path, split)
        case "zip":
            return ZipReader(path), found_inputs(path, zip_contents(path, where.inside, split), flat, are_given)
        case "tiny-imagenet":
            return list_tiny_imagenet(path, where.inside, split, options, store_classes)
        case "webdataset" | "parquet":
            list_shards = list_webdataset if where.layout == "webdataset" else list_parquet
            shard_reader, found = list_shards(where.files, split, options, store_classes)
            ignored = (*found.ignored, *entries_beside(path, where.files))
            return shard_reader, replace(found, ignored=ignored)
        case "csv":
            return list_csv(path, split, options, store_classes)
        case "folders":
            found = list_folder(path, split, options.follow_links, flat, are_given)
            return FolderReader(found.root or path), found
    raise UserError(f"{path}: layout {where.layout} has no splits of its own.")


def label_inputs(
    reader: InputReader, found: FoundInputs, split: str, options: ListOptions, store_classes: Sequence[str]
) -> Source:
    """Return the split with the inputs `found` and the labels that list_source describes."""
    path = reader.root
    if found.is_flat:
        names = [found.listing.path(i) for i in range(len(found.listing))]
        images = [name for name in names if may_be_image(name)] or names
        label_of, classes, file, lines = read_labels(options, images, path, split, store_classes)
        inputs = Listing()
        for item in found.listing:
            if item.path in label_of:
                inputs.add(item.path, label_of[item.path], item.size, item.mtime_ns, item.location)
        strays = [(name_text(name), NO_PHOTOGRAPH) for name in names if name not in label_of]
        return Source(reader, split, classes, inputs, found.refused, (*found.ignored, *strays), file, lines)
    if options.labels is not None:
        say(f"{path}: class folders give the labels of {split}; --labels is ignored.")
    inputs, classes = found.listing, found.classes
    wanted, owner = wanted_classes(options.class_file, classes, store_classes)
    if wanted:
        inputs = with_classes(classes, inputs, wanted, owner, str(path), options.allow_empty_classes)
        if options.class_file is None and set(wanted) == set(classes) and wanted != classes:
            label = next(k for k, pair in enumerate(zip(wanted, classes, strict=True)) if pair[0] != pair[1])
            say(
                f"{path}: the classes keep the labels of {owner}: label {label} is {wanted[label]}. In a new store, "
                f"label {label} would be {classes[label]}."
            )
        classes = wanted
    if not options.allow_empty_classes:
        counts = inputs.label_counts(len(classes)).tolist()
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        refuse_empty_classes(str(path), empty, found.refused)
    return Source(reader, split, classes, inputs, found.refused, found.ignored)

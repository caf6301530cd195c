"""Recognizes the layout of a SOURCE and finds its splits. No image is read.

folders        class folders, or images in one folder with a label file
tar            a tar of class folders, of class tars, or of images
class-tars     a folder with one tar for each class
zip            a zip archive of class folders or of images, with or without folders train and val
tiny-imagenet  train/CLASS/images/…, val/images/… and val/val_annotations.txt
kaggle         ILSVRC/Data/CLS-LOC, and LOC_val_solution.csv for the labels of val
webdataset     tar files whose samples have an image KEY.jpg, and a label in KEY.cls or KEY.json
parquet        Parquet files with columns image and label, also in a folder for each split or configuration
csv            a CSV file of paths and labels
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.classes import is_no_class_folder, may_be_image
from prep.inputs.formats.csv_list import csv_splits
from prep.inputs.formats.parquet_folders import parquet_splits
from prep.inputs.formats.shards import files_by_split, refuse_unreadable, split_of_folder
from prep.inputs.formats.webdataset import is_webdataset
from prep.inputs.formats.zip_archive import zip_layout
from prep.inputs.formats.zip_directory import is_zip
from prep.inputs.listing import Input
from prep.schema import open_regular
from prep.store.manifest import SPLITS

_SUFFIXES = {".zip": "zip", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".tar": "tar"}
_KAGGLE_FOLDERS = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "CLS-LOC")
_ONLY_SPLIT = ""  # key of a split that has no name


@dataclass(frozen=True)
class SplitSource:
    """Location of the images of one split."""

    path: Path  # a folder, an archive, a CSV file or a Parquet file
    layout: str = "folders"  # one of LAYOUTS; never kaggle, because the splits of Kaggle's layout are folders
    # Folder of the split in a zip archive, with a slash at its end; b"" if the split is the whole archive.
    inside: bytes = b""
    files: tuple[Path, ...] = ()  # WebDataset or Parquet files of the split
    labels: Input | None = None  # label file of val in Kaggle's zip archive


def find_splits(source: Path, split: str | None, layout: str | None = None) -> dict[str, SplitSource]:
    """Find the splits of a SOURCE, and return {split: where its images are}.

    `layout` is one of LAYOUTS, or None to recognize the layout. The splits are the folders `train` and `val` in SOURCE
    or in a zip archive. Archives such as `train.tar` or `ILSVRC2012_img_val.tar` are also splits, and so are files with
    `train` or `val` as a word of their names. If SOURCE has no such folder, archive or file, SOURCE itself is the only
    split. Raises UserError if SOURCE is missing, is neither a folder nor a file, or has another layout than `layout`.
    Also raises UserError if SOURCE lacks the wanted `split`.
    """
    if source.is_file():
        found = _splits_of_file(source, layout)
    elif source.is_dir():
        found = _splits_of_folder(source, layout)
    else:
        raise UserError(f"{source}: {'not a folder or an archive' if source.exists() else 'no such folder'}.")
    if _ONLY_SPLIT in found:
        return {split or _split_named_by(source, found[_ONLY_SPLIT].layout): found[_ONLY_SPLIT]}
    if split is None:
        _report_ignored_folders(source, found)
        return {name: found[name] for name in SPLITS if name in found}
    if split not in found:
        raise UserError(f"--split {split}: {source} has {' and '.join(found)} but no {split}.")
    return {split: found[split]}


def split_source(path: Path, layout: str | None = None) -> SplitSource:
    """Return the location of the images in a folder or an archive that is one split.

    Raises UserError if the folder or archive does not have the layout `layout`, or has several splits.
    """
    found = _splits_of_file(path, layout) if path.is_file() else {_ONLY_SPLIT: _one_folder(path, layout)}
    if _ONLY_SPLIT not in found:
        raise UserError(f"{path}: the splits {' and '.join(found)}, expected one split.")
    return found[_ONLY_SPLIT]


def _split_named_by(source: Path, layout: str) -> str:
    """Return the split that the name of a file or of a folder of Parquet files means. The default is train."""
    (named,) = files_by_split([source]) if source.is_file() else (_ONLY_SPLIT,)
    if layout == "parquet" and named == _ONLY_SPLIT:
        folder = source.resolve().parent if source.is_file() else source.resolve()
        named = split_of_folder(folder.name) or _ONLY_SPLIT
    return named if named in SPLITS else SPLITS[0]


def _splits_of_file(source: Path, layout: str | None) -> dict[str, SplitSource]:
    """Return {split: source}, or {"": source} if the file is a single split."""
    layout = layout or _layout_of_file(source)
    if layout in ("zip", "tiny-imagenet") or (layout == "kaggle" and is_zip(source)):
        found = zip_layout(source)
        where = SplitSource(source, "tiny-imagenet" if found.is_tiny_imagenet else "zip", labels=found.val_labels)
        return {name: replace(where, inside=inside) for name, inside in found.splits.items()} or {_ONLY_SPLIT: where}
    if layout == "csv":
        return dict.fromkeys(csv_splits(source) or [_ONLY_SPLIT], SplitSource(source, "csv"))
    if layout in ("webdataset", "parquet"):
        return {_ONLY_SPLIT: SplitSource(source, layout, files=(source,))}
    if layout != "tar":
        raise UserError(f"--layout {layout}: {source} is a file, expected a folder.")
    return {_ONLY_SPLIT: SplitSource(source, "tar")}


def _layout_of_file(path: Path) -> str:
    with open_regular(path) as file:
        if file.read(4) == b"PAR1":
            return "parquet"
    layout = _SUFFIXES.get(path.suffix.lower(), "tar")
    if layout != "tar":
        return layout
    if is_zip(path):
        return "zip"
    return "webdataset" if is_webdataset(path) else "tar"


def _splits_of_folder(source: Path, layout: str | None) -> dict[str, SplitSource]:
    """Return {split: source}, or {"": source} if the folder is a single split."""
    base = source
    if layout in (None, "kaggle"):
        kaggle = next((source / name for name in _KAGGLE_FOLDERS if (source / name / "train").is_dir()), None)
        if kaggle is None and (source.resolve().name == "CLS-LOC" or layout == "kaggle"):
            kaggle = source
        if layout == "kaggle" and not (kaggle and (kaggle / "train").is_dir()):
            raise UserError(f"--layout kaggle: {source} has no {_KAGGLE_FOLDERS[0]}/train.")
        if kaggle is not None:
            base, layout = kaggle, None
    if layout == "csv" and _files(base, ".csv"):
        return _splits_of_file(_one_folder(base, "csv").path, "csv")
    if layout in (None, "parquet"):
        parquet = parquet_splits(base)
        named = _named_splits(base) if parquet and layout is None else {}
        if parquet and all(name in parquet and parquet[name][0].is_relative_to(path) for name, path in named.items()):
            return {
                name: SplitSource(paths[0].parent, "parquet", files=tuple(paths)) for name, paths in parquet.items()
            }
    named = _named_splits(base)
    if named:
        return {name: _one_path(path, layout) for name, path in named.items()}
    if layout in (None, "webdataset", "parquet"):
        for folder in (base, base / "data"):
            found = _shards_by_split(folder, layout)
            if found:
                return found
    return {_ONLY_SPLIT: _one_folder(base, layout)}


def _named_splits(source: Path) -> dict[str, Path]:
    """Return the folders and archives in `source` that have the name of a split."""
    found = {}
    for name in SPLITS:
        archives = [source / f"ILSVRC2012_img_{name}.tar", *(source / f"{name}{suffix}" for suffix in (".tar", ".zip"))]
        folders = [source / name, source / f"ILSVRC2012_img_{name}"]
        if name == "val" and "train" in found:
            folders.append(source / "validation")
        paths = [path for path in folders if path.is_dir()] + [path for path in archives if path.is_file()]
        if paths:
            found[name] = paths[0]
        if len(paths) > 1:
            left_out = ", ".join(path.name for path in paths[1:])
            say(f"{source}: {name} is read from {paths[0].name}; left out: {left_out}.")
    # Beside many other tars, train.tar may be the tar of a class with the name `train`.
    is_class = any(found[name] == source / f"{name}.tar" for name in found)
    others = [path for path in _files(source, ".tar") if path not in found.values() and "test" not in path.name]
    return {} if is_class and len(others) > len(found) else found


def _one_path(path: Path, layout: str | None) -> SplitSource:
    return split_source(path, layout) if path.is_file() else _one_folder(path, layout)


def _one_folder(path: Path, layout: str | None) -> SplitSource:
    """Return the location of the images in a folder that is one split."""
    if layout is None:
        layout = _layout_of_folder(path)
    if layout in ("class-tars", "webdataset", "parquet", "csv"):
        suffix = {"parquet": ".parquet", "csv": ".csv"}.get(layout, ".tar")
        files = _files(path, suffix)
        if not files or (layout == "csv" and len(files) > 1):
            expected = "one file" if layout == "csv" else "files"
            raise UserError(f"--layout {layout}: {path} has {len(files)} files {suffix}; expected {expected}.")
        return SplitSource(files[0] if layout == "csv" else path, layout, files=tuple(files))
    if layout in ("tar", "zip"):
        raise UserError(f"--layout {layout}: {path} is a folder, expected a file.")
    return SplitSource(path, layout)


def _layout_of_folder(path: Path) -> str:
    folders, files = _scan(path)
    if "val_annotations.txt" in files:
        return "tiny-imagenet"
    first = path / folders[0] if folders else path
    if folders and (first / "images").is_dir() and any(first.glob("*_boxes.txt")):
        return "tiny-imagenet"
    if not folders and not any(may_be_image(os.fsencode(name)) for name in files):
        refuse_unreadable([path / name for name in files], "")
    tars = [name for name in files if name.lower().endswith(".tar")]
    if tars and not folders:
        return "webdataset" if is_webdataset(path / tars[0]) else "class-tars"
    is_parquet = not folders and any(name.lower().endswith(".parquet") for name in files)
    return "parquet" if is_parquet else "folders"


def _shards_by_split(folder: Path, layout: str | None) -> dict[str, SplitSource]:
    """Return the splits of a folder with WebDataset or Parquet files; {} if there are no such files."""
    found: dict[str, SplitSource] = {}
    for kind, suffix in (("parquet", ".parquet"), ("webdataset", ".tar")):
        files = _files(folder, suffix) if layout in (None, kind) else []
        if not files or (layout is None and kind == "webdataset" and not is_webdataset(files[0])):
            continue
        if layout is None and kind == "parquet" and _layout_of_folder(folder) != "parquet":
            continue  # the files describe images in class folders
        groups = files_by_split(files)
        left_out = [path for name, paths in groups.items() if name not in SPLITS for path in paths]
        found = {name: SplitSource(folder, kind, files=tuple(groups[name])) for name in SPLITS if name in groups}
        if not found:
            return {_ONLY_SPLIT: SplitSource(folder, kind, files=tuple(files))}
        if left_out:
            count = count_noun(len(left_out), "file")
            say(f"{folder}: left out {count} outside train and val (first: {left_out[0].name}).")
        break
    return found


def _scan(folder: Path) -> tuple[list[str], list[str]]:
    """Return two sorted lists of names in `folder`: the folders that may be classes, and the files.

    Hidden names are left out.
    """
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                if not is_no_class_folder(os.fsencode(entry.name)):
                    folders.append(entry.name)
            elif not entry.name.startswith("."):
                files.append(entry.name)
    return sorted(folders), sorted(files)


def _files(folder: Path, suffix: str) -> list[Path]:
    """Return the files in `folder` whose names end with `suffix`, sorted; [] if the folder does not exist."""
    names = _scan(folder)[1] if folder.is_dir() else []
    return [folder / name for name in names if name.lower().endswith(suffix) and (folder / name).is_file()]


def _report_ignored_folders(source: Path, found: dict[str, SplitSource]) -> None:
    """If only one split was found, print which other folders are ignored, because the folder `train` may be a class."""
    paths: Sequence[Path] = [where.path for where in found.values()]
    if (
        len(found) < len(SPLITS)
        and source.is_dir()
        and all(path.parent == source for path in paths)
        and not any(where.files for where in found.values())
    ):
        names = (*SPLITS, "test", "validation")
        others = [name for name in _scan(source)[0] if name not in names]
        if others:
            taken = " and ".join(path.name for path in paths)
            say(
                f"{source}: building from {taken}; ignoring {count_noun(len(others), 'other folder')} (first: "
                f"{others[0]}). If all of these folders are classes, move them into one folder named train."
            )

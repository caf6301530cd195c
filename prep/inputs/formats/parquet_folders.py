"""Finds the splits in folders of Parquet files that have one of the layouts of huggingface.co.

data/SPLIT-00000-of-00002-HASH.parquet     a repository of the library `datasets`
SPLIT/0000.parquet                         a folder for each split
CONFIG/SPLIT/0000.parquet                  the branch refs/convert/parquet, which huggingface.co makes itself
CONFIG/NAME-SPLIT-00000-of-00002.parquet   the same branch until 2023

A folder called `partial-train` has only the first gigabytes of the split train.
"""

from __future__ import annotations

import os
from itertools import islice
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.classes import examples, has_image_name, is_no_class_folder
from prep.inputs.formats.shards import files_by_split, split_of_folder
from prep.store.manifest import SPLITS

_MAX_CONFIGS = 100  # a folder with more subfolders is not searched for configurations
_MAX_ENTRIES = 10_000  # if a folder's first 10,000 entries include no Parquet file, it counts as having none
_PARTIAL = "partial-"


def parquet_splits(source: Path) -> dict[str, list[Path]]:
    """Return {split: Parquet files} of the splits train and val. All files of a split are in one folder.

    Returns {} if no file or folder has the name of a split. Prints which other splits are left out, and whether only a
    part of a split exists. Raises UserError if there are several configurations.
    """
    folders = [path for path in _folders(source) if split_of_folder(path.name.removeprefix(_PARTIAL)) is None]
    found = _splits_in(source) or _splits_in(source / "data")
    if not found and len(folders) <= _MAX_CONFIGS:
        configs = {path: splits for path in folders if (splits := _splits_in(path))}
        if len(configs) > 1:
            raise UserError(
                f"{source}: Parquet files of {len(configs)} configurations ({examples([c.name for c in configs])}). "
                f"Name one configuration as SOURCE, such as {next(iter(configs))}."
            )
        found = next(iter(configs.values()), {})
    _report_left_out(source, found)
    for name in SPLITS:
        files = found.get(name, [])
        if files and files[0].parent.name.startswith(_PARTIAL):
            say(f"{files[0].parent}: only a part of the split {name}; huggingface.co has not converted the rest.")
    return {name: found[name] for name in SPLITS if name in found}


def _report_left_out(source: Path, found: dict[str, list[Path]]) -> None:
    left_out = [path for name, files in found.items() if name not in SPLITS for path in files]
    if left_out and any(name in found for name in SPLITS):
        first = left_out[0].relative_to(source)
        say(f"{source}: left out {count_noun(len(left_out), 'Parquet file')} outside train and val (first: {first}).")


def _splits_in(folder: Path) -> dict[str, list[Path]]:
    """Return {split: files} of a folder; the key is train, val or test, or "" for files without the name of a split.

    Returns {} if neither a file nor a folder has the name of a split.
    """
    direct = files_by_split(_parquet_files(folder)) if folder.is_dir() else {}
    found: dict[str, list[Path]] = {}
    for below in _folders(folder):
        split = split_of_folder(below.name.removeprefix(_PARTIAL))
        files = _parquet_files(below) if split is not None and not _folders(below) else []
        if split is not None and files:
            if split in found:
                raise UserError(
                    f"{folder}: Parquet files of {split} in {found[split][0].parent.name} and in {below.name}. Name "
                    "one of these folders as SOURCE, with --split."
                )
            found[split] = files
    if set(direct) != {""} and not set(found) & set(direct):
        found |= direct
    return found


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder, sorted, without hidden folders."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not is_no_class_folder(os.fsencode(entry.name))]
    return [folder / name for name in sorted(names)]


def _parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files in a folder, sorted.

    Returns [] if the folder contains images, too, because the Parquet files then only describe these images.
    """
    with os.scandir(folder) as entries:
        first = list(islice(entries, _MAX_ENTRIES))
        if not any(entry.name.lower().endswith(".parquet") for entry in first):
            return []
        files = [entry.name for entry in (*first, *entries) if entry.name[0] != "." and entry.is_file()]
    if any(has_image_name(os.fsencode(name)) for name in files):
        return []
    return [folder / name for name in sorted(files) if name.lower().endswith(".parquet")]

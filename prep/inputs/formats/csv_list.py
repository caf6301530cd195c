"""A CSV file of paths and labels, separated by commas, tabs or semicolons, with or without a header.

Paths are relative to the folder of the CSV file. A column `split` assigns each row to train or val. The name of an
input is its path below the deepest folder that contains all images of the split. A CSV file that lists the files of
class folders therefore gives the same records as these folders.
"""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from prep.console import UserError, count_noun, progress, say
from prep.inputs.classes import examples, has_image_name
from prep.inputs.folder import FolderReader
from prep.inputs.formats.labelled import LabelledRows
from prep.inputs.labels.csv_table import LABEL_NAMES, PATH_NAMES, SPLIT_NAMES, SPLITS_BY_NAME, ragged_row, read_rows
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs, ListOptions
from prep.store.manifest import SPLITS

_NO_CSV = "Expected rows of `path,label`, for example `cat/1.jpg,cat`, with or without a header."


def csv_splits(path: Path) -> list[str]:
    """Return which of the splits train and val occur in the column `split`; [] if there is no such column.

    Prints how many rows are left out because they belong to other splits. Raises UserError if no row belongs to train
    or val.
    """
    counts = Counter(split for _, _, _, split in _rows(path, tell=True))
    others = {name: count for name, count in counts.items() if name not in ("", *SPLITS_BY_NAME.values())}
    if others and len(others) == len(counts):
        raise UserError(
            f"{path}: the column of the splits has the values {examples(list(others))}; expected train and val. "
            "Correct the values, or give the column another name if it does not contain splits."
        )
    if others:
        say(f"{path}: left out {count_noun(sum(others.values()), 'row')} of other splits ({examples(list(others))}).")
    return [split for split in ("train", "val") if split in counts]


def list_csv(
    path: Path, split: str, options: ListOptions, store_classes: Sequence[str]
) -> tuple[FolderReader, FoundInputs]:
    """List the images that a CSV file names. An image that is missing is added to `FoundInputs.refused`.

    Raises UserError if the file is no CSV of paths and labels, or if no image has a label.
    """
    origin = path.absolute().parent
    images, others = [], []
    for _, name, label, row_split in _rows(path):
        if row_split in ("", split):
            images.append((name, label))
        elif row_split not in SPLITS:
            others.append(row_split)
    if others:
        say(f"{path}: left out {count_noun(len(others), 'row')} outside train and val (column split: {others[0]}).")
    if images and all(has_image_name(os.fsencode(label)) for _, label in images):
        raise UserError(f"{path}: two paths in each row, such as {name_text(images[0][0])}, {images[0][1]}. {_NO_CSV}")
    folders = {os.path.dirname(os.path.normpath(os.path.join(os.fsencode(origin), name))) for name, _ in images}
    root = os.path.commonpath(folders) if folders else os.fsencode(origin)
    rows = LabelledRows(str(path))
    with progress(f"{split}: listing", len(images), "files") as listing_progress:
        for name, label in images:
            full = os.path.normpath(os.path.join(os.fsencode(origin), name))
            shown = full[len(root.rstrip(b"/")) + 1 :]
            listing_progress.advance()
            try:
                status = os.stat(full)
            except OSError as error:
                rows.refuse(shown, label, f"cannot be read: {error.strerror or error}")
                continue
            except ValueError:
                rows.refuse(shown, label, "a NUL byte in its path")
                continue
            if not stat.S_ISREG(status.st_mode):
                rows.refuse(shown, label, "not a file")
                continue
            rows.add(shown, label, status.st_size, status.st_mtime_ns)
    found = rows.found((), options, store_classes, in_class_folders=False, are_positions=False)
    return FolderReader(Path(os.fsdecode(root))), found


def _rows(path: Path, tell: bool = False) -> Iterator[tuple[int, bytes, str, str]]:
    """Yield line number, path, label and split of each row. The split is empty if the file has no column of splits.

    If `tell` is true, prints a message if a header is recognized.
    """
    columns, width = None, 0
    for line, row in read_rows(path, str(path), _NO_CSV):
        cells = [cell.strip() for cell in row]
        if columns is None:
            columns, is_header = _columns(path, cells)
            width = len(cells)
            if is_header:
                if tell:
                    paths, labels = cells[columns[0]], cells[columns[1]]
                    say(f"{path}: header recognized; paths in column {paths}, labels in column {labels}.")
                continue
        if len(cells) <= max(columns) or any(cells[width:]):
            raise ragged_row(str(path), line, len(cells), width, _NO_CSV)
        split = cells[columns[2]].lower() if columns[2] >= 0 else ""
        if columns[2] >= 0 and not split:
            raise UserError(f"{path}, line {line}: no split in this row; expected train or val.")
        label = name_text(os.fsencode(cells[columns[1]]))
        yield line, os.fsencode(cells[columns[0]]), label, SPLITS_BY_NAME.get(split, split)


def _columns(path: Path, cells: Sequence[str]) -> tuple[tuple[int, int, int], bool]:
    """Return the indices of the columns of paths, labels and splits, and whether the first row, `cells`, is a header.

    The index of the column of splits is −1 if there is no such column.
    """
    names = [cell.strip("# ").lower() for cell in cells]

    def find(wanted: Sequence[str]) -> int:
        return next((names.index(name) for name in wanted if name in names), -1)

    columns = find(PATH_NAMES), find(LABEL_NAMES), find(SPLIT_NAMES)
    if columns[0] >= 0 and columns[1] >= 0:
        return columns, True
    is_image = [has_image_name(os.fsencode(cell)) for cell in cells]
    if len(cells) < 2 or not any(is_image):
        raise UserError(f"{path}: the first row is {', '.join(cells)!r:.80}. {_NO_CSV}")
    if is_image[0] and not any(cells[2:]):
        return (0, 1, -1), False
    if is_image[0]:
        raise UserError(
            f"{path}: {len(cells)} columns without a header, so it is unclear which of them has the labels. Write a "
            "first row such as path,width,height,label, or keep two columns: path, label."
        )
    raise UserError(f"{path}: the path comes after the label in the first row, {', '.join(cells)!r:.80}. {_NO_CSV}")

"""Reads the rows of a CSV file with commas, tabs or semicolons, and lists the usual names of its columns."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from prep.console import UserError
from prep.inputs.classes import has_image_name
from prep.schema import open_regular

PATH_NAMES = ("path", "file", "filename", "file_name", "filepath", "file_path", "image", "image_path", "img", "images")
LABEL_NAMES = (
    "label",
    "labels",
    "class",
    "class_name",
    "category",
    "target",
    "y",
    "class_id",
    "class_index",
    "synset",
)
SPLIT_NAMES = ("split", "set", "subset", "partition", "fold")
SPLITS_BY_NAME = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


def read_rows(path: Path, where: str, expected: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the row's last line, cells) for each row. Empty rows and comments are left out.

    A byte that is not UTF-8 becomes a surrogate. Raises UserError if the file cannot be read, or is no CSV. The message
    begins with `where`. The message for a file that is no CSV ends with the sentence `expected`.
    """
    try:
        with TextIOWrapper(open_regular(path), "utf-8-sig", "surrogateescape", newline="") as file:
            first_line = next((line for line in file if line.strip() and not line.startswith("#")), "")
            file.seek(0)
            delimiter = max("\t;,", key=first_line.count)
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            for row in reader:
                if any(cell.strip() for cell in row) and not _is_comment(row[0].strip()):
                    yield reader.line_num, row
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}.") from None
    except csv.Error as error:
        raise UserError(f"{where}: {error}. {expected}") from None


def ragged_row(where: str, line: int, found: int, width: int, expected: str) -> UserError:
    """Return the error for a row that has another number of columns than the first row."""
    return UserError(
        f"{where}, line {line}: {found} columns, but the first row has {width}. {expected} Put quotes around a text "
        "that contains the separator."
    )


def _is_comment(cell: str) -> bool:
    """Return whether a row with the first cell `cell` is a comment.

    The first cell of a comment begins with `#`, and is neither the name of an image nor the name of a column.
    """
    return (
        cell.startswith("#")
        and not has_image_name(os.fsencode(cell))
        and cell.strip("# ").lower() not in (*PATH_NAMES, *LABEL_NAMES)
    )

"""Parses label files: `name label` on each line, or one label on each line.

The columns are separated by tabs, commas, semicolons, bars or blanks, and may be quoted. The separator and the column
of names are those with which most names of images are found. Names and classes may therefore contain blanks and commas.
A first line that is a header is recognized. Kaggle's LOC_val_solution.csv, in which bounding boxes follow the labels,
is read as well.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from prep.console import UserError, count_noun
from prep.inputs.classes import examples, has_image_name, is_number
from prep.inputs.names import composed, name_text

_SAMPLED_LINES = 2000  # number of lines from which the separator and the columns are found
NAME_HEADERS = {
    *("name", "names", "file", "files", "filename", "filenames", "file_name", "file name", "filepath", "file_path"),
    *("path", "paths", "image", "images", "img", "image_id", "imageid", "image_name", "imagename", "image_path", "id"),
    *("photo", "photograph", "picture", "filename/path", "image_file", "key"),
}
_LABEL_HEADERS = {
    *("label", "labels", "class", "classes", "class_id", "classid", "class_name", "classname", "category", "target"),
    *("category_id", "category_name", "label_id", "label_name", "labelname", "synset", "wnid", "predictionstring", "y"),
    *("species", "breed", "tag", "prediction", "ground_truth", "groundtruth", "class_label", "classlabel", "target_id"),
}
_EXTENSIONS = {b".jpeg": ".jpg", b".jpe": ".jpg", b".jfif": ".jpg", b".tiff": ".tif"}
_KAGGLE_BOXES = re.compile(r"(\S+)(?:\s+-?[\d.]+){4}\s*")  # the class, then x_min y_min x_max y_max of a box


@dataclass(frozen=True)
class Row:
    """One line of a label file."""

    line: int  # number of the line, from 1
    name: str  # name of the image as the file spells it; empty if the file has only labels
    label: str  # text of the label; bytes that are not UTF-8 are escaped, as in the names of class folders
    is_repeated: bool = False  # a later line has the same image and label
    # True if blanks separate the columns, and the label has several words without quotes. The words after the first may
    # then be further columns.
    has_blanks: bool = False


class ImageNames:
    """Finds images by the names in a label file.

    A name in the label file may lack the folders or the extension of the image. The label file may spell the extension
    (`.JPEG` for `.jpg`) and letters with accents in another way than the name of the image.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self._by_name = {name: name for name in names}
        # Name without extension -> image; None if several images have this name.
        self._by_stem: dict[bytes, bytes | None] = {}
        for name in names:
            stem = os.path.splitext(name)[0]
            self._by_stem[stem] = None if stem in self._by_stem else name

    def find(self, text: str) -> bytes | None:
        """Return the image with this name.

        Returns None if there is no such image, or if the name without extension fits several images.
        """
        raw = os.fsencode(text)
        base = raw.rsplit(b"/", 1)[-1]
        for name in (raw, base, raw.replace(b"\\", b"/").rsplit(b"/", 1)[-1]):
            if name in self._by_name:
                return name
        found = self._by_stem.get(base) or self._by_name.get(os.path.splitext(base)[0])
        return found or self._by_spelling.get(common_spelling(base))

    @cached_property
    def _by_spelling(self) -> dict[str, bytes | None]:
        by_spelling: dict[str, bytes | None] = {}
        for name in self._by_name:
            by_spelling[common_spelling(name)] = None if common_spelling(name) in by_spelling else name
        return by_spelling

    @cached_property
    def have_hashes(self) -> bool:
        """Return whether the name of an image begins with `#`. A line that begins with `#` is then not a comment."""
        return any(name.startswith(b"#") for name in self._by_name)

    def score(self, text: str) -> int:
        """Return 2 if the text is the name of an image, 1 if it is such a name without the extension, otherwise 0."""
        found = self.find(text)
        return 0 if found is None else 1 + (os.path.splitext(found)[1] in os.fsencode(text)[-8:])


def common_spelling(name: bytes) -> str:
    """Return the name in a common spelling: Unicode's composed form, `.jpg` for `.JPEG`, `.tif` for `.TIFF`."""
    stem, extension = os.path.splitext(name)
    extension = extension.lower()
    text = stem.decode("utf-8", "surrogateescape") + _EXTENSIONS.get(extension, os.fsdecode(extension))
    return composed(text)


@dataclass(frozen=True)
class Rows:
    """The rows of a label file, and messages about the file for the user."""

    rows: list[Row]
    has_names: bool
    notes: list[str]


def parse_label_file(file: Path, content: bytes, images: ImageNames) -> Rows:
    """Return the rows of a label file. Raises UserError, which names `file`, if the format of the file is not known."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in content[:1000]:
        raise UserError(f"--labels {file}: not UTF-8 text. Save the file as text in UTF-8.")
    text = content.decode("utf-8-sig", "surrogateescape")
    written = [(number, line) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), 1) if line.strip()]
    lines = [(number, line) for number, line in written if images.have_hashes or not _is_comment(line)]
    if not lines:
        raise UserError(f"--labels {file}: the file is empty.")
    is_single = all(_is_single(line) for _, line in lines[1:]) and (len(lines) > 1 or _is_single(lines[0][1]))
    rows = _single_column(file, lines, images) if is_single else _name_and_label(file, lines, images)
    if len(lines) == len(written):
        return rows
    note = f"left out {count_noun(len(written) - len(lines), 'line')} with a comment (#)"
    return replace(rows, notes=[note, *rows.notes])


def _is_comment(line: str) -> bool:
    """Return whether a line begins with `#` and is not a header such as `#filename label`."""
    words = re.split(r"[\s,;|]+", line.strip("# \t").lower())
    return line.lstrip().startswith("#") and not all(word in NAME_HEADERS | _LABEL_HEADERS for word in words)


def _class_text(text: str) -> str:
    return name_text(os.fsencode(text.strip()))


def _is_single(line: str) -> bool:
    """Return whether a line has one column."""
    return len(re.split(r"[\s,;|]+", re.sub(r'"[^"]*"', '""', line.strip().rstrip(",;")))) == 1


def _single_column(file: Path, lines: Sequence[tuple[int, str]], images: ImageNames) -> Rows:
    """Return the rows of a file with only a label on each line, such as ILSVRC's ground truth."""
    rows = [Row(number, "", _class_text(line.strip().rstrip(",;").strip("\"'"))) for number, line in lines]
    notes = []
    if len(rows) > 1 and not is_number(rows[0].label) and all(is_number(row.label) for row in rows[1:]):
        first = rows[0].label.lower()
        if first in _LABEL_HEADERS or first.isalpha():
            notes.append(f"line {rows[0].line} is taken as a header: {rows[0].label[:60]}")
            rows = rows[1:]
    if all(images.find(row.label) is not None for row in rows) and not all(is_number(row.label) for row in rows):
        raise UserError(
            f"--labels {file}: the lines are names of images without labels. Expected `name label` on each line."
        )
    if any(is_number(row.label) for row in rows):
        wrong = next((row for row in rows if not is_number(row.label) or int(row.label) < 0), None)
        if wrong:
            raise UserError(
                f"--labels {file}, line {wrong.line}: {wrong.label[:40]!r}, expected a whole number that is not "
                "negative, or `name label` on each line."
            )
    return Rows(rows, False, notes)


def _name_and_label(file: Path, lines: Sequence[tuple[int, str]], images: ImageNames) -> Rows:
    """Return the rows of a file with the name and the label of an image on each line."""
    sample = lines[:: max(1, len(lines) // _SAMPLED_LINES)][-_SAMPLED_LINES:]
    best, table, columns = -1, [], [0]
    for delimiter in ("\t", ",", ";", "|", ""):
        found = _without_empty_columns(list(_split(sample, delimiter, images)))
        width = min((len(row) for _, row in found), default=0)
        if width < 2:
            continue
        scores = [sum(images.score(row[k]) for _, row in found) for k in range(width)]
        if max(scores) > best:
            best, chosen, columns = max(scores), delimiter, scores
    if best < 0:
        are_single = [_is_single(line) for _, line in lines]
        # The error shows the first line of the rarer kind: with one column if most lines have several, and vice versa.
        odd = 2 * sum(are_single) < len(lines)
        number, line = lines[are_single.index(odd)] if odd in are_single else lines[0]
        raise UserError(f"--labels {file}, line {number}: {line[:60]!r}, expected `name label`.")
    table = _without_empty_columns(list(_split(lines, chosen, images)))
    ragged = next(((number, row) for number, row in table if len(row) < 2), None)
    if ragged:
        raise UserError(f"--labels {file}, line {ragged[0]}: {' '.join(ragged[1])[:60]!r}, expected `name label`.")
    name_column = columns.index(best)
    if best == 0:
        raise UserError(
            f"--labels {file}: no line names an image. The file has names such as "
            f"{examples([row[0] for _, row in table[:3]])}; the images have names such as {images_text(images)}."
        )
    header = table[0][1] if _is_header([row for _, row in table[:50]], name_column, images) else None
    label_column = _label_column(file, header, len(table[0][1]), name_column)
    notes = [f"line {table[0][0]} is taken as a header: {', '.join(header)[:80]}"] if header else []
    rows = [
        Row(number, row[name_column], _class_text(row[label_column]) if label_column < len(row) else "")
        for number, row in table[1 if header else 0 :]
    ]
    empty = next((row for row in rows if not row.label), None)
    if empty:
        raise UserError(f"--labels {file}, line {empty.line}: {empty.name[:60]!r} has no label, expected `name label`.")
    if chosen == "" and any(" " in row.label for row in rows) and all(is_number(row.label.split()[0]) for row in rows):
        raise UserError(
            f"--labels {file}, line {rows[0].line}: {rows[0].label[:60]!r} follows the name {rows[0].name[:60]}. "
            "Expected `name label`, without further columns."
        )
    rows = _without_boxes(file, rows)
    if chosen == "":
        quoted = {number for number, line in lines if line.rstrip().endswith('"')}
        rows = [replace(row, has_blanks=len(row.label.split()) > 1 and row.line not in quoted) for row in rows]
    if all(has_image_name(os.fsencode(row.label)) for row in rows):
        raise UserError(
            f"--labels {file}, line {rows[0].line}: {rows[0].name[:60]}, {rows[0].label[:60]}: two names of images. "
            "Expected `name label`."
        )
    if header is None:
        _refuse_unknown_header(file, rows, images)
    return Rows(rows, True, notes)


def _refuse_unknown_header(file: Path, rows: Sequence[Row], images: ImageNames) -> None:
    """Raise UserError if the first line may be a header with unknown names of columns.

    The first line may be a header if all other lines name images, the first line names no image, and no other line has
    the label of the first line.
    """
    first, others = rows[0], rows[1:]
    if "." in first.name or images.find(first.name) is not None or any(row.label == first.label for row in others):
        return
    if others and all(images.find(row.name) is not None for row in others):
        raise UserError(
            f"--labels {file}, line {first.line}: no image is called {first.name[:60]}, and no other line has the "
            f"label {first.label[:60]}. If this line has the names of the columns, call the columns filename and "
            "label; otherwise remove the line."
        )


def images_text(images: ImageNames) -> str:
    """Return examples of the images' names for a message."""
    return examples([name_text(name) for name in images._by_name])


def _split(lines: Sequence[tuple[int, str]], delimiter: str, images: ImageNames) -> Iterator[tuple[int, list[str]]]:
    """Yield the line number and the columns of each line.

    With the delimiter "", a line has two columns with blanks between them.
    """
    if not delimiter:
        yield from ((number, _split_at_blanks(line.strip(), images)) for number, line in lines)
        return
    reader = csv.reader((line + "\n" for _, line in lines), delimiter=delimiter, skipinitialspace=True)
    try:
        for row in reader:
            yield lines[reader.line_num - 1][0], [field.strip() for field in row]
    except csv.Error:  # the text is not a table with this delimiter: for example, a field has more than 128 KiB
        yield lines[0][0], []


def _without_empty_columns(table: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Return the rows without the columns that are empty in every row.

    For example, a comma at the end of each line makes an empty column.
    """
    width = max((len(row) for _, row in table), default=0)
    empty = [k for k in range(width) if not any(row[k] for _, row in table if k < len(row))]
    if not empty:
        return table
    return [(number, [field for k, field in enumerate(row) if k not in empty]) for number, row in table]


def _split_at_blanks(line: str, images: ImageNames) -> list[str]:
    """Return the two columns of a line. A column is in quotes, or is the name of an image, or has no blanks."""
    quoted = re.fullmatch(r"\"([^\"]*)\"\s+(.*)|(\S+)\s+\"([^\"]*)\"", line)
    if quoted:
        return [(quoted[1] or quoted[3] or "").strip(), (quoted[2] or quoted[4] or "").strip(' "')]
    cuts = [match.span() for match in re.finditer(r"\s+", line)]
    pairs = [[line[:start], line[end:]] for start, end in reversed(cuts)]
    if len(pairs) > 50:  # a line with so many blanks is not a line of a label file
        return [line]
    for column in (0, 1):
        named = next((pair for pair in pairs if images.find(pair[column]) is not None), None)
        if named:
            return named
    return pairs[0] if pairs else [line]


def _is_header(rows: Sequence[Sequence[str]], name_column: int, images: ImageNames) -> bool:
    """Return whether the first row has the names of the columns, such as `filename label`, and not an image."""
    first = [field.strip("# ").lower() for field in rows[0]]
    name, others = first[name_column], first[:name_column] + first[name_column + 1 :]
    if images.find(rows[0][name_column]) is not None or has_image_name(name.encode(errors="replace")):
        return False
    if name in NAME_HEADERS or any(field in _LABEL_HEADERS for field in others):
        return True
    if "." not in name and len(rows) > 1 and all(has_image_name(os.fsencode(row[name_column])) for row in rows[1:]):
        return True  # all other names have the extension of an image
    below = [field for row in rows[1:] for k, field in enumerate(row) if k != name_column]
    return len(rows) > 1 and all(is_number(field) for field in below) and not any(is_number(field) for field in others)


def _label_column(file: Path, header: Sequence[str] | None, width: int, name_column: int) -> int:
    """Return the index of the column of the labels.

    Raises UserError if it is unclear which column has the labels, or if the labels come before the names.
    """
    named = [
        k for k, text in enumerate(header or ()) if text.strip("# ").lower() in _LABEL_HEADERS and k != name_column
    ]
    if len(named) == 1:
        return named[0]
    if width == 2 and name_column == 0:
        return 1
    if width == 2:
        raise UserError(
            f"--labels {file}: the label stands before the name on each line. Expected `name label`: exchange the two "
            "columns, or write a header line with the names of the columns, such as label,filename."
        )
    raise UserError(
        f"--labels {file}: {width} columns, and the column of the labels is unclear. Write a header line in which one "
        "column is called label, or keep two columns: name, label."
    )


def _without_boxes(file: Path, rows: list[Row]) -> list[Row]:
    """Return the rows of Kaggle's LOC_val_solution.csv without the bounding boxes after the labels.

    Rows of other files are returned unchanged.
    """
    if not all(_KAGGLE_BOXES.match(row.label) for row in rows):
        return rows
    found = []
    for row in rows:
        classes = sorted(set(_KAGGLE_BOXES.findall(row.label)))
        if re.sub(_KAGGLE_BOXES, "", row.label).strip():
            return rows
        if len(classes) > 1:
            raise UserError(
                f"--labels {file}, line {row.line}: {row.name} has the classes {examples(classes)}. Expected one class."
            )
        found.append(Row(row.line, row.name, classes[0]))
    return found

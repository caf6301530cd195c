"""Reads the CSV files of `alexprep build-lmdb --extra FIELD=CSV`. Each row has the path and the value of one image.

The first row has the names of the columns. The column of the paths has a name such as path, file or image. A column
`split` assigns each row to a split. The value is in the column FIELD, or in the columns FIELD.0, FIELD.1 and so on. If
the file has no such column, all columns except those of the paths and splits hold the value. One column gives the type
int (whole numbers), float (other numbers) or text. Several columns must hold numbers, and give the type vector.
"""

from __future__ import annotations

import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prep.console import UserError, WrongArgument
from prep.inputs.classes import examples
from prep.inputs.labels.csv_table import PATH_NAMES, SPLITS_BY_NAME, ragged_row, read_rows
from prep.inputs.labels.label_file import NAME_HEADERS
from prep.store.extra import Column
from prep.store.models import EXTRA_TYPES, MAX_WIDTH

_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_WHOLE = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", re.IGNORECASE)
_NOT_FINITE = re.compile(r"[-+]?(nan|inf|infinity)", re.IGNORECASE)
_MAX_FLOAT = 2.0**128 - 2.0**103  # smallest number that float32 rounds to infinity
_EXPECTED = "Expected a first row with the names of the columns, such as path,age, and then rows such as cat/1.jpg,3."


class ExtraOption(NamedTuple):
    """One value of --extra."""

    field: str
    type: str | None  # one of EXTRA_TYPES; if None, the values in the file give the type
    path: Path

    @property
    def where(self) -> str:
        """The beginning of an error message."""
        return f"--extra {self.field}={self.path}"


class Row(NamedTuple):
    """The path and the value of one image."""

    line: int  # number of the last line of the row, from 1
    name: str  # path of the image as the file spells it
    split: str  # "train", "val", another split, or "" if the file has no column `split`
    cells: list[str]  # texts in the columns that hold the value


def parse_extra(texts: tuple[str, ...]) -> list[ExtraOption]:
    """Parse the values of --extra, such as `age:int=ages.csv`.

    Raises WrongArgument if a value has another form, if its type or FIELD is not allowed, or if a FIELD occurs twice.
    """
    options: dict[str, ExtraOption] = {}
    for text in texts:
        name, separator, path = text.partition("=")
        field, has_type, type_ = name.partition(":")
        if not separator or not path:
            raise WrongArgument(f"--extra {text}: expected FIELD=CSV or FIELD:TYPE=CSV, for example age=ages.csv.")
        check_field(field, f"--extra {text}")
        if has_type and type_ not in EXTRA_TYPES:
            raise WrongArgument(f"--extra {text}: type {type_!r}, expected one of {', '.join(EXTRA_TYPES)}.")
        if field in options:
            raise WrongArgument(
                f"--extra {text}: the field {field} is given twice. Name one file for all splits, or build each split "
                "with --split and its own file."
            )
        options[field] = ExtraOption(field, type_ if has_type else None, Path(path))
    return list(options.values())


def check_field(name: str, where: str) -> None:
    """Raise WrongArgument if a field cannot have this name. The message begins with `where`."""
    if not _FIELD.fullmatch(name):
        raise WrongArgument(f"{where}: expected an identifier of up to 64 letters, digits and _ as FIELD, such as age.")
    if name in ("path", "split"):
        raise WrongArgument(f"{where}: the column {name} of a CSV file has another meaning. Choose another FIELD.")


@dataclass(frozen=True)
class ValueTable:
    """The rows of a CSV file. To save memory, the paths are one array of bytes."""

    where: str
    column: Column  # one value for each row
    lines: array[int]  # for each row, the number of its last line, from 1
    _names: bytes
    _ends: array[int]
    _splits: list[str]  # split of each row; empty if the file has no column `split`

    def __len__(self) -> int:
        return len(self.lines)

    def name(self, row: int) -> str:
        """Return the path of a row as the file spells it. A byte that is not UTF-8 becomes a surrogate."""
        return os.fsdecode(self._names[self._ends[row - 1] if row else 0 : self._ends[row]])

    def split(self, row: int) -> str:
        """Return the split that the file gives for a row; empty if the file has no column `split`."""
        return self._splits[row] if self._splits else ""

    @staticmethod
    def read(option: ExtraOption) -> ValueTable:
        """Read a CSV file. If the option gives no type, the file is read twice.

        Raises UserError, with the line of the fault, if the file cannot be read, if a row has no path, or if a value is
        wrong.
        """
        type_, width = option.type, _width(option)
        type_ = type_ or _type_of(option, width)
        names, ends, lines, splits = bytearray(), array("q"), array("q"), []
        values = _Values(option, type_)
        for row in _rows(option):
            if not row.name:
                raise UserError(f"{option.where}, line {row.line}: no path of an image. {_EXPECTED}")
            values.add(row)
            names += os.fsencode(row.name)
            ends.append(len(names))
            lines.append(row.line)
            if row.split:
                splits.append(row.split)
        if not lines:
            raise UserError(f"{option.where}: the file has no rows. {_EXPECTED}")
        return ValueTable(option.where, values.column(width), lines, bytes(names), ends, splits)


def _width(option: ExtraOption) -> int:
    """Return the number of columns of a vector; 0 if the value is in a single column that is not FIELD.0."""
    rows = _rows(option, with_header=True)
    header = next(rows).cells
    width = 0 if len(header) == 1 and header[0] != f"{option.field}.0" else len(header)
    if width > MAX_WIDTH:
        raise UserError(f"{option.where}: {width:,} columns of values, expected at most {MAX_WIDTH:,}.")
    if width and option.type not in (None, "vector"):
        raise UserError(
            f"{option.where}: type {option.type} with {width} columns of values ({examples(header)}). Give the column "
            f"of the value the name {option.field}, or leave out the type."
        )
    return width


def _type_of(option: ExtraOption, width: int) -> str:
    """Return the type that all values have."""
    is_whole = True
    for row in _rows(option):
        for cell in row.cells:
            text = cell.strip()
            if text and is_whole and not _WHOLE.fullmatch(text):
                is_whole = False
            if text and not is_whole and not (_NUMBER.fullmatch(text) or _NOT_FINITE.fullmatch(text)):
                if not width:
                    return "text"
                raise UserError(
                    f"{option.where}, line {row.line}: {text[:40]!r} in one of {width} columns of values, "
                    f"expected numbers in all of them. Give the column of the value the name {option.field}."
                )
    return "vector" if width else "int" if is_whole else "float"


class _Values:
    """The values of the rows that were read so far."""

    def __init__(self, option: ExtraOption, type_: str) -> None:
        self._option, self._type = option, type_
        self._numbers: array[Any] = array("q" if type_ == "int" else "f")
        self._bytes, self._ends = bytearray(), array("q", [0])
        self._parse: Callable[[Row, str], float] = self._whole if type_ == "int" else self._number

    def add(self, row: Row) -> None:
        """Add the value of a row. Raises UserError if the value does not have the type of the field."""
        if self._type == "text":
            try:
                self._bytes += row.cells[0].encode()
            except UnicodeEncodeError:
                raise UserError(f"{self._where(row)}: not UTF-8 text. Save the file as text in UTF-8.") from None
            self._ends.append(len(self._bytes))
            return
        for cell in row.cells:
            self._numbers.append(self._parse(row, cell.strip()))

    def column(self, width: int) -> Column:
        """Return the column of all values."""
        if self._type == "text":
            return Column("text", np.frombuffer(self._bytes, np.uint8), np.frombuffer(self._ends, np.int64))
        numbers = np.frombuffer(self._numbers, np.int64 if self._type == "int" else np.float32)
        return Column(self._type, numbers.reshape(-1, width or 1) if self._type == "vector" else numbers)

    def _where(self, row: Row) -> str:
        return f"{self._option.where}, line {row.line}"

    def _whole(self, row: Row, text: str) -> int:
        if not _WHOLE.fullmatch(text) or len(text) > 4000:  # Python converts at most 4,300 digits
            raise self._wrong(row, text, "a whole number")
        number = int(text)
        if not -(2**63) <= number < 2**63:
            raise UserError(
                f"{self._where(row)}: {text[:40]} is outside of the range of int64. Pass --extra "
                f"{self._option.field}:float={self._option.path}, or text in place of float."
            )
        return number

    def _number(self, row: Row, text: str) -> float:
        if _NOT_FINITE.fullmatch(text):
            raise self._wrong(row, text, "a finite number")
        if not _NUMBER.fullmatch(text):
            raise self._wrong(row, text, "a number")
        number = float(text)
        if abs(number) >= _MAX_FLOAT:
            raise UserError(f"{self._where(row)}: {text[:40]} is outside of the range of float32, ±3.4e38.")
        return number

    def _wrong(self, row: Row, text: str, expected: str) -> UserError:
        what = f"the value {text[:40]!r}" if text else "no value"
        return UserError(
            f"{self._where(row)}: {what} for {row.name[:60]}, expected {expected}. Correct the row, or choose another "
            f"type, such as --extra {self._option.field}:text={self._option.path}."
        )


def _rows(option: ExtraOption, with_header: bool = False) -> Iterator[Row]:
    """Yield the rows of a file. If `with_header` is true, a Row with the names of the value's columns comes first."""
    where, path_column, split_column, columns, width = option.where, -1, -1, [0], 0
    for line, cells in read_rows(option.path, where, _EXPECTED):
        if path_column < 0:
            header = [cell.strip("# ") for cell in cells]
            path_column, split_column, columns = _columns(option, header)
            width = len(header)
            if with_header:
                yield Row(line, "", "", [header[k] for k in columns])
            continue
        if len(cells) < width or any(cell.strip() for cell in cells[width:]):
            raise ragged_row(where, line, len(cells), width, _EXPECTED)
        split = cells[split_column].strip().lower() if split_column >= 0 else ""
        if split_column >= 0 and not split:
            raise UserError(f"{where}, line {line}: no split in this row; expected train or val.")
        values = [cells[k] for k in columns]
        yield Row(line, cells[path_column].strip(), SPLITS_BY_NAME.get(split, split), values)
    if path_column < 0:
        raise UserError(f"{where}: the file is empty. {_EXPECTED}")


def _columns(option: ExtraOption, header: list[str]) -> tuple[int, int, list[int]]:
    """Return the indices of the path column, of the split column (−1 if there is none), and of the value's columns."""
    lower, field = ["" if name == option.field else name.lower() for name in header], option.field
    path = next((lower.index(name) for name in PATH_NAMES if name in lower), -1)
    if path < 0:
        path = next((k for k, name in enumerate(lower) if name in NAME_HEADERS), -1)
    if path < 0:
        raise UserError(
            f"{option.where}: the first row is {', '.join(header)!r:.80}, without a column of paths. {_EXPECTED}"
        )
    split = lower.index("split") if "split" in lower else -1
    if header.count(field) > 1:
        raise UserError(f"{option.where}: {header.count(field)} columns have the name {field}, expected one.")
    if field in header:
        return path, split, [header.index(field)]
    numbered = [header.index(name) for k in range(len(header)) if (name := f"{field}.{k}") in header]
    columns = numbered or [k for k in range(len(header)) if k not in (path, split)]
    if not columns:
        raise UserError(f"{option.where}: no column of values beside {header[path]}. {_EXPECTED}")
    return path, split, columns

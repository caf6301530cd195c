"""Gives each input of a split its row of a CSV file. A row names an input by its path, as label files do.

The path in a row may begin with more folders than the path of the input (`train/cat/1.jpg` for `cat/1.jpg`). If only
one input has the file name, the row may leave out the extension or folders at the beginning. The row may spell the
extension and letters with accents differently from the input (`.JPEG` for `.jpg`).
"""

from __future__ import annotations

import os
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from prep.console import UserError, count_noun, say
from prep.extra.csv_values import ExtraOption, ValueTable
from prep.inputs.classes import has_image_name
from prep.inputs.labels.label_file import common_spelling
from prep.inputs.labels.read import is_of_other_split
from prep.inputs.listing import Listing
from prep.inputs.names import composed, name_text
from prep.inputs.reader import Source
from prep.store.extra import Column

Integers = npt.NDArray[np.int64]
_MAX_NAMESAKES = 16  # if more inputs have the file name of a path, their folders are not compared with the path


def with_extra(sources: Sequence[Source], options: Sequence[ExtraOption]) -> list[Source]:
    """Return the sources with the extra values of their inputs. Print, for each field, its type and numbers of rows.

    Raises UserError if an input has no row, or several rows with different values. Also raises UserError if a row fits
    inputs of both splits, or if ValueTable.read refuses the file.
    """
    extended = list(sources)
    for option in options:
        table = ValueTable.read(option)
        inputs = [match_rows(table, source) for source in sources]
        _refuse_shared_rows(table, sources, inputs)
        for position, (source, matched) in enumerate(zip(extended, inputs, strict=True)):
            column = _column(table, source, matched)
            extended[position] = replace(source, extra={**source.extra, option.field: column})
    return extended


def match_rows(table: ValueTable, source: Source) -> Integers:
    """Return the input of each row, as an index into `source.inputs`; −1 if a row fits no input of the split.

    Raises UserError if the path of a row fits several inputs.
    """
    paths, own_folder = _InputPaths(source.inputs), source.reader.root.resolve().name
    found = np.full(len(table), -1, np.int64)
    for row in range(len(table)):
        name, split = table.name(row), table.split(row)
        if (split and split != source.split) or (not split and is_of_other_split(name, source.split, own_folder)):
            continue
        found[row], other = paths.find(os.fsencode(name))
        if other >= 0:
            fitting = " and ".join(name_text(source.inputs.path(index)) for index in (int(found[row]), other))
            raise UserError(
                f"{table.where}, line {table.lines[row]}: {name[:60]} fits several images of {source.split}, such as "
                f"{fitting}. Write the path of the image with its folder."
            )
    return found


def _refuse_shared_rows(table: ValueTable, sources: Sequence[Source], inputs: Sequence[Integers]) -> None:
    """Raise UserError if a row fits an input of each split."""
    if len(sources) < 2:
        return
    shared = np.flatnonzero(np.all([matched >= 0 for matched in inputs], axis=0))
    if len(shared):
        first = int(shared[0])
        raise UserError(
            f"{table.where}: {count_noun(len(shared), 'row')} would give values to images of both splits (first: "
            f"{table.name(first)[:60]}, line {table.lines[first]}). Write the folder of the split before the paths, "
            f"such as {sources[0].split}/{table.name(first)[:60]}, or add a column split."
        )


def _column(table: ValueTable, source: Source, inputs: Integers) -> Column:
    """Return the values of all inputs, and print the counts. `inputs` is the result of match_rows."""
    rows = np.flatnonzero(inputs >= 0)
    order = rows[np.argsort(inputs[rows], kind="stable")]
    repeated = order[1:][inputs[order[1:]] == inputs[order[:-1]]]
    before = order[:-1][inputs[order[1:]] == inputs[order[:-1]]]
    differ = table.column.take(before).differences(table.column.take(repeated))
    if len(differ):
        first, second = (int(rows[differ[0]]) for rows in (before, repeated))
        raise UserError(
            f"{table.where}, line {table.lines[second]}: {name_text(source.inputs.path(int(inputs[second])))} has two "
            f"values, {_shown(table.column, first)} (line {table.lines[first]}) and {_shown(table.column, second)}. "
            "Remove one of the lines."
        )
    row_of = np.full(len(source.inputs), -1, np.int64)
    row_of[inputs[rows]] = rows
    missing = np.flatnonzero(row_of < 0)
    others = np.flatnonzero(inputs < 0)
    hint = f" A path in the file that fits no image: {table.name(int(others[0]))[:60]}." if len(others) else ""
    if len(missing):
        raise UserError(
            f"{table.where}: no row for {len(missing):,} of {count_noun(len(source.inputs), 'image')} of "
            f"{source.split} (first: {name_text(source.inputs.path(int(missing[0])))}).{hint} Add the missing rows, or "
            "leave these images out with --exclude."
        )
    width = f" of {table.column.width:,} numbers" if table.column.type == "vector" else ""
    left_out = f"; {count_noun(len(others), 'row')} without an image of the split" if len(others) else ""
    left_out += f"; {count_noun(len(repeated), 'row')} repeated with the same value" if len(repeated) else ""
    say(f"{source.split}: {table.where}: {table.column.type}{width} for {len(row_of):,} images{left_out}.")
    return table.column.take(row_of)


def _shown(column: Column, row: int) -> str:
    value = column.value(row)
    return f"{value!r:.40}" if isinstance(value, str) else f"{value!s:.40}"


class _InputPaths:
    """Finds inputs by their paths, with sorted hashes of the paths."""

    def __init__(self, inputs: Listing) -> None:
        self._inputs = inputs
        self._whole = _Hashes(map(inputs.path, range(len(inputs))))

    def find(self, path: bytes) -> tuple[int, int]:
        """Return (index of the input, −1), or (−1, −1) if no input fits.

        If `path` is a file name without folders and fits several inputs, returns the indices of two of them.
        """
        index = self._suffix(path)
        if index < 0 and b"\\" in path:
            path = path.replace(b"\\", b"/")
            index = self._suffix(path)
        if index >= 0:
            return index, -1
        *folders, name = path.split(b"/")
        named = self._names.find(_name_key(name), _MAX_NAMESAKES + 1)
        if len(named) > _MAX_NAMESAKES:
            return (-1, -1) if folders else (named[0], named[1])
        fitting = [index for index in named if self._fits(index, folders, name)]
        if len(fitting) > 1:
            return (-1, -1) if folders else (fitting[0], fitting[1])
        return (fitting[0] if fitting else -1), -1

    def _suffix(self, path: bytes) -> int:
        """Return the index of the input whose path is `path`, or else the part of `path` after one of its slashes.

        If several parts are paths of inputs, the longest part counts. Returns −1 if there is no such input.
        """
        begin = 0
        while True:
            end = path[begin:]
            index = next((index for index in self._whole.find(end) if self._inputs.path(index) == end), -1)
            if index >= 0:
                return index
            slash = path.find(b"/", begin)
            if slash < 0:
                return -1
            begin = slash + 1

    @cached_property
    def _names(self) -> _Hashes:
        """The file names of the inputs in a common spelling, without folder and extension."""
        return _Hashes(_name_key(self._inputs.path(k).rpartition(b"/")[2]) for k in range(len(self._inputs)))

    def _fits(self, index: int, folders: Sequence[bytes], name: bytes) -> bool:
        *own_folders, own_name = self._inputs.path(index).split(b"/")
        count = min(len(folders), len(own_folders))
        if list(folders[len(folders) - count :]) != own_folders[len(own_folders) - count :]:
            return False
        if has_image_name(name):
            return common_spelling(name) == common_spelling(own_name)
        return _name_key(name) == _name_key(own_name)


class _Hashes:
    """Finds the indices of keys by sorted hashes. A dict would need ten times the memory."""

    def __init__(self, keys: Iterable[bytes | str]) -> None:
        hashes = np.fromiter((hash(key) for key in keys), np.int64)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = array("q", hashes[self._order].tobytes())

    def find(self, key: bytes | str, count: int = 2) -> list[int]:
        """Return the indices of at most `count` keys that have the same hash as `key`.

        In rare cases, such a key differs from `key`.
        """
        value = hash(key)
        position = bisect_left(self._sorted, value)
        end = position
        while end < min(len(self._sorted), position + count) and self._sorted[end] == value:
            end += 1
        indices: list[int] = self._order[position:end].tolist()
        return indices


def _name_key(name: bytes) -> str:
    """Return a file name in Unicode's composed form, without the extension of an image."""
    stem = os.path.splitext(name)[0] if has_image_name(name) else name
    return composed(stem.decode("utf-8", "surrogateescape"))

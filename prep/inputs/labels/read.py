"""Labels of images without class folders: finds the label file, and gives each image its label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prep.console import UserError, count_noun, say
from prep.inputs.classes import SPLIT_OF_FOLDER, examples, refuse_empty_classes, wanted_classes
from prep.inputs.labels.devkit import DEVKIT_NAME, GROUND_TRUTH_NAME, Devkit, find_devkit, open_devkit
from prep.inputs.labels.label_file import ImageNames, Row, Rows, parse_label_file
from prep.inputs.labels.numbers import LabelTexts, empty_classes
from prep.inputs.names import name_text
from prep.inputs.reader import ListOptions
from prep.schema import MAX_TEXT_BYTES, read_regular

_ILSVRC_NUMBER = re.compile(rb"ILSVRC\d{4}_(?:val|test)_(\d{8})\.\w+")
_TEST_IMAGE = re.compile(rb"ILSVRC\d{4}_test_")
_OTHER_YEAR = re.compile(rb"ILSVRC201[01]")
_SYNSET = re.compile(r"n\d{8}")  # a class of ImageNet
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.IGNORECASE)
_MIN_INDEX_LINES = 100  # a file whose labels are line numbers is an index if it has at least this number of lines


class Labels(NamedTuple):
    """Labels of the images of a split."""

    label_of: dict[bytes, int]  # name of the image -> label from 0
    classes: tuple[str, ...]
    file: Path  # the label file
    lines: npt.NDArray[np.int64]  # see Source.label_lines; sorted


def read_labels(
    options: ListOptions, names: Sequence[bytes], root: Path, split: str, store_classes: Sequence[str]
) -> Labels:
    """Read the labels of the images `names`.

    If the options name no label file, the label file beside `root` is used. `store_classes` are the classes of the
    store or of the split that was listed before; empty if there are no such classes. Prints how many lines name no
    image, and how many lines are repeated. Raises UserError if labels are missing, contradict each other or are not
    classes of the store. Also raises UserError if the meaning of the labels is unclear.
    """
    if not names:
        raise UserError(f"{root}: no photograph found.")
    file, content, devkit = _find_labels(options, root, split)
    where = f"--labels {file}"
    images = ImageNames(names)
    rows = parse_label_file(file, content, images)
    for note in rows.notes:
        say(f"{file}: {note}.")
    if rows.has_names:
        rows = replace(rows, rows=_of_split(file, rows.rows, split, root))
    texts: dict[str, Row] = {}
    for row in rows.rows:
        texts.setdefault(row.label, row)
    row_of = _by_name(file, rows.rows, images, names) if rows.has_names else _by_position(file, rows, names, root)
    classes, owner = wanted_classes(options.class_file, list(texts), store_classes)

    def example(text: str) -> str:
        row = texts[text]
        return f"Line {row.line} ({row.name} {text})" if row.name else f"Line {row.line} ({text})"

    label_texts = LabelTexts(where, list(texts), classes, owner, devkit, example)
    if rows.has_names:
        _refuse_index(where, rows.rows)
        if not classes:
            _refuse_further_columns(where, rows.rows)
    elif not label_texts.are_numbers and not classes and not all(_SYNSET.fullmatch(text) for text in texts):
        raise UserError(
            f"{where}: each line has only a label, such as {examples(list(texts))}, and there is no list of classes "
            "to which the labels could be compared. "
            "Expected `name label` on each line, or the classes in a file: --classes FILE."
        )
    label_of, classes, order = label_texts.resolve(options.label_order, not rows.has_names)
    if order == "devkit":
        _refuse_other_year(file, names[0])
    labels = {name: label_of[row.label] for name, row in row_of.items()}
    first = names[0]
    meaning = {"name": "names of classes", "devkit": f"numbers of {getattr(devkit(), 'path', '')}"}.get(
        order, f"positions of classes (--label-order {order})"
    )
    say(
        f"{root}: labels from {file}, read as {meaning}; {name_text(first)} is class {classes[labels[first]]}, "
        f"label {labels[first]}."
    )
    empty = empty_classes(classes, labels.values())
    if empty and not options.allow_empty_classes:
        refuse_empty_classes(where, empty)
    if empty:
        say(f"{root}: {count_noun(len(empty), 'class', 'classes')} without a photograph: {examples(empty)}.")
    lines = np.sort(np.fromiter((row.line for row in row_of.values() if not row.is_repeated), np.int64))
    return Labels(labels, classes, file, lines)


def _of_split(file: Path, rows: Sequence[Row], split: str, root: Path) -> list[Row]:
    """Return the rows of `split`. Rows with the folder of another split (`train/1.jpg` for val) are left out.

    Raises UserError if no rows are left.
    """
    kept: list[Row] = []
    others: list[Row] = []
    own_folder = root.resolve().name
    for row in rows:
        (others if is_of_other_split(row.name, split, own_folder) else kept).append(row)
    if others and not kept:
        raise UserError(
            f"--labels {file}: the names are those of another split ({others[0].name}), expected images of {split} in "
            f"{root}. Name the label file of {split}, or pass --split with the right split."
        )
    if others:
        say(f"{file}: left out {count_noun(len(others), 'line')} of another split (first: {others[0].name}).")
    return kept


def is_of_other_split(name: str, split: str, own_folder: str) -> bool:
    """Return whether a folder in a path names another split than `split`, as in `train/1.jpg` for val.

    A path with the folder `own_folder`, which holds the images of `split`, is never of another split.
    """
    folders = re.split(r"[\\/]", name)[:-1]
    splits = {SPLIT_OF_FOLDER[folder.lower()] for folder in folders if folder.lower() in SPLIT_OF_FOLDER}
    return bool(splits) and split not in splits and own_folder not in folders


def _refuse_other_year(file: Path, name: bytes) -> None:
    """Raise UserError if labels of ILSVRC 2010 or 2011 would be read with the class numbers of the devkit of 2012."""
    match = _OTHER_YEAR.search(file.name.encode(errors="replace")) or _OTHER_YEAR.match(name)
    if match:
        raise UserError(
            f"--labels {file}: the numbers for {name_text(name)} are those of {match[0].decode()}, but the devkit is "
            "that of ILSVRC2012, where the numbers mean other classes. Write `name label` on each line, with the "
            "synsets as labels."
        )


def _by_name(file: Path, rows: Sequence[Row], images: ImageNames, names: Sequence[bytes]) -> dict[bytes, Row]:
    """Return {image: its first row} for a label file with a name and a label on each line.

    Raises UserError if an image has no label, or has two different labels.
    """
    found: dict[bytes, Row] = {}
    double: list[str] = []
    surplus: list[str] = []
    for row in rows:
        name = images.find(row.name)
        if name is None:
            surplus.append(row.name)
            continue
        before = found.setdefault(name, row)
        if before.label != row.label:
            raise UserError(
                f"--labels {file}, line {row.line}: {name_text(name)} has two labels, {before.label} (line "
                f"{before.line}) and {row.label}."
            )
        if before is not row:
            found[name] = replace(before, is_repeated=True)
            double.append(name_text(name))
    missing = [name_text(name) for name in names if name not in found]
    if missing:
        hint = f" Names in the file that fit no image: {examples(surplus)}." if surplus else ""
        raise UserError(
            f"--labels {file}: no label for {len(missing):,} of {len(names):,} images: {examples(missing)}.{hint} "
            "Add the missing lines, or move these images away."
        )
    if double:
        say(f"{file}: {count_noun(len(double), 'line')} repeated with the same label: {examples(double)}.")
    if surplus:
        say(f"{file}: {count_noun(len(surplus), 'line')} without an image: {examples(surplus)}.")
    return {name: found[name] for name in names}


def _by_position(file: Path, rows: Rows, names: Sequence[bytes], root: Path) -> dict[bytes, Row]:
    """Return {image: its row} for a label file with only a label on each line.

    Line k has the label of the k-th image in the order of the names. There is one exception: if all images have
    ILSVRC's names, which contain a number, and there are more lines than images, line k has the label of the image with
    the number k. In all other cases, UserError is raised if there are more or fewer lines than images. UserError is
    also raised if the order of the names is ambiguous, or if the images are ILSVRC's test images.
    """
    if _TEST_IMAGE.match(names[0]) and "test" not in file.name:
        raise UserError(
            f"--labels {file}: {root} has test images ({name_text(names[0])}), and ILSVRC's ground truth is for the "
            "validation images. Expected `name label` on each line."
        )
    numbers = [int(match[1]) for name in names if (match := _ILSVRC_NUMBER.fullmatch(name))]
    if len(numbers) == len(names) < len(rows.rows) and 0 < min(numbers) and max(numbers) <= len(rows.rows):
        say(f"{root}: {len(names):,} images, {len(rows.rows):,} lines in {file}: line k is read for image number k.")
        return {name: rows.rows[number - 1] for name, number in zip(names, numbers, strict=True)}
    if len(rows.rows) != len(names):
        raise UserError(
            f"--labels {file}: {len(rows.rows):,} lines for {len(names):,} images in {root} "
            f"({name_text(names[0])} to {name_text(names[-1])}). Expected one line for each image, or `name label`."
        )
    counted = sorted(names, key=_by_numbers)
    other = next((pair for pair in zip(names, counted, strict=True) if pair[0] != pair[1]), None)
    if other:
        raise UserError(
            f"--labels {file}: the order of the images is ambiguous: {name_text(other[0])} comes before "
            f"{name_text(other[1])} as text and after it as numbers. Expected `name label` on each line."
        )
    return dict(zip(names, rows.rows, strict=True))


def _by_numbers(name: bytes) -> list[tuple[bytes, int]]:
    """Return a sort key that compares the numbers in names as numbers: `2.jpg` comes before `10.jpg`."""
    parts = re.split(rb"(\d+)", name)
    return [(text, int(number)) for text, number in zip(parts[::2], [*parts[1::2], b"0"], strict=True)]


def _refuse_index(where: str, rows: Sequence[Row]) -> None:
    """Raise UserError if the labels are the numbers of the lines, as in ImageSets/CLS-LOC/val.txt of ILSVRC."""
    for first in (0, 1):
        if len(rows) >= _MIN_INDEX_LINES and all(row.label == str(k) for k, row in enumerate(rows, first)):
            raise UserError(
                f"{where}: the numbers are the line numbers {first} to {len(rows) - 1 + first:,}, so the file is an "
                "index of the images, not a list of labels. Name another label file."
            )


def _refuse_further_columns(where: str, rows: Sequence[Row]) -> None:
    """Raise UserError if it is unclear whether words after a name are one class, or a class and a further column.

    Several words without quotes are refused in these cases:

    -   The first words are also a class (`cat old` beside `cat`).
    -   The words occur on one line only, and the last words are also a class (`old cat` beside `cat`).
    -   The words occur on one line only, and at most half of the lines have several words.
    -   The last words of all lines look like a column: names of splits, numbers, or words that follow every class.
    """
    several = [row for row in rows if row.has_blanks]
    if not several:
        return
    lines_of = Counter(row.label for row in rows)
    are_few = 2 * len(several) <= len(rows)
    parts = [row.label.rsplit(maxsplit=1) for row in several]
    firsts, lasts = {first for first, _ in parts}, {last for _, last in parts}
    is_column = len(several) == len(rows) and (
        all(last.lower() in SPLIT_OF_FOLDER for last in lasts)
        or (len(firsts) > 1 and all(_NUMBER.fullmatch(last) for last in lasts))
        or (len(firsts) > 1 and len(lasts) > 1 and len(lines_of) == len(firsts) * len(lasts))
    )
    for row in several:
        words = row.label.split()
        begins = any(" ".join(words[:k]) in lines_of for k in range(1, len(words)))
        ends = any(" ".join(words[k:]) in lines_of for k in range(1, len(words)))
        if is_column or begins or (lines_of[row.label] == 1 and (ends or are_few)):
            raise UserError(
                f"{where}, line {row.line}: {row.label[:60]!r} follows the name {row.name[:60]}, and it is unclear "
                "whether this is a class of several words or a class and a further column. Put quotes around the "
                "class, or separate the columns with tabs or commas."
            )


def _find_labels(options: ListOptions, root: Path, split: str) -> tuple[Path, bytes, Callable[[], Devkit | None]]:
    """Return the label file, its content, and a function that returns the devkit (or None if there is no devkit)."""
    parent = root.resolve().parent
    file = options.labels

    @cache
    def devkit() -> Devkit | None:
        if options.devkit is not None:
            return open_devkit(options.devkit)
        return find_devkit(list(dict.fromkeys([*([file.resolve().parent] if file else []), parent])))

    if file is None and not (options.devkit is not None and split != "train"):
        file = _file_beside(root, parent, split)
    if file is None:
        found = devkit()
        if found is None or not found.ground_truth:
            fault = f"{found.path} has no {GROUND_TRUTH_NAME}" if found else "no label file is next to this path"
            raise UserError(f"{root}: the images have no class folders, and {fault}. Name the file with --labels FILE.")
        return found.path, found.ground_truth, devkit
    try:
        return file, read_regular(file, MAX_TEXT_BYTES, "Name a label file."), devkit
    except OSError as error:
        raise UserError(f"--labels {file}: {error.strerror or error}.") from None


def _file_beside(root: Path, parent: Path, split: str) -> Path | None:
    """Return the label file beside `root`, a folder or archive without class folders. None if there is no such file.

    Raises UserError if there are several label files. These files count as label files:

    -   `*ground_truth*.txt`, beside `root` or in a devkit beside `root`
    -   the name of `root` with the extension .txt, .csv or .tsv, beside `root`
    -   labels.txt, labels.csv or labels.tsv, in the folder `root`
    -   Kaggle's LOC_SPLIT_solution.csv (LOC_val_solution.csv), beside `root` or beside Kaggle's folder ILSVRC
    """
    stem = root.resolve().name if root.is_dir() else root.resolve().stem
    kaggle = [parent] + ([parent.parents[2]] if parent.parts[-3:] == ("ILSVRC", "Data", "CLS-LOC") else [])
    named = [folder / f"LOC_{split}_solution.csv" for folder in kaggle]
    for suffix in (".txt", ".csv", ".tsv"):
        named += [parent / f"{stem}{suffix}", root / f"labels{suffix}"]
    candidates = {path for path in named if path.is_file()}
    for folder in (parent, parent / DEVKIT_NAME / "data"):
        candidates |= set(folder.glob("*ground_truth*.txt"))
    if len(candidates) > 1:
        raise UserError(
            f"{root}: the images have no class folders, and {len(candidates)} files look like label files: "
            f"{examples([str(path) for path in sorted(candidates)])}. Name one of these files with --labels FILE."
        )
    return next(iter(candidates), None)

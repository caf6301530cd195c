"""Inputs that are left out on purpose: photographs that `--exclude` names, and classes that `--classes` does not name.

A line of `--exclude FILE` is the path of a file in the split (`n01440764/n01440764_36.JPEG`), the name of the file with
or without its extension, or a number. A number is allowed if the file names of the split differ only in the number
before the extension. A line with the number 36 then means the file with this number in its name, such as
ILSVRC2012_val_00000036.JPEG. Empty lines and lines that begin with # are ignored.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.inputs.classes import examples, is_number, read_class_file
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.schema import MAX_TEXT_BYTES, read_regular

EXCLUDED = "named by --exclude"
OTHER_CLASS = "a class that --classes does not name"
_NUMBER = re.compile(rb"(.*?)(\d+)(\.[^.]*)?", re.DOTALL)


class ExclusionList:
    """The lines of a file that lists the inputs to leave out.

    Raises UserError if the file cannot be read or is empty.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            lines = read_regular(file, MAX_TEXT_BYTES, "Name a text file.").removeprefix(b"\xef\xbb\xbf").splitlines()
        except OSError as error:
            raise UserError(f"--exclude {file}: {error.strerror or error}.") from None
        stripped = (line.strip().removeprefix(b"./") for line in lines)
        self.lines = dict.fromkeys(line for line in stripped if line and not line.startswith(b"#"))
        if not self.lines:
            raise UserError(f"--exclude {file}: the file has no lines. Expected the name of a file on each line.")
        self._split_of: dict[bytes, str] = {}  # line -> name of the split in which a file fits the line

    def find(self, paths: Iterable[bytes], split: str) -> set[bytes]:
        """Return those `paths` of a split that fit a line of the file.

        Raises UserError if a line fits several files of the split, or fits files in two splits.
        """
        fitting: defaultdict[bytes, list[bytes]] = defaultdict(list)  # line -> paths of the files that fit the line
        numbered: dict[int, list[bytes]] | None = defaultdict(list)
        numbers = {int(line): line for line in self.lines if line.isdigit() and len(line) < 19}
        prefix: bytes | None = None
        for path in paths:
            name = path.rpartition(b"/")[2]
            texts = dict.fromkeys((path, name, os.path.splitext(path)[0], os.path.splitext(name)[0]))
            for text in texts:
                if text in self.lines:
                    fitting[text].append(path)
            if numbers and numbered is not None:
                match = _NUMBER.fullmatch(name)
                prefix = match[1] if match and prefix is None else prefix
                if match is None or match[1] != prefix:
                    numbered = None  # the names differ in more than their numbers
                elif int(match[2][-18:]) in numbers:
                    numbered[int(match[2][-18:])].append(path)
        for number, found in (numbered or {}).items():
            fitting.setdefault(numbers[number], found)
        for line, found in fitting.items():
            self._check(line, found, split)
        if fitting:
            say(f"{split}: --exclude {self.file} leaves out {count_noun(len(fitting), 'file')}.")
        return {path for found in fitting.values() for path in found}

    def _check(self, line: bytes, found: list[bytes], split: str) -> None:
        if len(found) > 1:
            examples = " and ".join(name_text(path) for path in found[:2])
            raise UserError(
                f"--exclude {self.file}: {name_text(line)} fits {len(found)} files of {split}, such as {examples}. "
                "Write the path of the file with its folder."
            )
        other = self._split_of.setdefault(line, split)
        if other != split:
            raise UserError(
                f"--exclude {self.file}: {name_text(line)} fits a file of {other} and a file of {split} "
                f"({name_text(found[0])}). Build the splits one after the other with --split, each with its own list."
            )

    def report_unused(self) -> None:
        """Print how many lines fit no file of the splits that were listed so far.

        Raises UserError if no line fits a file.
        """
        unused = [line for line in self.lines if line not in self._split_of]
        if not unused:
            return
        what = f"--exclude {self.file}: {len(unused):,} of {count_noun(len(self.lines), 'line')}"
        first = name_text(unused[0])
        if len(unused) == len(self.lines):
            raise UserError(
                f"{what} fit no file (first line: {first}). Expected paths or names of files in SOURCE, or the numbers "
                "in file names that differ only in their numbers, such as ILSVRC2012_val_00000036.JPEG."
            )
        say(f"{what} fit no file (first: {first}).")


def without(listing: Listing, paths: set[bytes]) -> Listing:
    """Return the inputs of `listing` whose paths are not in `paths`."""
    if not paths:
        return listing
    kept = Listing()
    for item in listing:
        if item.path not in paths:
            kept.add(item.path, item.label, item.size, item.mtime_ns, item.location)
    return kept


def selected_classes(
    listing: Listing, classes: Sequence[str], class_file: Path | None, where: str
) -> tuple[Listing, tuple[str, ...], list[tuple[str, str]]]:
    """Leave out the classes that `class_file` does not name.

    Returns the remaining inputs, their classes, and each class that is left out, with the reason. If the file names a
    class that is not in `classes`, no class is left out. The labels are indices into the returned classes.
    """
    names = set(read_class_file(class_file, set(classes))) if class_file is not None else set()
    if not names or not names < set(classes):
        return listing, tuple(classes), []
    kept = tuple(name for name in classes if name in names)
    label_of = {classes.index(name): label for label, name in enumerate(kept)}
    selected = Listing()
    for item in listing:
        if item.label in label_of:
            selected.add(item.path, label_of[item.label], item.size, item.mtime_ns, item.location)
    others = [name for name in classes if name not in names]
    say(
        f"{where}: {class_file} names {count_noun(len(kept), 'class', 'classes')}; left out: "
        f"{count_noun(len(listing) - len(selected), 'photograph')} of "
        f"{count_noun(len(others), 'other class', 'other classes')} ({examples(others)})."
    )
    return selected, kept, [(name, OTHER_CLASS) for name in others]


def named_by_position(
    classes: Sequence[str], wanted: Sequence[str], label_order: str | None, where: str
) -> tuple[str, ...]:
    """Return the class names for class folders that are numbers, such as ImageNetV2's folders 0 to 999.

    Folder k is the class at position k in the sorted order of `wanted`. The positions are counted from 1 if
    `label_order` is `sorted`, and from 0 if it is `sorted-from-0`. If one of `classes` is not a number, or if a name in
    `wanted` is a number, `classes` is returned unchanged. Raises UserError if `label_order` has another value, or if
    the number of a folder is not the position of a class.
    """
    if not classes or not wanted or not all(map(is_number, classes)) or any(map(is_number, wanted)):
        return tuple(classes)
    if label_order not in ("sorted", "sorted-from-0"):
        raise UserError(
            f"{where}: the class folders are numbers ({examples(classes)}), but the classes of the store are names "
            f"({examples(wanted)}). If a folder is the position of a class in sorted order, pass --label-order "
            "sorted-from-0 (the first class is 0, as in ImageNetV2) or --label-order sorted (the first class is 1)."
        )
    first = 0 if label_order == "sorted-from-0" else 1
    in_order = sorted(wanted)
    wrong = next((name for name in classes if not first <= int(name) < first + len(in_order)), None)
    if wrong is not None:
        raise UserError(
            f"{where}: class folder {wrong}; with --label-order {label_order} expected {first} to "
            f"{first + len(in_order) - 1}, the positions of {len(in_order)} classes."
        )
    return tuple(in_order[int(name) - first] for name in classes)

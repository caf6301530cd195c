"""Labels of a flat set of photographs, from a text file of one of two kinds.

`name label` a line, where the label is the name of a class or its number 0..K−1 (Caffe's val.txt); or one number 1..K
a line for each photograph in the order of their names (ILSVRC's ground truth).
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from prep.console import UserError, say

LABEL_ORDERS = ("sorted", "devkit")
MAX_CLASSES = 1_000_000  # every class gets a name and a count: a greater number is a mistake


def read_labels(
    labels: Path | None, names: Sequence[bytes], root: Path, order: str | None, known: Sequence[str]
) -> tuple[dict[bytes, int], tuple[str, ...]]:
    """The label 0..K−1 of each of `names`, and the classes.

    `labels` is looked for beside `root` where it is None; `known` are the classes that the store already has, empty
    where it has none. Raises UserError for labels that are missing, do not fit the names, or are not `known`.
    """
    if labels is None:
        labels = _beside(root)
    try:
        lines = [line for line in labels.read_text("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--labels {labels}: {error.strerror or error}.") from None
    if not lines:
        raise UserError(f"--labels {labels}: the file is empty.")
    if len(lines[0].split()) == 1:
        return _ground_truth(labels, lines, names, root, order, known)
    return _name_label(labels, lines, names, root, known)


def _ground_truth(
    path: Path, lines: Sequence[str], files: Sequence[bytes], root: Path, order: str | None, known: Sequence[str]
) -> tuple[dict[bytes, int], tuple[str, ...]]:
    """One number 1..K a line. Which class is number k is what people get wrong: the devkit has an order of its own.

    `order` says it: "sorted", the k-th name in sorted order; "devkit", as meta.mat beside the file says. By default
    devkit where meta.mat lies beside the file, as in ILSVRC2012_devkit_t12/data, else sorted.
    """
    if len(lines) != len(files):
        raise UserError(f"--labels {path}: {len(lines):,} lines for {len(files):,} photographs in {root}. One a line.")
    meta = path.with_name("meta.mat")
    if order is None:
        order = "devkit" if meta.is_file() else "sorted"
    numbers = [_whole(line, path, at, 1) for at, line in enumerate(lines, 1)]
    if order == "devkit":
        synset = _devkit(meta)
        classes = tuple(known) or tuple(sorted(synset[k] for k in synset if k <= max(numbers)))
        place = {name: label for label, name in enumerate(classes)}
        missing = sorted({synset.get(k, f"number {k}") for k in numbers} - set(classes))
        if missing:
            raise UserError(f"--labels {path}: {missing[0]} is not among the store's {len(classes)} classes.")
        found = [place[synset[k]] for k in numbers]
        say(f"{root}: label numbers are the devkit's ({meta.name} beside {path.name}).")
    else:
        classes = tuple(known) or numbered_classes(max(numbers), f"--labels {path}")
        if max(numbers) > len(classes):
            raise UserError(f"--labels {path}: number {max(numbers)}, but the store has {len(classes)} classes.")
        found = [k - 1 for k in numbers]
        say(
            f"{root}: label number k is read as the k-th class in sorted order (--label-order devkit for ILSVRC's own)."
        )
    return dict(zip(files, found, strict=True)), classes


def _devkit(path: Path) -> dict[int, str]:
    """ILSVRC2012_ID -> synset, from the devkit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(path), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except FileNotFoundError:
        raise UserError(
            f"--label-order devkit: {path} is missing. Put the devkit's meta.mat beside the labels."
        ) from None
    except Exception as error:  # loadmat raises many kinds for a broken file
        raise UserError(f"{path}: not the devkit's meta.mat ({error}).") from None


def _name_label(
    path: Path, lines: Sequence[str], files: Sequence[bytes], root: Path, known: Sequence[str]
) -> tuple[dict[bytes, int], tuple[str, ...]]:
    pairs: dict[bytes, str] = {}
    for at, line in enumerate(lines, 1):
        parts = line.rsplit(None, 1)
        if len(parts) != 2:
            raise UserError(f"--labels {path}, line {at}: {line!r}, expected `name label`.")
        name = os.path.basename(os.fsencode(parts[0].strip()))
        if pairs.setdefault(name, parts[1]) != parts[1]:
            raise UserError(f"--labels {path}, line {at}: {shown(name)} has two labels, {pairs[name]} and {parts[1]}.")
    lacking = [name for name in files if name not in pairs]
    if lacking:
        raise UserError(
            f"--labels {path}: no label for {len(lacking):,} of {len(files):,} photographs "
            f"(first: {shown(lacking[0])})."
        )
    place = {name: label for label, name in enumerate(known)}
    if all(label in place for label in pairs.values()):
        return {name: place[pairs[name]] for name in files}, tuple(known)
    below = next((label for label in pairs.values() if re.fullmatch(r"-\d+", label)), None)
    if below is not None:
        raise UserError(f"--labels {path}: label {below}, expected the name of a class or a number from 0.")
    if any(not label.isdecimal() for label in pairs.values()):
        if known:
            odd = next(label for label in pairs.values() if label not in place)
            raise UserError(
                f"--labels {path}: {odd} is not among the store's {len(known)} classes (first: {known[0]})."
            )
        classes = tuple(sorted(set(pairs.values())))
        place = {name: label for label, name in enumerate(classes)}
        return {name: place[pairs[name]] for name in files}, classes
    numbers = {name: _number(pairs[name]) for name in files}
    classes = tuple(known) or numbered_classes(max(numbers.values()) + 1, f"--labels {path}")
    if max(numbers.values()) >= len(classes):
        raise UserError(
            f"--labels {path}: label {max(numbers.values())}, but labels of {len(classes)} classes end at "
            f"{len(classes) - 1}."
        )
    return numbers, classes


def _beside(root: Path) -> Path:
    """The one label file near a flat folder; raises UserError where there is none or more than one."""
    place = root.resolve()
    folders = (place.parent, place.parent / "ILSVRC2012_devkit_t12" / "data")
    near = sorted(
        {path for folder in folders for path in folder.glob("*ground_truth*.txt")}
        | set(place.parent.glob(f"{glob.escape(place.stem)}.txt"))
    )
    if len(near) != 1:
        found = f"{len(near)} files beside it look like labels" if near else "no label file lies beside it"
        raise UserError(f"{root}: photographs without class folders, and {found}. Name one with --labels FILE.")
    say(f"{root}: labels from {near[0]}.")
    return near[0]


def _whole(text: str, path: Path, line: int, least: int) -> int:
    text = text.strip()
    if not text.isdecimal() or _number(text) < least:
        raise UserError(f"--labels {path}, line {line}: {text[:40]!r}, expected a whole number from {least}.")
    return _number(text)


def _number(text: str) -> int:
    """Decimal digits as a number; int() refuses very many of them, and beyond MAX_CLASSES it matters not by how far."""
    return int(text) if len(text) < 19 else 10**18


def numbered_classes(count: int, place: str) -> tuple[str, ...]:
    """Classes called 0, 1, 2…; raises UserError where there would be more than MAX_CLASSES."""
    if count > MAX_CLASSES:
        raise UserError(f"{place}: a label of {count - 1:,}; more than {MAX_CLASSES:,} classes are a mistake.")
    return tuple(str(k) for k in range(count))


def shown(name: bytes) -> str:
    """A name that can be printed and stored as UTF-8 whatever its bytes are."""
    return name.decode("utf-8", "backslashreplace")

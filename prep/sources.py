"""Where photographs come from: folders of classes, or a flat folder with a file of labels.

A listing is sorted by bytes, so it is the same on every file system; nothing is opened here but the label files.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prep.console import UserError, count_noun, say
from prep.manifest import SPLITS

LABEL_ORDERS = ("sorted", "devkit")


@dataclass(frozen=True)
class Input:
    """One file to take in: its path below the split's folder (as bytes) and its label, 0..K−1."""

    path: bytes
    label: int


@dataclass(frozen=True)
class Source:
    """All inputs of one split, in the order of their paths."""

    root: Path
    split: str
    classes: tuple[str, ...]
    inputs: tuple[Input, ...]


def find_splits(source: Path, split: str | None) -> dict[str, Path]:
    """The folder of each split to build: SOURCE/train and SOURCE/val where SOURCE has them, else SOURCE itself.

    Raises UserError for a SOURCE that is missing, no folder, or lacks the split that was named.
    """
    if not source.is_dir():
        raise UserError(f"{source}: {'not a folder' if source.exists() else 'no such folder'}.")
    inside = {name: source / name for name in SPLITS if (source / name).is_dir()}
    if split is None:
        return inside or {"train": source}
    if not inside:
        return {split: source}
    if split not in inside:
        raise UserError(f"--split {split}: {source} has {' and '.join(inside)} but no {split}.")
    return {split: inside[split]}


def read_source(folder: Path, split: str, labels: Path | None, label_order: str | None, known: Sequence[str]) -> Source:
    """List one split.

    Class folders give classes and labels by their sorted names. A flat folder needs `labels`, see _flat; `known` are
    the classes that the store already has, empty where it has none. Raises UserError for a folder that holds neither,
    labels that do not fit, and classes other than `known`.
    """
    with os.scandir(os.fsencode(folder)) as entries:
        listing = sorted((e.name, e.is_dir(), e.is_file()) for e in entries if not e.name.startswith(b"."))
    folders = [name for name, is_folder, _ in listing if is_folder]
    files = [name for name, _, is_file in listing if is_file]
    if folders and not files:
        if labels is not None:
            say(f"{folder}: class folders give the labels of {split}; --labels is not needed there.")
        return _class_folders(folder, split, folders, known)
    if files and not folders:
        return _flat(folder, split, files, labels, label_order, known)
    if not files:
        raise UserError(
            f"{folder}: the folder is empty. Expected a folder for each class, or photographs and --labels."
        )
    raise UserError(
        f"{folder}: {count_noun(len(folders), 'folder')} and {count_noun(len(files), 'file')} side by side "
        f"(first file: {_shown(files[0])}). Expected class folders alone, or photographs alone with --labels."
    )


def _class_folders(root: Path, split: str, folders: Sequence[bytes], known: Sequence[str]) -> Source:
    classes = tuple(_shown(name) for name in folders)
    _same_classes(classes, known, root)
    inputs: list[Input] = []
    empty: list[str] = []
    odd: list[bytes] = []
    for label, name in enumerate(folders):
        with os.scandir(os.path.join(os.fsencode(root), name)) as entries:
            names = sorted((e.name, e.is_file()) for e in entries if not e.name.startswith(b"."))
        found = [file for file, is_file in names if is_file]
        odd += [name + b"/" + file for file, is_file in names if not is_file]
        if not found:
            empty.append(classes[label])
        inputs += [Input(name + b"/" + file, label) for file in found]
    if not inputs:
        raise UserError(f"{root}: {count_noun(len(folders), 'class folder')} and not one file in them.")
    if empty:
        say(f"{root}: {count_noun(len(empty), 'class', 'classes')} without a photograph (first: {empty[0]}).")
    if odd:
        say(f"{root}: {count_noun(len(odd), 'entry', 'entries')} not taken, being no files (first: {_shown(odd[0])}).")
    return Source(root, split, classes, tuple(sorted(inputs, key=lambda i: i.path)))


def _flat(
    root: Path, split: str, files: Sequence[bytes], labels: Path | None, order: str | None, known: Sequence[str]
) -> Source:
    """Photographs side by side, with labels from a text file of one of two kinds:

    `name label` a line, where the label is the name of a class or its number 0..K−1 (Caffe's val.txt); or one number
    1..K a line for each photograph in the order of their names (ILSVRC's ground truth), read by _ground_truth.
    """
    if labels is None:
        labels = _beside(root)
    try:
        lines = [line for line in labels.read_text(errors="surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--labels {labels}: {error.strerror or error}.") from None
    if not lines:
        raise UserError(f"--labels {labels}: the file is empty.")
    if len(lines[0].split()) == 1:
        named, classes = _ground_truth(labels, lines, files, root, order, known)
    else:
        named, classes = _name_label(labels, lines, files, root, known)
    return Source(root, split, classes, tuple(Input(name, named[name]) for name in files))


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
        classes = tuple(known) or tuple(str(k) for k in range(max(numbers)))
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
            raise UserError(f"--labels {path}, line {at}: {_shown(name)} has two labels, {pairs[name]} and {parts[1]}.")
    lacking = [name for name in files if name not in pairs]
    if lacking:
        raise UserError(
            f"--labels {path}: no label for {len(lacking):,} of {len(files):,} photographs "
            f"(first: {_shown(lacking[0])})."
        )
    place = {name: label for label, name in enumerate(known)}
    if all(label in place for label in pairs.values()):
        return {name: place[pairs[name]] for name in files}, tuple(known)
    if any(not label.isdecimal() for label in pairs.values()):
        if known:
            odd = next(label for label in pairs.values() if label not in place)
            raise UserError(
                f"--labels {path}: {odd} is not among the store's {len(known)} classes (first: {known[0]})."
            )
        classes = tuple(sorted(set(pairs.values())))
        place = {name: label for label, name in enumerate(classes)}
        return {name: place[pairs[name]] for name in files}, classes
    numbers = {name: int(pairs[name]) for name in files}
    classes = tuple(known) or tuple(str(k) for k in range(max(numbers.values()) + 1))
    if max(numbers.values()) >= len(classes):
        raise UserError(
            f"--labels {path}: label {max(numbers.values())}, but labels of {len(classes)} classes end at "
            f"{len(classes) - 1}."
        )
    return numbers, classes


def _beside(root: Path) -> Path:
    """The one label file near a flat folder; raises UserError where there is none or more than one."""
    place = root.resolve()
    near = sorted({*place.parent.glob("*ground_truth*.txt"), *place.parent.glob(f"{place.name}.txt")})
    if len(near) != 1:
        found = f"{len(near)} files beside it look like labels" if near else "no label file lies beside it"
        raise UserError(f"{root}: photographs without class folders, and {found}. Name one with --labels FILE.")
    say(f"{root}: labels from {near[0]}.")
    return near[0]


def _same_classes(found: Sequence[str], known: Sequence[str], root: Path) -> None:
    if known and tuple(found) != tuple(known):
        odd = sorted(set(found) ^ set(known))
        raise UserError(
            f"{root}: {len(found)} classes, the store has {len(known)}"
            + (f" (first that only one of them has: {odd[0]})" if odd else "")
            + ". Splits of one store share their classes."
        )


def _whole(text: str, path: Path, line: int, least: int) -> int:
    if not text.strip().isdecimal() or int(text) < least:
        raise UserError(f"--labels {path}, line {line}: {text.strip()!r}, expected a whole number from {least}.")
    return int(text)


def _shown(name: bytes) -> str:
    """A name that can be printed and stored as UTF-8 whatever its bytes are."""
    return name.decode("utf-8", "backslashreplace")

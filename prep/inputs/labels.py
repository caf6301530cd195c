"""Labels of images without class folders, read from a text file in one of two formats.

In the first format, each line is `name label`, and the label is the name of a class or its number 0..K−1 (Caffe's
val.txt). In the second format (ILSVRC's ground truth), each line is a number 1..K, and line i belongs to the i-th
image in the sorted order of the names.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from prep.console import UserError, say
from prep.inputs.classes import numbered_classes
from prep.inputs.names import name_text

LABEL_ORDERS = ("sorted", "devkit")  # two meanings of the numbers in a ground-truth file; see _read_ground_truth


def read_labels(
    file: Path | None, names: Sequence[bytes], root: Path, label_order: str | None, store_classes: Sequence[str]
) -> tuple[dict[bytes, int], tuple[str, ...]]:
    """Read the labels of all `names`. Returns ({name: label 0..K−1}, names of the K classes).

    If `file` is None, the label file next to `root` is used. `store_classes` are the classes of the store, empty if
    the store has none yet. Raises UserError if labels are missing, do not fit the names or are not classes of the
    store.
    """
    if file is None:
        file = _find_label_file(root)
    try:
        lines = [line for line in file.read_text("utf-8-sig", "surrogateescape").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--labels {file}: {error.strerror or error}.") from None
    if not lines:
        raise UserError(f"--labels {file}: the file is empty.")
    if len(lines[0].split()) == 1:
        return _read_ground_truth(file, lines, names, root, label_order, store_classes)
    return _read_name_label_pairs(file, lines, names, store_classes)


def _read_ground_truth(
    file: Path,
    lines: Sequence[str],
    names: Sequence[bytes],
    root: Path,
    label_order: str | None,
    store_classes: Sequence[str],
) -> tuple[dict[bytes, int], tuple[str, ...]]:
    """Read a file with one number 1..K on each line. ILSVRC's devkit does not number the classes in sorted order.

    With `label_order` "sorted", number k is the k-th class in sorted order. With "devkit", number k is the class with
    ILSVRC2012_ID k in the meta.mat next to the file. The default is "devkit" if there is a meta.mat next to the file
    (as in ILSVRC2012_devkit_t12/data), else "sorted".
    """
    if len(lines) != len(names):
        raise UserError(
            f"--labels {file}: {len(lines):,} lines for {len(names):,} images in {root}. Expected one line per image."
        )
    meta = file.with_name("meta.mat")
    if label_order is None:
        label_order = "devkit" if meta.is_file() else "sorted"
    numbers = [_positive_number(line, file, line_number) for line_number, line in enumerate(lines, 1)]
    if label_order == "devkit":
        synsets = _devkit_synsets(meta)
        classes = tuple(store_classes) or tuple(sorted(synsets[k] for k in synsets if k <= max(numbers)))
        label_of = {name: label for label, name in enumerate(classes)}
        missing = sorted({synsets.get(k, f"number {k}") for k in numbers} - set(classes))
        if missing:
            raise UserError(f"--labels {file}: {missing[0]} is not among the store's {len(classes)} classes.")
        labels = [label_of[synsets[k]] for k in numbers]
        say(f"{root}: label numbers are the devkit's ({meta.name} next to {file.name}).")
    else:
        classes = tuple(store_classes) or numbered_classes(0, max(numbers) - 1, f"--labels {file}")
        if max(numbers) > len(classes):
            raise UserError(f"--labels {file}: number {max(numbers)}, but the store has {len(classes)} classes.")
        labels = [k - 1 for k in numbers]
        say(
            f"{root}: label number k is read as the k-th class in sorted order. "
            "For ILSVRC's own numbers pass --label-order devkit."
        )
    return dict(zip(names, labels, strict=True)), classes


def _devkit_synsets(file: Path) -> dict[int, str]:
    """{ILSVRC2012_ID: synset} from the devkit's meta.mat."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(str(file), squeeze_me=True)["synsets"]
        return {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
    except FileNotFoundError:
        raise UserError(
            f"--label-order devkit: {file} is missing. Put the devkit's meta.mat next to the label file."
        ) from None
    except Exception as error:  # loadmat raises many kinds of errors for a broken file
        raise UserError(f"{file} is not the devkit's meta.mat ({error}).") from None


def _read_name_label_pairs(
    file: Path, lines: Sequence[str], names: Sequence[bytes], store_classes: Sequence[str]
) -> tuple[dict[bytes, int], tuple[str, ...]]:
    """Read a file with `name label` on each line. If `name` is a path, its folders are ignored.

    If every label is the name of a class of the store, labels are class names. Otherwise, if every label is a number,
    labels are numbers. Otherwise labels are the names of new classes; new classes are an error if the store has
    classes. Lines for images that are not in `names` are allowed. The labels in these lines also decide whether labels
    are class names or numbers, and a new class name in these lines becomes a class too.
    """
    label_text: dict[bytes, str] = {}
    for line_number, line in enumerate(lines, 1):
        parts = line.rsplit(None, 1)
        if len(parts) != 2:
            raise UserError(f"--labels {file}, line {line_number}: {line!r}, expected `name label`.")
        name = os.path.basename(os.fsencode(parts[0].strip()))
        if label_text.setdefault(name, parts[1]) != parts[1]:
            raise UserError(
                f"--labels {file}, line {line_number}: {name_text(name)} has two labels, {label_text[name]} and "
                f"{parts[1]}."
            )
    unlabelled = [name for name in names if name not in label_text]
    if unlabelled:
        raise UserError(
            f"--labels {file}: no label for {len(unlabelled):,} of {len(names):,} images "
            f"(first: {name_text(unlabelled[0])})."
        )
    label_of = {name: label for label, name in enumerate(store_classes)}
    if all(text in label_of for text in label_text.values()):
        return {name: label_of[label_text[name]] for name in names}, tuple(store_classes)
    negative = next((text for text in label_text.values() if re.fullmatch(r"-\d+", text)), None)
    if negative is not None:
        raise UserError(f"--labels {file}: label {negative}, expected the name of a class or a number from 0.")
    if any(not text.isdecimal() for text in label_text.values()):
        if store_classes:
            unknown = next(text for text in label_text.values() if text not in label_of)
            raise UserError(
                f"--labels {file}: {unknown} is not among the store's {len(store_classes)} classes "
                f"(first: {store_classes[0]})."
            )
        classes = tuple(sorted(set(label_text.values())))
        label_of = {name: label for label, name in enumerate(classes)}
        return {name: label_of[label_text[name]] for name in names}, classes
    numbers = {name: _parse_decimal(label_text[name]) for name in names}
    classes = tuple(store_classes) or numbered_classes(0, max(numbers.values()), f"--labels {file}")
    if max(numbers.values()) >= len(classes):
        raise UserError(
            f"--labels {file}: label {max(numbers.values())}, but the store's {len(classes)} classes have "
            f"labels 0 to {len(classes) - 1}."
        )
    return numbers, classes


def _find_label_file(root: Path) -> Path:
    """Find the label file of a flat folder or archive. Raises UserError if no file or more than one file matches.

    The name of a matching file next to `root` is `*ground_truth*.txt`, or the name of `root` with the extension .txt.
    The name of a matching file in a devkit next to `root` is `*ground_truth*.txt`.
    """
    resolved = root.resolve()
    folders = (resolved.parent, resolved.parent / "ILSVRC2012_devkit_t12" / "data")
    candidates = sorted(
        {path for folder in folders for path in folder.glob("*ground_truth*.txt")}
        | set(resolved.parent.glob(f"{glob.escape(resolved.stem)}.txt"))
    )
    if len(candidates) != 1:
        fault = f"{len(candidates)} files look like label files" if candidates else "no label file is next to this path"
        raise UserError(f"{root}: the images have no class folders, and {fault}. Name the file with --labels FILE.")
    say(f"{root}: labels from {candidates[0]}.")
    return candidates[0]


def _positive_number(text: str, file: Path, line_number: int) -> int:
    text = text.strip()
    if not text.isdecimal() or _parse_decimal(text) < 1:
        raise UserError(f"--labels {file}, line {line_number}: {text[:40]!r}, expected a whole number from 1.")
    return _parse_decimal(text)


def _parse_decimal(text: str) -> int:
    """Convert decimal digits to an int. Returns 10^18 for 19 or more digits, since int() refuses very long numbers."""
    return int(text) if len(text) < 19 else 10**18

"""Inputs of formats that give a label with each input: rows of Parquet files and CSV lists, samples of WebDatasets.

A label is the name of a class, or, if all labels are numbers, the position of a class, counted from 0
(LabelledRows.found has the exceptions). If the name of an input in a Parquet file or WebDataset has no folder, the
input gets the name CLASS/NAME, so that the images give the same records as in class folders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from prep.console import UserError, count_noun
from prep.inputs.classes import examples, is_number, order_classes, wanted_classes
from prep.inputs.labels.devkit import open_devkit
from prep.inputs.labels.numbers import LabelTexts, refuse_odd_labels
from prep.inputs.listing import OWN_FILE, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs, ListOptions

NO_LABEL = "no label"


class LabelledRows:
    """Collects inputs with their labels. `origin` names the file or folder in messages."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.rows = Listing()  # the labels in the listing are indices into `texts`
        self.texts: dict[str, int] = {}  # label as text -> index of this text
        self.labels_are_names = False  # whether every label is the name of a class, even a label of digits
        self.refused: list[tuple[str, str]] = []  # (name, reason)
        self.unlabelled: list[str] = []  # names of the refused inputs whose class is not known
        self.ignored: list[tuple[str, str]] = []  # (name, reason)

    def refuse(self, path: bytes, label: str, reason: str) -> None:
        """Refuse an input. The class of a refused input remains a class, so that other classes keep their labels.

        If `label` is empty, the class of the input is not known; see `found`.
        """
        self.refused.append((name_text(path), reason))
        if label:
            self.texts.setdefault(label, len(self.texts))
        else:
            self.unlabelled.append(name_text(path))

    def add(self, path: bytes, label: str, size: int, mtime_ns: int, location: int = OWN_FILE) -> None:
        """Add an input. `label` is the name of a class or a number from 0. An empty label is refused."""
        if not label:
            self.refuse(path, label, NO_LABEL)
            return
        self.rows.add(path, self.texts.setdefault(label, len(self.texts)), size, mtime_ns, location)

    def sort(self) -> None:
        """Sort the inputs by path."""
        inputs, self.rows = self.rows, Listing()
        for k in sorted(range(len(inputs)), key=inputs.path):
            item = inputs[k]
            self.rows.add(item.path, item.label, item.size, item.mtime_ns, item.location)

    def found(
        self,
        names: Sequence[str],
        options: ListOptions,
        store_classes: Sequence[str],
        in_class_folders: bool,
        are_positions: bool = True,
    ) -> FoundInputs:
        """Return all inputs with their classes.

        If all labels are numbers and `are_positions` is true, a label is the position of a class, unless a class of the
        store has a number as its name. If `are_positions` is false, or a class of the store has such a name, a number
        can also be the name of a class, as in a label file. UserError is raised if both meanings are possible, unless
        `options.label_order` states the meaning.

        The first of these lists that exists has the classes in the order of the labels: `names` (from the format
        itself), the file `options.class_file`, `store_classes`. If no list exists, the labels give the classes: the
        names in their order, or the numbers from 0 to the largest label. If `in_class_folders` is true, an input whose
        name has no folder gets its class as the folder. Raises UserError if there is no input, if a label is no class,
        or if two inputs have the same name. Unless `options.allow_empty_classes` is true, also raises UserError if an
        input has no label and no list of all classes is given.
        """
        if not len(self.rows):
            raise UserError(f"{self.origin}: {_first_reason(self.refused)}.")
        if self.unlabelled and not (names or store_classes or options.class_file or options.allow_empty_classes):
            raise UserError(
                f"{self.origin}: {count_noun(len(self.unlabelled), 'image')} without a label "
                f"({examples(self.unlabelled)}), so a class may be missing, and other classes may get its label. Add "
                "the labels, remove these images, or name all classes with --classes FILE. With --allow-empty-classes, "
                "only the classes of the other images become classes."
            )
        texts = list(self.texts)
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{self.origin}: two classes have the name {twice}. Every class needs a unique name.")
        if not names and not self.labels_are_names:
            labels, classes = self._read_texts(options, store_classes, are_positions)
        elif not self.labels_are_names and all(map(is_number, texts)):
            labels, classes = [int(text) for text in texts], tuple(names)
            if max(labels) >= len(classes):
                raise UserError(
                    f"{self.origin}: label {max(labels)}, but the list of class names has {len(classes)} classes, with "
                    f"the labels 0 to {len(classes) - 1}."
                )
        else:
            known = set(names)
            unknown = [text for text in texts if text not in known]
            if names and unknown:
                raise UserError(
                    f"{self.origin}: {len(unknown):,} of the labels ({examples(unknown)}) "
                    f"{'is' if len(unknown) == 1 else 'are'} not among the {len(names):,} class names "
                    f"({examples(names)}). Correct the labels or the list of class names."
                )
            classes = tuple(names) or order_classes(texts, self.origin)
            labels = _positions(texts, classes)
        listing = Listing()
        for row in self.rows:
            item = replace(row, label=labels[row.label])
            folder = b"" if b"/" in item.path or not in_class_folders else classes[item.label].encode() + b"/"
            listing.add(folder + item.path, item.label, item.size, item.mtime_ns, item.location)
        double = duplicate_path(listing)
        if double is not None:
            raise UserError(
                f"{self.origin}: two images have the name {name_text(double)}. Every image needs a unique name."
            )
        return FoundInputs(listing, classes, False, tuple(self.refused), tuple(self.ignored))

    def _read_texts(
        self, options: ListOptions, store_classes: Sequence[str], are_positions: bool
    ) -> tuple[list[int], tuple[str, ...]]:
        """Return the label of each of `texts`, and the classes. For formats that do not list the classes themselves."""
        texts = list(self.texts)
        classes, owner = wanted_classes(options.class_file, texts, store_classes)

        def example(text: str) -> str:
            return f"The label {text}"

        label_texts = LabelTexts(
            self.origin,
            texts,
            classes,
            owner,
            lambda: None if options.devkit is None else open_devkit(options.devkit),
            example,
        )
        order = options.label_order
        if are_positions and not label_texts.are_numbers:
            refuse_odd_labels(self.origin, texts, classes, example)
            classes = order_classes(texts, self.origin)
            return _positions(texts, classes), classes
        if are_positions and order is None and not any(map(is_number, classes)):
            order = "sorted-from-0"  # in a store whose classes are numbers, a number in the source could also be a name
        label_of, classes, _ = label_texts.resolve(order, False)
        return [label_of[text] for text in texts], classes


def _positions(texts: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Return the position of each text in `classes`, in which each text occurs once."""
    position = {name: label for label, name in enumerate(classes)}
    return [position[text] for text in texts]


def _first_reason(refused: Sequence[tuple[str, str]]) -> str:
    return f"no image with a label (first: {refused[0][0]}: {refused[0][1]})" if refused else "no image found"


def duplicate_path(listing: Listing) -> bytes | None:
    """Return a path that occurs twice in a listing, or None if all paths differ."""
    hashes = np.fromiter((hash(listing.path(k)) for k in range(len(listing))), np.int64, len(listing))
    order = np.argsort(hashes, kind="stable")
    same = order[1:][hashes[order[1:]] == hashes[order[:-1]]]  # different paths rarely have equal hashes
    seen: set[bytes] = set()
    for k in order[np.isin(hashes[order], hashes[same])].tolist():
        if listing.path(k) in seen:
            return listing.path(k)
        seen.add(listing.path(k))
    return None

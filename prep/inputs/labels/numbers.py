"""Converts the texts in a label file to labels.

A text is the name of a class, or a number with one of several meanings.

If a text can mean two different classes, the program does not guess: UserError asks for --label-order.

| label order   | meaning of the number k                                                           |
| ------------- | --------------------------------------------------------------------------------- |
| sorted        | position k in the order of the classes, counted from 1                            |
| sorted-from-0 | position k in the order of the classes, counted from 0, as in Caffe's val.txt     |
| name          | the class whose name is k                                                         |
| devkit        | the class whose ILSVRC2012_ID is k in the meta.mat of the devkit                  |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from prep.console import UserError, count_noun
from prep.inputs.classes import examples, is_number, numbered_classes, order_classes
from prep.inputs.labels.devkit import DEVKIT_NAME, Devkit
from prep.inputs.names import composed

LABEL_ORDERS = ("sorted", "sorted-from-0", "name", "devkit")

_NO_LABELS = ("nan", "<na>", "#n/a", "n/a")  # texts that programs write for a missing label, in lower case
# Patterns of numbers that cannot be labels, each with the text that says what is expected instead.
_ODD_NUMBERS = (
    (re.compile(r"-\d+"), "a number from 0"),
    (re.compile(r"[-+]?(\d+\.\d*|\.\d+)(e[-+]?\d+)?|[-+]?\d+e[-+]\d+|\+\d+|\d{19,}", re.I), "a whole number"),
)

_FIRST_NUMBERS = {"sorted": 1, "sorted-from-0": 0}


@dataclass(frozen=True)
class LabelTexts:
    """The distinct label texts of a file, before their meaning is known."""

    where: str  # `--labels FILE`, for messages
    texts: Sequence[str]  # each label text of the file, once
    classes: tuple[str, ...]  # classes of the store or of --classes; empty if the label file itself gives the classes
    owner: str  # text for messages that says where `classes` come from
    devkit: Callable[[], Devkit | None]
    example: Callable[[str], str]  # for messages: returns a line of the file that has a given text

    @cached_property
    def are_numbers(self) -> bool:
        """Return whether all texts are whole numbers from 0."""
        return all(is_number(text) for text in self.texts)

    def resolve(self, order: str | None, is_ground_truth: bool) -> tuple[dict[str, int], tuple[str, ...], str]:
        """Return {text: label}, the classes, and the label order that was used.

        `order` is the value of --label-order, or None if the option is not given. `is_ground_truth` says whether the
        lines of the file have only labels and no names. Raises UserError if a text is no class, or if the texts can
        have more than one meaning.
        """
        refuse_odd_labels(self.where, self.texts, self.classes, self.example, may_mix=order == "name")
        if order is None and is_ground_truth and self.are_numbers:
            order = "devkit"
            if self.devkit() is None:
                raise UserError(
                    f"{self.where}: a list of numbers without names is read as ILSVRC's ground truth. The numbers "
                    f"are those of ILSVRC's devkit, whose meta.mat is needed. Download {DEVKIT_NAME}.tar.gz from "
                    "https://image-net.org, and put it beside the label file or pass it with --devkit FILE. If number "
                    "k is the k-th class in sorted order, pass --label-order sorted."
                )
        if order is not None:
            read = self._read(order)
            if isinstance(read, str):
                raise UserError(f"{self.where}: {read}.")
            return *read, order
        return self._guess()

    def _guess(self) -> tuple[dict[str, int], tuple[str, ...], str]:
        """Return the same values as `resolve`, with the label order that fits the texts.

        Raises UserError if no order fits, if only `sorted` fits, or if several orders give different labels.
        """
        orders = ["name", "sorted-from-0", "sorted"] if self.are_numbers else ["name"]
        read = {order: self._read(order) for order in orders}
        possible = {order: result for order, result in read.items() if not isinstance(result, str)}
        if not possible:
            raise UserError(f"{self.where}: {read[orders[-1]] if len(orders) == 1 else read['sorted-from-0']}.")
        if self.classes and "name" in possible:
            possible.pop("sorted", None)  # texts that are names of classes are not read as positions from 1
        if not self.classes and self._is_run_of_numbers():
            possible = {"name": possible["name"]}
        labels = [result[0] for result in possible.values()]
        is_counted_from_1 = set(possible) == {"sorted"}
        if is_counted_from_1 or any(other != labels[0] for other in labels[1:]):
            raise UserError(self._question(possible))
        order = next(iter(possible))
        return *possible[order], order

    def _question(self, possible: Mapping[str, tuple[dict[str, int], tuple[str, ...]]]) -> str:
        first = next(iter(possible.values()))[0]
        text = next((text for text in self.texts if any(r[0][text] != first[text] for r in possible.values())), "")
        text = text or self.texts[0]
        ways = [f"{order}: class {classes[of[text]]}, label {of[text]}" for order, (of, classes) in possible.items()]
        if self.classes and "name" not in possible:
            ways.append("devkit: the class of this number in ILSVRC's meta.mat")
        return (
            f"{self.where}: it is unclear what the numbers mean. {self.example(text)} can be read with --label-order "
            f"{'; '.join(ways)}. Pass --label-order with one of these values."
        )

    def _is_run_of_numbers(self) -> bool:
        """Return whether the texts are the numbers 0 to K − 1 or the numbers 1 to K."""
        if not self.are_numbers:
            return False
        numbers = sorted(int(text) for text in self.texts)
        return numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[0] + len(numbers)))

    def _read(self, order: str) -> tuple[dict[str, int], tuple[str, ...]] | str:
        """Return {text: label} and the classes, or the reason why the texts cannot be read in this label order."""
        if order == "name":
            return self._read_names()
        wrong = next((text for text in self.texts if not is_number(text)), None)
        if wrong is not None:
            return f"label {wrong[:40]!r}, expected a whole number for --label-order {order}"
        if order == "devkit":
            return self._read_devkit_numbers()
        first = _FIRST_NUMBERS[order]
        numbers = {text: int(text) for text in self.texts}
        smallest, largest = min(numbers.values()), max(numbers.values())
        if smallest < first:
            return f"number {smallest}, but numbers of --label-order {order} begin with {first}"
        classes = self.classes or numbered_classes(first, largest, self.where)
        if largest - first >= len(classes):
            return (
                f"number {largest}, but {self.owner} has {count_noun(len(classes), 'class', 'classes')}, numbers "
                f"{first} to {len(classes) - 1 + first} in --label-order {order}"
            )
        return {text: number - first for text, number in numbers.items()}, classes

    def _read_names(self) -> tuple[dict[str, int], tuple[str, ...]] | str:
        classes = self.classes or order_classes(self.texts, self.where)
        label_of = {composed(name): label for label, name in enumerate(classes)}
        if self.are_numbers and all(is_number(name) for name in classes):  # the text 7 may be the class 007
            by_number = {int(name): label for label, name in enumerate(classes)}
            label_of |= {text: by_number[int(text)] for text in self.texts if int(text) in by_number}
        unknown = sorted(text for text in self.texts if composed(text) not in label_of)
        if unknown:
            return (
                f"{count_noun(len(unknown), 'label')} ({examples(unknown)}) {'is' if len(unknown) == 1 else 'are'} not "
                f"among the {count_noun(len(classes), 'class', 'classes')} of {self.owner} (first: {classes[0]})"
            )
        return {text: label_of[composed(text)] for text in self.texts}, classes

    def _read_devkit_numbers(self) -> tuple[dict[str, int], tuple[str, ...]] | str:
        devkit = self.devkit()
        if devkit is None:
            return (
                f"--label-order devkit needs the devkit's meta.mat, and none was found. Download {DEVKIT_NAME}.tar.gz "
                "from https://image-net.org and pass it with --devkit FILE"
            )
        synsets = devkit.synsets()
        numbers = {text: int(text) for text in self.texts}
        unknown = [number for number in numbers.values() if number not in synsets]
        if unknown:
            return f"number {unknown[0]} is not in {devkit.path}, which has the numbers 1 to {max(synsets)}"
        classes = self.classes or tuple(sorted(synsets[k] for k in synsets if k <= max(numbers.values())))
        label_of = {name: label for label, name in enumerate(classes)}
        missing = sorted({synsets[number] for number in numbers.values()}.difference(classes))
        if missing:
            return (
                f"the synsets {examples(missing)} of {devkit.path} are not among the "
                f"{count_noun(len(classes), 'class', 'classes')} of {self.owner} (first: {classes[0]})"
            )
        return {text: label_of[synsets[number]] for text, number in numbers.items()}, classes


def refuse_odd_labels(
    where: str, texts: Sequence[str], known: Collection[str], example: Callable[[str], str], may_mix: bool = False
) -> None:
    """Raise UserError for labels that are neither names nor positions of classes: `-1`, `1.0`, `nan`.

    If no classes are `known`, a mixture of numbers and other texts is refused, too. `may_mix` allows such a mixture.
    `example` returns a line of the file with a given text, for the message.
    """
    unknown = [text for text in texts if text not in known]
    for pattern, expected in _ODD_NUMBERS:
        odd = next((text for text in unknown if pattern.fullmatch(text)), None)
        if odd is not None:
            raise UserError(
                f"{where}: label {odd[:40]}, expected the name of a class or {expected}. {example(odd)[:100]}."
            )
    missing = next((text for text in unknown if text.lower() in _NO_LABELS), None)
    if missing is not None:
        raise UserError(
            f"{where}: label {missing}, which means that there is no label. See {example(missing)[:100]}. Write the "
            "label, or remove the line and the image."
        )
    number = next((text for text in unknown if is_number(text)), None)
    word = next((text for text in unknown if not is_number(text)), None)
    if not (known or may_mix) and number is not None and word is not None:
        raise UserError(
            f"{where}: label {word[:40]} is not a number, but other labels are numbers, such as {number}. See "
            f"{example(word)[:100]}. Correct the line. If both labels are names of classes, pass --label-order name, "
            "or give the names with --classes FILE."
        )


def empty_classes(classes: Sequence[str], labels: Collection[int]) -> list[str]:
    """Return the classes whose labels are not among `labels`."""
    present = set(labels)
    return [name for label, name in enumerate(classes) if label not in present]

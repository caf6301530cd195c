"""A number in a label file can be the name of a class, or the position of a class in the order of the classes.

If both meanings are possible and give different labels, an error asks for --label-order. The expected labels for each
meaning are written by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from prep.console import UserError
from prep.inputs.reader import ListOptions
from prep.inputs.sources import list_source
from tests.helpers.listings import label_file, labels_of, list_labelled, touch, write_devkit

WORDS = ("ape", "cat", "dog", "eel")
FROM_1 = ("1", "2", "3", "4")
SYNSETS = ("n01", "n02", "n03", "n04")


def labels_for(numbers: str, tmp_path: Path, order: str | None = None, classes: tuple[str, ...] = ()) -> list[int]:
    """Write a label file that gives the words of `numbers` to a.jpg, b.jpg and so on.

    Return the labels that are read from this file.
    """
    names = [f"{chr(97 + k)}.jpg" for k in range(len(numbers.split()))]
    root = touch(tmp_path / "photos", *names)
    rows = [f"{name} {text}\n" for name, text in zip(names, numbers.split(), strict=True)]
    return labels_of(list_labelled(root, label_file(tmp_path, "".join(rows)), order, classes))


@pytest.mark.parametrize(
    ("numbers", "classes", "expected"),
    [
        ("0 2 1 3", WORDS, [0, 2, 1, 3]),  # 0 occurs, so the numbers are positions from 0
        ("0 1 1 0", WORDS, [0, 1, 1, 0]),
        ("4 1 2 3", FROM_1, [3, 0, 1, 2]),  # 4 is not a position from 0, so the numbers are names
        ("0 1 2 3", ("0", "1", "2", "3"), [0, 1, 2, 3]),
        ("2 1", ("0", "1", "2", "3"), [2, 1]),  # names and positions from 0 give the same labels
        ("20 10", ("10", "20", "30"), [1, 0]),  # 20 is not a position, so the numbers are names
        ("0 3 1", FROM_1, [0, 3, 1]),  # 0 is not a name, so the numbers are positions from 0
        ("7 008", ("007", "8"), [0, 1]),  # 7 and 007 are the same number in different spellings
        ("3 1 2", (), [2, 0, 1]),  # without a store, the numbers 1 to 3 are names, sorted as numbers
        ("10 0 1 2 3 4 5 6 7 8 9", (), [10, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ("ape dog ape", WORDS, [0, 2, 0]),
    ],
)
def test_a_clear_number_needs_no_option(
    numbers: str, classes: tuple[str, ...], expected: list[int], tmp_path: Path
) -> None:
    assert labels_for(numbers, tmp_path, None, classes) == expected


@pytest.mark.parametrize(
    ("numbers", "classes", "readings"),
    [
        ("1 2 3", FROM_1, {"name": [0, 1, 2], "sorted-from-0": [1, 2, 3]}),
        ("1 2 3", WORDS, {"sorted-from-0": [1, 2, 3], "sorted": [0, 1, 2]}),
        ("1 2 4", WORDS, {"sorted": [0, 1, 3]}),  # unclear because the devkit's numbers begin with 1, too
        # In a store that an earlier alexprep built, the classes can be in another order than their numbers.
        ("1 2", ("10", "2", "1"), {"name": [2, 1], "sorted-from-0": [1, 2]}),
        ("0 2 5", (), {"name": [0, 1, 2]}),
    ],
)
def test_an_unclear_number_is_asked_for(
    numbers: str, classes: tuple[str, ...], readings: dict[str, list[int]], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--label-order") as caught:
        labels_for(numbers, tmp_path, None, classes)
    assert "labels.txt" in str(caught.value) and "unclear" in str(caught.value)
    for order, expected in readings.items():
        assert order in str(caught.value)
        assert labels_for(numbers, tmp_path, order, classes) == expected


def test_numbers_in_a_list_of_paths_must_be_clear_too(tmp_path: Path) -> None:
    root = touch(tmp_path, "d/a.jpg", "d/b.jpg", "d/c.jpg")
    listed = label_file(root, "path,label\nd/a.jpg,1\nd/b.jpg,2\nd/c.jpg,3\n", "list.csv")
    with pytest.raises(UserError, match=r"list\.csv: it is unclear what the numbers mean.*--label-order name"):
        list_source(listed, "val", ListOptions(), FROM_1)
    for order, expected in (("name", [0, 1, 2]), ("sorted-from-0", [1, 2, 3])):
        options = ListOptions(label_order=order, allow_empty_classes=True)
        assert labels_of(list_source(listed, "val", options, FROM_1)) == expected
    assert list_source(listed, "train").classes == ("1", "2", "3")


def test_numbers_with_gaps_leave_classes_without_a_photograph(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"3 classes have no photograph: 1, 3, 4\."):
        labels_for("0 2 5", tmp_path, "sorted-from-0")


def test_devkit_numbers_may_follow_names(tmp_path: Path) -> None:
    write_devkit(tmp_path / "meta.mat", {1: "n03", 2: "n01", 3: "n02", 4: "n04"})
    with pytest.raises(UserError, match="devkit"):
        labels_for("1 2 3 4", tmp_path, None, SYNSETS)
    assert labels_for("1 2 3 4", tmp_path, "devkit", SYNSETS) == [2, 0, 1, 3]


@pytest.mark.parametrize(
    ("numbers", "order", "classes", "part"),
    [
        ("1 x", "sorted", WORDS, "label 'x', expected a whole number for --label-order sorted"),
        ("0 1", "sorted", WORDS, "number 0, but numbers of --label-order sorted begin with 1"),
        ("1 5", "sorted", WORDS, "number 5, but the store has 4 classes, numbers 1 to 4"),
        ("0 4", "sorted-from-0", WORDS, "number 4, but the store has 4 classes, numbers 0 to 3"),
        ("0 1", "name", WORDS, "2 labels (0, 1) are not among the 4 classes of the store (first: ape)"),
        ("ape owl", None, WORDS, "1 label (owl) is not among the 4 classes of the store (first: ape)"),
        ("9 0", None, WORDS, "number 9, but the store has 4 classes"),
        ("1.0 2.0 10.0", None, (), "label 1.0, expected the name of a class or a whole number"),
        ("1 01", None, (), "the same number"),
        ("1 10 2 x", None, (), "--classes FILE"),
    ],
)
def test_labels_that_cannot_be_read_are_one_line(
    numbers: str, order: str | None, classes: tuple[str, ...], part: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        labels_for(numbers, tmp_path, order, classes)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)

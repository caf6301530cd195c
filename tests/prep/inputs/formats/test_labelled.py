"""prep.inputs.formats.labelled: labels of many classes."""

from __future__ import annotations

import pytest

from prep.console import UserError
from prep.inputs.formats.labelled import LabelledRows
from prep.inputs.reader import DEFAULT_OPTIONS

CLASSES = 60_000


@pytest.mark.parametrize("given", ["names", "no names", "a name twice"])
@pytest.mark.timeout(15)
def test_the_labels_of_many_classes_are_found_at_once(given: str) -> None:
    """If the code searched through all classes for each label, this test would take minutes."""
    rows, names = LabelledRows("list"), [f"class {number:06d}" for number in range(CLASSES)]
    for name in reversed(names):
        rows.add(f"{name}.jpg".encode(), name, 1, 1)
    if given == "a name twice":
        with pytest.raises(UserError, match="two classes have the name class 059999"):
            rows.found([*names, names[-1]], DEFAULT_OPTIONS, (), True)
        return
    found = rows.found(names if given == "names" else (), DEFAULT_OPTIONS, (), True)
    assert found.classes == tuple(names)
    assert [item.label for item in found.listing] == list(range(CLASSES))[::-1]

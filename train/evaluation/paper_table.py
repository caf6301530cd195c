"""The rows of table 2 of Krizhevsky, Sutskever and Hinton (2012): error rates on the split val of ILSVRC-2012."""

from __future__ import annotations

from typing import Any, NamedTuple

ILSVRC_CLASSES = 1000


class PaperRow(NamedTuple):
    """A row of table 2. The error rates, in 0..1, are those of the average over ten views."""

    name: str  # the paper's name of the row
    top1_error: float
    top5_error: float
    remark: str = ""  # how the paper's networks differ from an ensemble of this project

    def text(self) -> str:
        """Return the row as a line of text."""
        errors = f"top-1 error {self.top1_error:.1%}, top-5 error {self.top5_error:.1%}"
        return f"The paper, table 2, {self.name}: {errors}." + (f" {self.remark}" if self.remark else "")

    def as_json(self) -> dict[str, Any]:
        """Return the row as JSON values."""
        return self._asdict()


ROWS = {
    1: PaperRow("1 CNN", 0.407, 0.182),
    5: PaperRow("5 CNNs", 0.381, 0.164),
    7: PaperRow(
        "7 CNNs*",
        0.367,
        0.154,
        "The row averages the five networks of the row 5 CNNs and two other networks, which have a sixth convolutional "
        "layer and were pre-trained on the ImageNet 2011 Fall release. This project does not train such networks.",
    ),
}


def paper_row(networks: int, classes: int, views: int | str | None, split: str) -> PaperRow | None:
    """Return the row to compare with the average of `networks` networks.

    Returns None if the paper has no such row, or if the evaluation differs from the paper's. The paper evaluates ten
    views of the split val, with 1,000 classes.
    """
    comparable = classes == ILSVRC_CLASSES and views == 10 and split == "val"
    return ROWS.get(networks) if comparable else None

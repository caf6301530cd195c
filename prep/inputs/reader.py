"""What every kind of input gives: a listing of pictures, and a reader of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from prep.console import count_noun, say
from prep.inputs.listing import Input, Listing

Content = bytes | npt.NDArray[np.uint8]  # a file's bytes, or RGB pixels where a record holds bare ones


class Place(Protocol):
    """Reads inputs; small enough to send to a worker or another machine."""

    @property
    def root(self) -> Path:
        """Where the inputs are, for messages."""

    def read(self, item: Input) -> Content:
        """What one input holds. Raises BadImage where it cannot be read, UserError where it has changed."""

    def head(self, item: Input, size: int) -> bytes:
        """The first `size` bytes of one input, or fewer; raises BadImage where it cannot be read."""


@dataclass(frozen=True)
class Source:
    """All inputs of one split, in the order of class and name, and the entries that are none."""

    place: Place
    split: str
    classes: tuple[str, ...]
    inputs: Listing
    refused: tuple[tuple[str, str], ...] = ()  # (name, why)


@dataclass(frozen=True)
class Found:
    """What a folder or an archive holds: photographs with the labels of their class folders, or flat ones."""

    listing: Listing
    classes: tuple[str, ...]
    flat: bool
    refused: tuple[tuple[str, str], ...]


def say_empty(root: Path, empty: Sequence[str]) -> None:
    """Tell of classes that have no photograph."""
    if empty:
        say(f"{root}: {count_noun(len(empty), 'class', 'classes')} without a photograph (first: {empty[0]}).")

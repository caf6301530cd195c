"""Interface of the input formats: the list of the images with their labels, and a reader of their contents.

A format is a module with a function that lists its images, and a class that is an InputReader.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from prep.console import count_noun, say
from prep.inputs.listing import Input, Listing

Content = bytes | npt.NDArray[np.uint8]  # an encoded file, or RGB pixels (H, W, 3) where a record holds bare pixels


class InputReader(Protocol):
    """Reads inputs by their entry in the listing. It is pickled for worker processes, so it holds paths, not files."""

    @property
    def root(self) -> Path:
        """The folder or file that holds the inputs, for messages."""

    def read(self, item: Input) -> Content:
        """The content of one input. Raises BadImage if it cannot be read, UserError if it changed since the listing."""

    def head(self, item: Input, size: int) -> bytes:
        """The first `size` bytes of one input, or fewer if it is shorter. Raises BadImage if it cannot be read."""


@dataclass(frozen=True)
class Source:
    """All inputs of one split, sorted by class and name, and the entries that are not inputs."""

    reader: InputReader
    split: str
    classes: tuple[str, ...]
    inputs: Listing
    refused: tuple[tuple[str, str], ...] = ()  # (name, reason)


@dataclass(frozen=True)
class FoundInputs:
    """Images found in a folder or an archive, labelled by their class folders if they have any."""

    listing: Listing
    classes: tuple[str, ...]
    is_flat: bool  # no class folders: all labels are 0 and `classes` is empty
    refused: tuple[tuple[str, str], ...]  # (name, reason)


def warn_of_empty_classes(root: Path, names: Sequence[str]) -> None:
    """Warn about class folders without an image; the classes keep their labels."""
    if names:
        say(f"{root}: {count_noun(len(names), 'class', 'classes')} without an image (first: {names[0]}).")

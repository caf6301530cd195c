"""Interface of the input formats: a list of the images with their labels, and a reader of the image contents.

Each format has a module with a function that lists the images and a class that implements InputReader.
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

Content = bytes | npt.NDArray[np.uint8]  # an encoded image file, or the RGB pixels (H, W, 3) of a Caffe Datum


class InputReader(Protocol):
    """Reads the content of listed inputs. Readers are pickled for worker processes and must not hold open files."""

    @property
    def root(self) -> Path:
        """The folder or file that holds the inputs, for messages."""

    def read(self, item: Input) -> Content:
        """The content of one input. Raises BadImage if reading fails, UserError if the input changed since listing."""

    def head(self, item: Input, size: int) -> bytes:
        """The first `size` bytes of one input, or fewer if the input is shorter. Raises BadImage if reading fails."""


@dataclass(frozen=True)
class Source:
    """All inputs of one split and the refused entries. Inputs of folders and archives are sorted by class and name."""

    reader: InputReader
    split: str
    classes: tuple[str, ...]
    inputs: Listing
    refused: tuple[tuple[str, str], ...] = ()  # (name, reason)


@dataclass(frozen=True)
class FoundInputs:
    """Images found in a folder or an archive. If there are class folders, they give the labels."""

    listing: Listing
    classes: tuple[str, ...]
    is_flat: bool  # True if there are no class folders; then all labels are 0 and `classes` is empty
    refused: tuple[tuple[str, str], ...]  # (name, reason)


def warn_of_empty_classes(root: Path, names: Sequence[str]) -> None:
    """Warn about class folders without an image. Each of these classes still has a label."""
    if names:
        say(f"{root}: {count_noun(len(names), 'class', 'classes')} without an image (first: {names[0]}).")

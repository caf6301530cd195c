"""Interface of the input formats: a list of the images with their labels, and a reader of the image contents.

Each format has a module with a function that lists the images, and that returns an InputReader for their contents.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from prep.inputs.listing import Input, Listing
from prep.inputs.selection import ExclusionList
from prep.store.extra import Column

Content = bytes | npt.NDArray[np.uint8]  # an encoded image file, or the RGB pixels (H, W, 3) of a Caffe Datum


class InputReader(Protocol):
    """Reads the content of listed inputs. Readers are pickled for worker processes and must not hold open files."""

    @property
    def root(self) -> Path:
        """The folder or file that holds the inputs, for messages."""

    def read(self, item: Input) -> Content:
        """Return the content of one input.

        Raises BadImage if reading fails, and UserError if the input has changed since it was listed.
        """

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of one input, or fewer bytes if the input is shorter.

        Raises BadImage if reading fails.
        """


@runtime_checkable
class UnpackingReader(InputReader, Protocol):
    """A reader that reads single inputs slowly, but is faster if it may first unpack the inputs into a folder."""

    def unpacking_into(self, folder: Path, free_bytes: int) -> InputReader:
        """Return a reader that unpacks inputs into `folder`, or `self` if `free_bytes` of disk space are not enough."""


@dataclass(frozen=True)
class ListOptions:
    """Options of `alexprep build-lmdb` that say how a split is listed, and where its labels come from."""

    labels: Path | None = None  # label file of images without class folders; None: use the label file beside the images
    # Meaning of numbers in a label file, one of LABEL_ORDERS. If None, the numbers must allow only one meaning.
    label_order: str | None = None
    # ILSVRC's devkit as a folder, .tar.gz or meta.mat; None: use the devkit beside the images.
    devkit: Path | None = None
    class_file: Path | None = None  # file with the classes in the order of the labels
    allow_empty_classes: bool = False  # whether a class may have no photographs
    follow_links: bool = False  # whether symbolic links that lead out of the source are followed
    exclude: ExclusionList | None = None  # photographs to leave out


DEFAULT_OPTIONS = ListOptions()


@dataclass(frozen=True)
class Source:
    """All inputs of one split, and the files that were refused or ignored.

    The inputs of folders and archives are sorted by class and name.
    """

    reader: InputReader
    split: str
    classes: tuple[str, ...]
    inputs: Listing
    # Name of each refused file, and the reason for refusing it. A refused file counts as a bad input.
    refused: tuple[tuple[str, str], ...] = ()
    # Name of each file or folder that is not an input, such as a file beside class folders, and the reason.
    ignored: tuple[tuple[str, str], ...] = ()
    labels_from: Path | None = None  # the label file that was read; None if class folders give the labels
    # Numbers of the lines of the label file, without the lines of an image that several lines name. None if there is no
    # label file.
    label_lines: npt.NDArray[np.int64] | None = field(default=None, compare=False)
    # Name of an extra field -> the values of the inputs in this field, in the order of `inputs`.
    extra: Mapping[str, Column] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class FoundInputs:
    """Images found in a folder or an archive. If there are class folders, the class folders give the labels."""

    listing: Listing
    classes: tuple[str, ...]
    is_flat: bool  # True if the images have no class folders and no labels yet: labels are 0, and `classes` is empty
    refused: tuple[tuple[str, str], ...]  # (name, reason); see Source.refused
    ignored: tuple[tuple[str, str], ...] = ()  # (name, reason); see Source.ignored
    root: Path | None = None  # folder to which the names are relative; None means the folder that was listed

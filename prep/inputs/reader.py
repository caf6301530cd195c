"""Interface of the input formats: a list of the images with their labels, and a reader of the image contents.

Each format has a module with a function that lists the images and a class that implements InputReader.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from prep.inputs.listing import Input, Listing
from prep.inputs.selection import ExclusionList

Content = bytes | npt.NDArray[np.uint8]  # an encoded image file, or the RGB pixels (H, W, 3) of a Caffe Datum


class InputReader(Protocol):
    """Reads the content of listed inputs. Readers are pickled for worker processes and must not hold open files."""

    @property
    def root(self) -> Path:
        """The folder or file that holds the inputs, for messages."""

    def read(self, item: Input) -> Content:
        """Return the content of one input.

        Raises BadImage if reading fails, UserError if the input changed since listing.
        """

    def head(self, item: Input, size: int) -> bytes:
        """Return the first `size` bytes of one input, or fewer if the input is shorter.

        Raises BadImage if reading fails.
        """


@runtime_checkable
class UnpackingReader(InputReader, Protocol):
    """A reader that reads single inputs slowly, and faster if it may first unpack them into a folder."""

    def unpacking_into(self, folder: Path, free_bytes: int) -> InputReader:
        """Return a reader that unpacks inputs into `folder` when needed, if `free_bytes` of disk space are enough."""


@dataclass(frozen=True)
class ListOptions:
    """How a split is listed, and where its labels come from: options of `alexprep build-lmdb`."""

    labels: Path | None = None  # label file of images without class folders; None: the label file beside the images
    # Meaning of numbers in a label file, one of LABEL_ORDERS; None: the meaning must be unambiguous.
    label_order: str | None = None
    devkit: Path | None = None  # ILSVRC's devkit: folder, .tar.gz or meta.mat; None: the devkit beside the images
    class_file: Path | None = None  # file with the classes in the order of the labels
    allow_empty_classes: bool = False  # a class may lack photographs
    follow_links: bool = False  # symbolic links that lead out of the source are followed
    exclude: ExclusionList | None = None  # files to leave out


DEFAULT_OPTIONS = ListOptions()


@dataclass(frozen=True)
class Source:
    """All inputs of one split and the refused entries. Inputs of folders and archives are sorted by class and name."""

    reader: InputReader
    split: str
    classes: tuple[str, ...]
    inputs: Listing
    refused: tuple[tuple[str, str], ...] = ()  # (name, reason); each of them is a bad input
    # (name, reason) of entries that are not inputs, such as files beside class folders.
    ignored: tuple[tuple[str, str], ...] = ()
    labels_from: Path | None = None  # the label file that was read; None if folders give the labels


@dataclass(frozen=True)
class FoundInputs:
    """Images found in a folder or an archive. If there are class folders, they give the labels."""

    listing: Listing
    classes: tuple[str, ...]
    is_flat: bool  # True if there are no class folders; then all labels are 0 and `classes` is empty
    refused: tuple[tuple[str, str], ...]  # (name, reason)
    ignored: tuple[tuple[str, str], ...] = ()  # (name, reason), see Source.ignored
    root: Path | None = None  # folder to which the names are relative, if it differs from the folder that was listed

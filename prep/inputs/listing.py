"""List of the inputs of a split, and the record order of the split.

To save memory, the list has one array for each field of the inputs, and not one object for each input.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.console import UserError
from prep.files import atomic_file
from prep.schema import ArrayShape, read_npz

OWN_FILE = -1  # `location` of an input that is a separate file, not a part of an archive or LMDB

# Field of Input (all fields except `path`) -> name of the column in a saved listing.
_COLUMNS = {"label": "label", "size": "size", "mtime_ns": "stamp_ns", "location": "at"}


@dataclass(frozen=True, slots=True)
class Input:
    """One image that is to be stored."""

    # `class/name` in a folder or archive; `name` if there are no class folders; the key in a Caffe LMDB.
    path: bytes
    label: int  # 0..K−1
    size: int = 0  # size in bytes when the input was listed
    mtime_ns: int = 0  # modification time of the file, or of the archive that contains the input; 0 for an LMDB
    # Position of the content: byte offset in an archive, index of the LMDB, or a value of formats.shards.pack_location.
    location: int = OWN_FILE


class Listing:
    """Inputs in the order in which they were added. A list of a million inputs needs tens of megabytes of memory."""

    def __init__(self) -> None:
        self._paths = bytearray()
        self._ends = array("q")
        self._columns = {name: array("q") for name in _COLUMNS}

    def add(self, path: bytes, label: int, size: int = 0, mtime_ns: int = 0, location: int = OWN_FILE) -> None:
        """Append one input. The arguments are the fields of Input."""
        self._paths += path
        self._ends.append(len(self._paths))
        for name, value in zip(_COLUMNS, (label, size, mtime_ns, location), strict=True):
            self._columns[name].append(value)

    def relabelled(self, labels: Sequence[int]) -> Listing:
        """Return a listing of the same inputs in which each label k is replaced by `labels[k]`."""
        other = Listing()
        other._paths, other._ends, other._columns = self._paths, self._ends, dict(self._columns)
        if len(self):
            old = np.frombuffer(self._columns["label"], np.int64)
            other._columns["label"] = array("q", np.asarray(labels, np.int64)[old].tobytes())
        return other

    def labels(self) -> npt.NDArray[np.int64]:
        """Return the labels of all inputs: int64 (N,)."""
        return np.array(self._columns["label"], np.int64)

    def label_counts(self, classes: int) -> npt.NDArray[np.int64]:
        """Return the number of inputs of each label 0..`classes` − 1."""
        return np.bincount(self.labels(), minlength=classes)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Input:
        return Input(self.path(index), *(column[index] for column in self._columns.values()))

    def __iter__(self) -> Iterator[Input]:
        return (self[index] for index in range(len(self)))

    def path(self, index: int) -> bytes:
        """Return the path of input `index`. Raises IndexError if `index` is negative or too large."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bytes(self._paths[self._ends[index - 1] if index else 0 : self._ends[index]])

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the paths, labels and sizes of all inputs.

        Listings with equal digests may give different records, because the records also depend on the contents of the
        files and on the settings.
        """
        digest = hashlib.sha256(self._paths)
        for column in (self._ends, self._columns["label"], self._columns["size"]):
            digest.update(np.frombuffer(column, "<i8").tobytes() if len(column) else b"")
        return digest.hexdigest()

    def permutation(self, seed: int) -> npt.NDArray[np.int64]:
        """Return the record order: the indices of the inputs, sorted by a hash of the paths.

        The hash has 8 bytes, and is BLAKE2b with the key `seed`. Inputs with equal hashes are sorted by path, then by
        location. The record order therefore depends only on the paths and the seed. The record order does not depend on
        the order of the listing, or on the version of a random number generator.
        """
        key = seed.to_bytes(8, "little")
        hashes = array("Q")
        for index in range(len(self)):
            digest = hashlib.blake2b(self.path(index), digest_size=8, key=key).digest()
            hashes.append(int.from_bytes(digest, "big"))
        values = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
        order = np.argsort(values, kind="stable")
        if np.any(values[order[1:]] == values[order[:-1]]):
            locations = self._columns["location"]
            return np.array(sorted(order.tolist(), key=lambda i: (hashes[i], self.path(i), locations[i])))
        return order

    def save(self, path: Path) -> None:
        """Write all columns to a .npz file, atomically."""
        columns = {_COLUMNS[name]: column for name, column in self._arrays().items()}
        with atomic_file(path) as file:
            np.savez(file, paths=np.frombuffer(self._paths, np.uint8), ends=self._ends, **columns)

    @staticmethod
    def load(path: Path, classes: int, advice: str) -> Listing:
        """Read a file that `save` wrote; `classes` is the number of classes.

        Raises OSError if the file cannot be read. Raises UserError, with `advice` in its message, if the file is
        damaged. The arrays in the file are not compressed, so they cannot need more memory than the size of the file.
        """
        integers = ArrayShape(("<i8",), (None,))
        expected = dict.fromkeys(("ends", *_COLUMNS.values()), integers)
        expected["paths"] = ArrayShape(("|u1",), (None,))
        saved = read_npz(path, expected, path.stat().st_size, advice)
        ends, labels = saved["ends"], saved[_COLUMNS["label"]]
        for key in _COLUMNS.values():
            if len(saved[key]) != len(ends):
                raise UserError(f"{path}: {key} has {len(saved[key]):,} values, expected {len(ends):,}. {advice}")
        if np.any(np.diff(ends, prepend=0) < 0) or len(saved["paths"]) != (ends[-1] if len(ends) else 0):
            size = len(saved["paths"])
            raise UserError(f"{path}: the numbers in `ends` do not ascend to {size:,}, the length of `paths`. {advice}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
            found = f"labels from {labels.min()} to {labels.max()}"
            raise UserError(f"{path}: {found}, expected 0 to {classes - 1}. {advice}")
        listing = Listing()
        listing._paths, listing._ends = bytearray(saved["paths"].tobytes()), array("q", ends.tobytes())
        listing._columns = {name: array("q", saved[key].tobytes()) for name, key in _COLUMNS.items()}
        return listing

    def same_as(self, other: Listing) -> bool:
        """Return whether both listings have the same inputs in the same order."""
        return (self._paths, self._ends, self._columns) == (other._paths, other._ends, other._columns)

    def first_path_difference(self, later: Listing, seed: int) -> tuple[bytes, str] | None:
        """Return the first path, in record order, that occurs in only one of the two listings.

        Returns None if both listings have the same paths. The path is returned with "has gone" if only this listing has
        it, and with "is new" if only `later` has it.
        """
        before, after = self.permutation(seed).tolist(), later.permutation(seed).tolist()
        for old, new in zip_longest(before, after):
            if old is None:
                return later.path(new), "is new"
            path = self.path(old)
            if new is None or path != later.path(new):
                gone = all(path != later.path(index) for index in after)
                return (path, "has gone") if gone else (later.path(new), "is new")
        return None

    def changed_inputs(self, later: Listing, seed: int) -> dict[bytes, tuple[Input, Input]]:
        """Return {path: (before, after)} of the inputs that differ in `later`, a listing of the same paths.

        An input that has only moved within its archive counts as unchanged, if its `mtime_ns` is known and has not
        changed.
        """
        before, after = self.permutation(seed), later.permutation(seed)
        differ = np.zeros(len(before), bool)
        no_time = later._arrays()["mtime_ns"][after] == 0
        for name, new in later._arrays().items():
            changed = self._arrays()[name][before] != new[after]
            differ |= changed & no_time if name == "location" else changed
        pairs = zip(before[differ].tolist(), after[differ].tolist(), strict=True)
        return {self.path(old): (self[old], later[new]) for old, new in pairs}

    def _arrays(self) -> dict[str, Any]:
        return {name: np.frombuffer(column, np.int64) for name, column in self._columns.items()}

"""The inputs of a split as columns, so that a million of them are some dozens of megabytes, and their order."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.files import atomic_file

ALONE = -1  # `at` of an input that is a file of its own

_COLUMNS = ("label", "size", "stamp_ns", "at")


@dataclass(frozen=True, slots=True)
class Input:
    """One picture to take in."""

    path: bytes  # below the split's folder, or as in the archive: class/name or name
    label: int  # 0..K−1
    size: int = 0  # bytes, as listed
    stamp_ns: int = 0  # when the file, or the archive it is in, was last modified
    at: int = ALONE  # where in an archive it begins, or which LMDB it is in


class Listing:
    """Inputs, in the order in which they were added."""

    def __init__(self) -> None:
        self._paths = bytearray()
        self._ends = array("q")
        self._columns = {name: array("q") for name in _COLUMNS}

    def add(self, path: bytes, label: int, size: int = 0, stamp_ns: int = 0, at: int = ALONE) -> None:
        """One input more."""
        self._paths += path
        self._ends.append(len(self._paths))
        for name, value in zip(_COLUMNS, (label, size, stamp_ns, at), strict=True):
            self._columns[name].append(value)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Input:
        return Input(self.path(index), *(self._columns[name][index] for name in _COLUMNS))

    def __iter__(self) -> Iterator[Input]:
        return (self[index] for index in range(len(self)))

    def path(self, index: int) -> bytes:
        """The path of one input."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return bytes(self._paths[self._ends[index - 1] if index else 0 : self._ends[index]])

    def digest(self) -> str:
        """SHA-256 over what the records depend on beside the contents: paths, labels, and the sizes of the files."""
        whole = hashlib.sha256(self._paths)
        for column in (self._ends, self._columns["label"], self._columns["size"]):
            whole.update(np.frombuffer(column, "<i8").tobytes() if len(column) else b"")
        return whole.hexdigest()

    def order(self, seed: int) -> npt.NDArray[np.int64]:
        """The seeded permutation: by BLAKE2b (8 bytes, keyed by the seed) of the path, ties by the path itself.

        It depends on nothing but paths and seed: not on the order of the listing, nor on any generator's version.
        """
        key = seed.to_bytes(8, "little")
        hashes = array("Q")
        for index in range(len(self)):
            digest = hashlib.blake2b(self.path(index), digest_size=8, key=key).digest()
            hashes.append(int.from_bytes(digest, "big"))
        values = np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64)
        order = np.argsort(values, kind="stable")
        same = np.flatnonzero(values[order[1:]] == values[order[:-1]])
        if len(same):
            return np.array(sorted(order.tolist(), key=lambda i: (hashes[i], self.path(i), self._columns["at"][i])))
        return order

    def save(self, path: Path) -> None:
        """Write all columns to a .npz file, whole or not at all."""
        with atomic_file(path) as file:
            np.savez(file, paths=np.frombuffer(self._paths, np.uint8), ends=self._ends, **self._arrays())

    @staticmethod
    def load(path: Path) -> Listing:
        """The inverse of `save`; raises OSError or ValueError where the file is not one."""
        listing = Listing()
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
                listing._paths = bytearray(saved["paths"].tobytes())
                listing._ends = array("q", saved["ends"].tobytes())
                listing._columns = {name: array("q", saved[name].tobytes()) for name in _COLUMNS}
        except (KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{path}: {error}") from None
        return listing

    def same_as(self, other: Listing) -> bool:
        """Whether all columns agree."""
        return (self._paths, self._ends, self._columns) == (other._paths, other._ends, other._columns)

    def first_other_path(self, later: Listing, seed: int) -> tuple[bytes, str] | None:
        """A path that only one of two listings has, with "has gone" or "is new"; None where both have the same."""
        here, there = self.order(seed).tolist(), later.order(seed).tolist()
        for then, now in zip_longest(here, there):
            if then is None:
                return later.path(now), "is new"
            path = self.path(then)
            if now is None or path != later.path(now):
                gone = all(path != later.path(index) for index in there)
                return (path, "has gone") if gone else (later.path(now), "is new")
        return None

    def differing(self, later: Listing, seed: int) -> dict[bytes, tuple[Input, Input]]:
        """The inputs, then and now, in which two listings of the same paths differ."""
        here, there = self.order(seed), later.order(seed)
        differ = np.zeros(len(here), bool)
        for then, now in zip(self._arrays().values(), later._arrays().values(), strict=True):
            differ |= then[here] != now[there]
        pairs = zip(here[differ].tolist(), there[differ].tolist(), strict=True)
        return {self.path(then): (self[then], later[now]) for then, now in pairs}

    def _arrays(self) -> dict[str, Any]:
        return {name: np.frombuffer(column, np.int64) for name, column in self._columns.items()}

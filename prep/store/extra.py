"""Extra fields of a split: further labels of each record, as columns of numbers or texts beside the shards.

    train/extra/age.npy               int: int64 (N,)
    train/extra/weight.npy            float: float32 (N,)
    train/extra/box.npy               vector: float32 (N, d)
    train/extra/caption.npy           text: uint8, the UTF-8 bytes of all texts, one after another
    train/extra/caption.offsets.npy   text: int64 (N + 1,); text k has the bytes offsets[k] to offsets[k + 1] − 1

N is the number of records. Rows are in the order of the records. Numbers of the types float and vector are float32,
because images and most losses are float32 as well, so a batch needs no conversion. The manifest has type, width and
size of each field, and the digests of the files.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prep.console import escaped
from prep.files import save_array
from prep.schema import ArrayShape, open_regular, read_regular, view_npy
from prep.store import kernels
from prep.store.guarded_map import GuardedMap
from prep.store.manifest import ADVICE, ExtraField, Store, StoreError, extra_files

FOLDER = "extra"
DTYPES = {"int": "<i8", "float": "<f4", "vector": "<f4", "text": "|u1"}
Value = int | float | str | npt.NDArray[np.float32]  # the value of an extra field for one record
_MAX_HEADER_BYTES = 65_536
_ROWS_AT_ONCE = 65_536  # largest number of rows whose texts are copied at once


@dataclass(frozen=True)
class Column:
    """One extra field: a value for each row."""

    type: str  # one of EXTRA_TYPES
    values: npt.NDArray[Any]  # dtype and shape: see the docstring of this module
    offsets: npt.NDArray[np.int64] | None = None  # only for the type text

    @staticmethod
    def of_texts(texts: Sequence[bytes]) -> Column:
        """Return a column of the type text. `texts` must be UTF-8."""
        offsets = np.zeros(len(texts) + 1, np.int64)
        np.cumsum([len(text) for text in texts], out=offsets[1:])
        return Column("text", np.frombuffer(b"".join(texts), np.uint8), offsets)

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    @property
    def width(self) -> int:
        """Number of values in each vector; 1 for all types except vector."""
        return self.values.shape[1] if self.type == "vector" else 1

    def entry(self) -> ExtraField:
        """Return the entry of this field for the manifest."""
        return ExtraField(self.type, self.width, self.values.nbytes)

    def take(self, rows: npt.NDArray[np.int64]) -> Column:
        """Return a column with copies of the rows at the indices `rows` (n,), in the order of `rows`."""
        if self.offsets is None:
            return Column(self.type, self.values[rows])
        starts, lengths = self.offsets[:-1][rows], np.diff(self.offsets)[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.empty(offsets[-1], np.uint8)
        for first in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(first, first + _ROWS_AT_ONCE)
            begin, end = offsets[part.start], offsets[min(part.stop, len(rows))]
            shift = np.repeat(starts[part] - offsets[:-1][part], lengths[part])
            values[begin:end] = self.values[np.arange(begin, end) + shift]
        return Column("text", values, offsets)

    def texts(self) -> list[str]:
        """Return all texts. Raises UnicodeDecodeError for bytes that are not UTF-8."""
        assert self.offsets is not None
        content = self.values.tobytes()
        return [content[begin:end].decode() for begin, end in pairwise(self.offsets.tolist())]

    def value(self, row: int) -> Value:
        """Return the value of a row: an int, a float, a float32 array (d,) or a str."""
        if self.offsets is not None:
            return bytes(self.values[self.offsets[row] : self.offsets[row + 1]]).decode()
        value = self.values[row]
        return np.array(value) if self.type == "vector" else value.item()

    def differences(self, other: Column) -> npt.NDArray[np.int64]:
        """Return the ascending indices of the rows in which two columns of the same type, width and length differ."""
        if self.offsets is None or other.offsets is None:
            differ = self.values != other.values
            return np.flatnonzero(differ.any(1) if differ.ndim > 1 else differ)
        ours, theirs = self.values.tobytes(), other.values.tobytes()
        pairs = zip(pairwise(self.offsets.tolist()), pairwise(other.offsets.tolist()), strict=True)
        return np.array([k for k, ((a, b), (c, d)) in enumerate(pairs) if ours[a:b] != theirs[c:d]], np.int64)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of type, shape and values."""
        digest = hashlib.sha256(f"{self.type} {self.values.shape}".encode())
        for array in self.arrays():
            digest.update(np.ascontiguousarray(array).data.cast("B") if array.size else b"")
        return digest.hexdigest()

    def arrays(self) -> list[npt.NDArray[Any]]:
        """Return the arrays of the column in the order of extra_files."""
        return [self.values] if self.offsets is None else [self.values, self.offsets]


def joined(columns: Sequence[Column]) -> Column:
    """Return one column with the rows of several columns of the same type and width, one column after another."""
    values = np.concatenate([column.values for column in columns])
    if columns[0].offsets is None:
        return Column(columns[0].type, values)
    sizes = np.concatenate([np.diff(column.offsets) for column in columns if column.offsets is not None])
    return Column("text", values, np.concatenate([[0], np.cumsum(sizes)]))


def save_columns(folder: Path, columns: Mapping[str, Column]) -> dict[str, ExtraField]:
    """Write columns into the folder of a split, each file atomically. Returns {name: entry for the manifest}."""
    for name, column in columns.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        for file, array in zip(extra_files(name, column.type), column.arrays(), strict=True):
            save_array(folder / file, array)
    return {name: columns[name].entry() for name in sorted(columns)}


def read_column(folder: Path, name: str, field: ExtraField, rows: int, advice: str) -> Column:
    """Read a column of `rows` rows from the folder of a split into memory.

    Raises OSError if a file cannot be read. Raises StoreError, with `advice` in its message, if a file is damaged.
    """
    views = []
    for file, shape, max_bytes in _expected(name, field, rows):
        content = read_regular(folder / file, max_bytes, advice, StoreError)
        views.append(view_npy(content, shape, str(folder / file), advice, StoreError))
    return _checked(folder / FOLDER, name, field, views, advice)


class StoredColumns:
    """The columns of one split of a store. Several threads may call `take` at the same time.

    A file that is truncated while it is mapped into memory would end the process with SIGBUS. Files are therefore
    mapped only if the compiled kernels.c can protect the maps. Otherwise, they are read into memory.
    """

    def __init__(self, store: Store, split: str) -> None:
        """Open all files, and compare them with the digests in the manifest.

        Raises StoreError if a file is missing or damaged.
        """
        self.fields = store.split(split).extra
        self._root = store.root
        self._advice = f"Check the store with: alexprep verify --store {store.root}"
        self._files: list[_ColumnFile] = []
        self._columns: dict[str, Column] = {}
        entry, folder = store.split(split), store.root / split
        try:
            for name, field in self.fields.items():
                views = []
                for file, shape, max_bytes in _expected(name, field, entry.records):
                    opened = _ColumnFile(folder / file, entry.account["files"][file], max_bytes, self._advice)
                    self._files.append(opened)
                    views.append(view_npy(opened.content, shape, str(folder / file), self._advice, StoreError))
                self._columns[name] = _checked(folder / FOLDER, name, field, views, self._advice)
        except OSError as error:
            self.close()
            raise StoreError(escaped(f"{error.filename or folder}: {error.strerror or error}. {ADVICE}")) from None
        except BaseException:
            self.close()
            raise

    def take(self, rows: npt.NDArray[np.int64]) -> dict[str, Column]:
        """Return {field: column} of the records at the indices `rows` (n,), in the order of `rows`.

        Raises StoreError if a file was truncated, if a number is not finite, or if a text is not UTF-8.
        """
        if kernels.native is not None:
            kernels.native.renew_protection()
        taken = {name: column.take(rows) for name, column in self._columns.items()}
        for file in self._files:
            file.check()
        for name, column in taken.items():
            wrong = _wrong_row(column)
            if wrong is not None:
                what = "is not UTF-8" if column.type == "text" else "has a number that is not finite"
                record = int(rows[wrong])
                raise StoreError(f"{self._root}: extra field {name} of record {record:,} {what}. {self._advice}")
        return taken

    def close(self) -> None:
        """Unmap the files. A second call has no effect."""
        self._columns = {}
        for file in self._files:
            file.close()


class ColumnsOfSplit:
    """The columns of one split, opened at the first call of `take`, which several threads may call at the same time."""

    def __init__(self, store: Store, split: str) -> None:
        self.fields = store.split(split).extra
        self._store, self._split, self._lock = store, split, threading.Lock()
        self._columns: StoredColumns | None = None

    def take(self, rows: npt.NDArray[np.int64]) -> dict[str, Column]:
        """Return the values of the records `rows`. Raises the errors of StoredColumns."""
        columns = self._columns
        if columns is None:
            with self._lock:
                columns = self._columns = self._columns or StoredColumns(self._store, self._split)
        return columns.take(rows)

    def close(self) -> None:
        """Unmap the files. A later call of `take` opens the files again."""
        with self._lock:
            if self._columns is not None:
                self._columns.close()
            self._columns = None


class _ColumnFile:
    """A file of a column: `content` is a view of the mapped file, or the bytes of the file."""

    def __init__(self, path: Path, digest: str, max_bytes: int, advice: str) -> None:
        self._path, self._advice = path, advice
        self._map: GuardedMap | None = None
        self.content: bytes | memoryview = b""
        with open_regular(path, advice, StoreError) as file:
            self._status = os.fstat(file.fileno())
            size = self._status.st_size
            if size > max_bytes:
                raise StoreError(escaped(f"{path} has {size:,} bytes, expected at most {max_bytes:,}. {advice}"))
            if kernels.native is not None and size:
                self._map = GuardedMap.of(file.fileno(), size, kernels.native)
            self.content = file.read() if self._map is None else self._map.view
        try:
            found = sha256(self.content).hexdigest()
            self.check()
            if found != digest:
                raise StoreError(escaped(f"{path} was changed: SHA-256 {found}, the manifest says {digest}. {advice}"))
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """Raise StoreError if the mapped file was truncated or a page of it could not be read."""
        if self._map is None:
            return
        is_short = False
        with suppress(OSError):  # the map of a file that was removed or replaced stays complete
            now = self._path.stat()
            is_short = os.path.samestat(now, self._status) and now.st_size < self._map.size
        if self._map.is_broken() or is_short:
            raise StoreError(
                escaped(f"{self._path}: truncated or unreadable, expected {self._map.size:,} bytes. {self._advice}")
            )

    def close(self) -> None:
        self.content = b""
        if self._map is not None:
            self._map.close()


def _expected(name: str, field: ExtraField, rows: int) -> Iterator[tuple[str, ArrayShape, int]]:
    """Yield (path, type and shape of the array, largest size in bytes) for each file of a field."""
    shapes: dict[str, tuple[int | None, ...]] = {"vector": (rows, field.width), "text": (field.bytes,)}
    files = extra_files(name, field.type)
    shape = ArrayShape((DTYPES[field.type],), shapes.get(field.type, (rows,)))
    yield files[0], shape, _MAX_HEADER_BYTES + field.bytes
    if len(files) > 1:
        yield files[1], ArrayShape(("<i8",), (rows + 1,)), _MAX_HEADER_BYTES + 8 * (rows + 1)


def _checked(folder: Path, name: str, field: ExtraField, arrays: Sequence[npt.NDArray[Any]], advice: str) -> Column:
    """Return the column of these arrays. Raises StoreError unless the offsets ascend from 0 to the number of bytes."""
    if len(arrays) == 1:
        return Column(field.type, arrays[0])
    values, offsets = arrays
    if offsets[0] != 0 or offsets[-1] != len(values) or (offsets[1:] < offsets[:-1]).any():
        path = folder / f"{name}.offsets.npy"
        raise StoreError(escaped(f"{path}: the offsets do not ascend from 0 to {len(values):,}. {advice}"))
    return Column("text", values, offsets)


def _wrong_row(column: Column) -> int | None:
    """Return the first row that has a number that is not finite, or a text that is not UTF-8; None if there is none."""
    if column.type in ("float", "vector"):
        wrong = np.flatnonzero(~np.isfinite(column.values))
        return int(wrong[0]) // column.width if len(wrong) else None
    if column.offsets is not None:
        content = column.values.tobytes()
        for row, (begin, end) in enumerate(pairwise(column.offsets.tolist())):
            try:
                content[begin:end].decode()
            except UnicodeDecodeError:
                return row
    return None

"""Images in Parquet files as Hugging Face writes them: a column `image` of {bytes, path}, and a column `label`.

The class names come from the schema's metadata, which the library `datasets` writes (features.py, ClassLabel). pyarrow
reads the files; pip installs it with the extra `parquet`. The name of an input is the path in its row. If rows have no
path, or if paths occur twice, the name consists of the file name and the number of the row.

To read a row, pyarrow must decompress a whole row group, which often has 100 images, and a build reads the rows in a
random order. The first worker that needs a Parquet file therefore unpacks all images of the file into one file in the
store's work folder, which the build removes at the end. If too little disk space is free for the unpacked images, each
call of `read` decompresses a row group.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from prep.console import UserError, bytes_text, disk_error, progress, say
from prep.files import atomic_file, hold_lock, save_array
from prep.images.codec import BadImage
from prep.inputs.classes import examples
from prep.inputs.formats.labelled import LabelledRows, duplicate_path
from prep.inputs.formats.shards import open_file, pack_location, root_and_files, unpack_location
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import FoundInputs, ListOptions
from prep.schema import ArrayShape, read_npy

if TYPE_CHECKING:
    from types import ModuleType

_IMAGE_COLUMNS = ("image", "img", "picture", "jpg", "png")
_LABEL_COLUMNS = ("label", "labels", "fine_label", "class", "target", "cls")
_NO_BYTES = "the row has only the path of an image: write the file again with the bytes of the images"
_UNPACKED_ROWS = 64  # number of rows that are in memory while a file is unpacked
_UNPACK_WAIT_S = 3600.0  # longest time that a worker waits while another worker unpacks the same file


@dataclass(frozen=True)
class ParquetReader:
    """Reads inputs that are rows of the Parquet files `files` (see root_and_files)."""

    root: Path
    files: tuple[str, ...]
    column: str
    unpacked: Path | None = None  # folder for the unpacked images; if None, no images are unpacked
    size_bytes: int = 0  # size of all files together

    def unpacking_into(self, folder: Path, free_bytes: int) -> ParquetReader:
        """Return a reader that unpacks images into `folder`, or `self` if they take more than half of `free_bytes`."""
        if 2 * self.size_bytes > free_bytes:
            say(
                f"{self.root}: the images are not unpacked: {bytes_text(self.size_bytes)} are more than half of the "
                f"{bytes_text(free_bytes)} that are free. The build reads groups of rows instead, which is slower."
            )
            return self
        return replace(self, unpacked=folder)

    def read(self, item: Input) -> bytes:
        """Return the image in a row. Raises BadImage if the row has none, and UserError if the file is damaged."""
        index, row = unpack_location(item.location)
        path = self.root / self.files[index]
        if self.unpacked is None:
            self._check_unchanged(path, item)
            rows = _row_group(str(path), *_group_of(str(path), row), self.column, item.mtime_ns)
            content = rows.get(row)
            if content is None:
                raise BadImage(_NO_BYTES)
            return content
        packed = self.unpacked / f"{index:05d}.images"
        if not packed.exists():
            self._check_unchanged(path, item)
            _unpack(path, packed, self.column)
        offsets = _offsets(str(packed), packed.stat().st_mtime_ns)
        start, end = offsets[row : row + 2].tolist() if row + 1 < len(offsets) else (0, 0)
        if start == end:
            raise BadImage(_NO_BYTES)
        return open_file(str(packed)).read_at(start, end - start)

    def _check_unchanged(self, path: Path, item: Input) -> None:
        with _ErrorsOf(path):
            mtime_ns = path.stat().st_mtime_ns
        if mtime_ns != item.mtime_ns:
            raise UserError(
                f"{path} was changed after it was listed. Run the command again when no program writes to the file."
            )

    def head(self, item: Input, size: int) -> bytes:
        """Return a JPEG signature for every row, so that the check before a build reads no row."""
        return b"\xff\xd8\xff"[:size]


def list_parquet(
    files: Sequence[Path], split: str, options: ListOptions, store_classes: Sequence[str]
) -> tuple[ParquetReader, FoundInputs]:
    """List the rows of Parquet files. Only paths and labels are read, not the images.

    Raises UserError if pyarrow is missing, if a file is damaged, or if a file has no column of images or of labels.
    Also raises UserError if the columns or the class names differ between the files.
    """
    pq = _pyarrow_parquet()
    root, file_names = root_and_files(files)
    rows = LabelledRows(str(root))
    paths, labels, numbered, has_paths = Listing(), list[str](), Listing(), True
    first: _Columns | None = None  # the columns of the first file that has rows
    with progress(f"{split}: listing", len(files), "files") as listing_progress:
        for index, path in enumerate(files):
            mtime_ns = path.stat().st_mtime_ns
            with _ErrorsOf(path), pq.ParquetFile(path) as file:
                columns = _columns(path, file.schema_arrow)
                if file.metadata.num_rows and columns != (first or columns):
                    raise UserError(f"{files[0]} has {first}, but {path} has {columns}. All files need equal columns.")
                first = first or (columns if file.metadata.num_rows else None)
                rows.labels_are_names = columns.has_texts and not columns.names
                row = 0
                for group in range(file.num_row_groups):
                    size = _mean_row_bytes(file.metadata.row_group(group))
                    has_path = _has_path(file.schema_arrow, columns.image)
                    wanted = [columns.label, *([f"{columns.image}.path"] if has_path else [])]
                    table = file.read_row_group(group, columns=wanted)
                    texts = [_label_text(path, label) for label in table.column(columns.label).to_pylist()]
                    images = table.column(columns.image).to_pylist() if has_path else [{}] * len(texts)
                    for text, image in zip(texts, images, strict=True):
                        location = pack_location(index, row)
                        name = ((image or {}).get("path") or "").encode()
                        has_paths = has_paths and bool(name)
                        paths.add(name, len(labels), size, mtime_ns, location)
                        numbered.add(f"{path.name}/{row:08d}".encode(), len(labels), size, mtime_ns, location)
                        labels.append(text)
                        row += 1
            listing_progress.advance()
    if not has_paths or _double(paths, labels):
        paths = numbered
    for item in paths:
        rows.add(item.path, labels[item.label], item.size, item.mtime_ns, item.location)
    columns = first or columns
    reader = ParquetReader(root, file_names, columns.image, size_bytes=sum(path.stat().st_size for path in files))
    return reader, rows.found(columns.names, options, store_classes, in_class_folders=True)


def _double(paths: Listing, labels: Sequence[str]) -> bool:
    """Return whether two inputs of one class, or two inputs with a folder in their path, have the same path."""
    in_classes = Listing()
    for item in paths:
        folder = b"" if b"/" in item.path else labels[item.label].encode() + b"/"
        in_classes.add(folder + item.path, 0)
    return duplicate_path(in_classes) is not None


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            "Parquet files need pyarrow. Install pyarrow with: pip install pyarrow (the extra `parquet`)."
        ) from None
    module: ModuleType = pyarrow.parquet
    return module


class _ErrorsOf:
    """Convert pyarrow's exceptions in a `with` block to UserError, which names the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        import pyarrow

        if isinstance(error, pyarrow.ArrowException | OSError | ValueError) and not isinstance(error, UserError):
            text = " ".join(str(error).split())
            raise UserError(f"{self.path} is no Parquet file, or is damaged ({text}). Download a new copy.") from None


@dataclass(frozen=True)
class _Columns:
    image: str  # column of the images
    label: str  # column of the labels
    has_texts: bool  # whether labels are texts, not numbers
    names: tuple[str, ...]  # names of the classes; () if the schema has no names

    def __str__(self) -> str:
        names = f"the class names {examples(self.names)}" if self.names else "no class names"
        kind = "texts" if self.has_texts else "numbers"
        return f"images in column {self.image}, {kind} in column {self.label} and {names}"


def _columns(path: Path, schema: Any) -> _Columns:
    """Find the columns. Raises UserError if the schema has no column of images or of labels."""
    import pyarrow.types as types

    def holds_images(field: Any) -> bool:
        kind = field.type
        if types.is_struct(kind):
            return any(kind.field(k).name == "bytes" for k in range(kind.num_fields))
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    features = _features(schema)
    images = [field.name for field in schema if holds_images(field)]
    image = next((name for name in _IMAGE_COLUMNS if name in images), images[0] if len(images) == 1 else "")
    with_names = [name for name, feature in features.items() if _class_names(feature)]
    labels = [name for name in _LABEL_COLUMNS if name in schema.names] or with_names
    if not image or not labels or (labels == with_names and len(labels) > 1):
        missing = "a column `image` with the bytes of images" if not image else "a column `label`"
        raise UserError(f"{path}: columns {', '.join(schema.names)}; expected {missing}.")
    return _Columns(image, labels[0], _is_text(schema.field(labels[0]).type), _class_names(features.get(labels[0])))


def _is_text(kind: Any) -> bool:
    """Return whether a column of this type contains texts. A text is the name of a class, even if it is a number."""
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _features(schema: Any) -> dict[str, Any]:
    """Return {column: feature} from the metadata that the library `datasets` writes; {} without such metadata."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _class_names(feature: Any) -> tuple[str, ...]:
    names = feature.get("names") if isinstance(feature, dict) else None
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _has_path(schema: Any, column: str) -> bool:
    import pyarrow.types as types

    kind = schema.field(column).type
    return bool(types.is_struct(kind)) and any(kind.field(k).name == "path" for k in range(kind.num_fields))


def _label_text(path: Path, label: Any) -> str:
    """Return a label as text: empty for null and NaN, and for −1, which `datasets` writes for an unknown label.

    Raises UserError if the label is neither a number nor a text.
    """
    if label is None or label == -1 or label != label:
        return ""
    if isinstance(label, bytes):
        return name_text(label)
    if not isinstance(label, int | float | str):
        raise UserError(f"{path}: label {label!r:.60}; expected the name of one class or a whole number from 0.")
    # pandas writes whole numbers as floats if some numbers are missing
    return str(int(label) if isinstance(label, float) and label.is_integer() else label)


def _mean_row_bytes(group: Any) -> int:
    """Return the mean size of the rows of a row group.

    The metadata of single columns are not read, because damaged metadata of this kind make pyarrow end the process.
    """
    return max(1, int(group.total_byte_size) // max(1, int(group.num_rows)))


def _file(path: str) -> tuple[Any, npt.NDArray[np.int64]]:
    """Return the open Parquet file, and an array: the index of each row group's first row, then the number of rows."""
    return _opened(path, os.stat(path).st_mtime_ns)


@lru_cache(maxsize=64)
def _opened(path: str, mtime_ns: int) -> tuple[Any, npt.NDArray[np.int64]]:
    # The file is not mapped into memory: if a mapped file becomes shorter, the kernel kills the process (SIGBUS).
    file = _pyarrow_parquet().ParquetFile(path, memory_map=False)
    counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    return file, np.cumsum([0, *counts])


def _group_of(path: str, row: int) -> tuple[int, int]:
    """Return the index of the row group that contains a row, and the index of this group's first row."""
    with _ErrorsOf(Path(path)):
        starts = _file(path)[1]
    group = int(np.searchsorted(starts, row, side="right")) - 1
    return group, int(starts[group])


@lru_cache(maxsize=2)
def _row_group(path: str, group: int, first: int, column: str, mtime_ns: int) -> dict[int, bytes | None]:
    """Return {row: image file} of all rows in one row group."""
    with _ErrorsOf(Path(path)):
        file = _file(path)[0]
        values = _contents(file.read_row_group(group, columns=[_leaf(file, column)]).column(column))
    return dict(enumerate(values, first))


def _leaf(file: Any, column: str) -> str:
    """Return the column with the bytes of the images: `image.bytes` if the column `image` has {bytes, path}."""
    import pyarrow.types as types

    return f"{column}.bytes" if types.is_struct(file.schema_arrow.field(column).type) else column


def _contents(values: Any) -> list[bytes | None]:
    return [value.get("bytes") if isinstance(value, dict) else value for value in values.to_pylist()]


@lru_cache(maxsize=1024)
def _offsets(packed: str, mtime_ns: int) -> npt.NDArray[np.int64]:
    return read_npy(Path(packed + ".npy"), ArrayShape(("<i8",), (None,)), "Run the same command again.")


def _unpack(path: Path, packed: Path, column: str) -> None:
    """Write the images of a Parquet file one after another into the file `packed`.

    The offsets of the images (rows + 1 numbers) are written beside `packed`. Raises UserError if `path` is damaged, and
    DiskFull if the disk is full.
    """
    try:
        packed.parent.mkdir(exist_ok=True)
        with hold_lock(packed.parent, "build", name=f"{packed.name}.lock", wait_s=_UNPACK_WAIT_S):
            if not packed.exists():
                ends = [0]
                with atomic_file(packed) as out:
                    for content in _all_contents(path, column):
                        out.write(content or b"")
                        ends.append(ends[-1] + len(content or b""))
                    save_array(Path(f"{packed}.npy"), np.array(ends, np.int64))
    except OSError as error:
        raise disk_error(error, f"{packed}: {error.strerror or error}") from error


def _all_contents(path: Path, column: str) -> Iterator[bytes | None]:
    """Yield the images of all rows of a file, and None for a row without an image."""
    with _ErrorsOf(path):
        file = _file(str(path))[0]
        batches = file.iter_batches(batch_size=_UNPACKED_ROWS, columns=[_leaf(file, column)])
    while True:
        with _ErrorsOf(path):
            batch = next(batches, None)
            contents = [] if batch is None else _contents(batch.column(column))
        if batch is None:
            return
        yield from contents

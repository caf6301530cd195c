"""Images in LMDBs that Caffe's convert_imageset wrote: each record is a Datum with an encoded image or bare pixels.

Bare pixels have the layout C,H,W, and the channels are blue, green, red (caffe/src/caffe/util/io.cpp, CVMatToDatum).
The reader converts bare pixels to the layout H,W,C with the channels red, green, blue. An image from an LMDB is
processed like an image file: it is rescaled unless its shorter side already has the length of the images in the store,
then encoded and checksummed. The key of the Caffe record becomes the source path of the new record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.console import Progress, UserError, count_noun, say
from prep.images.codec import BadImage
from prep.images.limits import MAX_PIXELS
from prep.inputs.classes import examples, numbered_classes, wanted_classes
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import Content, Source
from prep.store import lmdb_shard
from prep.store.datum import CHANNELS, DATA, ENCODED, HEIGHT, LABEL, WIDTH, DatumError, parse_fields
from prep.store.lmdb_file import LmdbFile
from prep.workers import Counts, Runner, TaskProgress, WorkerDied

ADVICE = "Check that the folder is a complete LMDB from Caffe."
_NUMBERED_KEY = re.compile(rb"\d{8}_(.*)", re.DOTALL)  # key of convert_imageset: a line number, `_` and a path


@dataclass(frozen=True)
class CaffeReader:
    """Reads inputs that are records of Caffe's LMDBs. `Input.location` is the index of the LMDB in `folders`."""

    folders: tuple[Path, ...]

    @property
    def root(self) -> Path:
        """The first LMDB of the split, for messages."""
        return self.folders[0]

    def read(self, item: Input) -> Content:
        """Return the encoded image of a record, or its pixels as uint8 (H, W, 3).

        Raises BadImage if the record has neither an encoded image nor pixels.
        """
        value = _opened(self.folders[item.location]).pages.get(item.path)
        if value is None:
            raise UserError(f"{self.folders[item.location]}: key {name_text(item.path)} was removed during reading.")
        return _decode_datum(bytes(value))

    def head(self, item: Input, size: int) -> bytes:
        """Return a JPEG signature for every record. The check before a build (`probe`) therefore reads no record."""
        return b"\xff\xd8\xff"[:size]


@lru_cache(maxsize=8)
def _opened(folder: Path) -> LmdbFile:
    return LmdbFile(folder, ADVICE)


def _decode_datum(value: bytes) -> Content:
    try:
        fields = parse_fields(value, len(value))
    except DatumError as error:
        raise BadImage(f"not a Datum: {error}") from None
    data = fields.get(DATA, b"")
    if not isinstance(data, bytes):
        raise BadImage("not a Datum: the field `data` is a number")
    if not data:
        raise BadImage("a Datum without 8-bit data")
    if fields.get(ENCODED):
        return data
    return _bare_pixels(data, [fields.get(field) for field in (CHANNELS, HEIGHT, WIDTH)])


def _bare_pixels(data: bytes, shape: Sequence[int | bytes | None]) -> npt.NDArray[np.uint8]:
    """Convert C,H,W bytes in the order blue, green, red to uint8 (H, W, RGB). A single channel becomes R, G and B."""
    channels, height, width = (n if isinstance(n, int) else 0 for n in shape)
    if channels not in (1, 3) or not 0 < height * width <= MAX_PIXELS or channels * height * width != len(data):
        raise BadImage(
            f"{len(data):,} bytes for {channels} channels of {height}×{width} px; "
            "expected 1 or 3 channels, and 1 byte for each channel of a pixel"
        )
    planes = np.frombuffer(data, np.uint8).reshape(channels, height, width)
    return np.ascontiguousarray(np.broadcast_to(planes[::-1], (3, height, width)).transpose(1, 2, 0))


def list_caffe_lmdbs(
    folders: Sequence[Path],
    split: str,
    class_names: Path | None,
    store_classes: Sequence[str],
    runner: Runner,
    progress: Progress,
    allow_empty_classes: bool = False,
) -> Source:
    """List the records of Caffe's LMDBs `folders`, one LMDB after another, as a single split.

    Each record keeps its label from Caffe. The first of these sources that exists gives the class names:

    -   the first word of each line of the file `class_names`, such as Caffe's synset_words.txt
    -   the classes of the store
    -   the folder names in the keys, if every label has exactly one folder and no two labels share a folder
    -   the labels, written as decimal numbers

    Raises UserError if a folder is not an LMDB, or if no record is a Datum with a label. Also raises UserError if a
    label has no class name, or if the folder name in a key and the label of its record mean different classes. Unless
    `allow_empty_classes` is true, also raises UserError if a class has no record.
    """
    for number, folder in enumerate(folders):
        if folder.resolve() in {earlier.resolve() for earlier in folders[:number]}:
            raise UserError(f"{folder} is named twice. Name every LMDB once.")
    listing, refused = Listing(), []
    # Label -> folder names in the keys of its records; b"" stands for no folder.
    key_folders: dict[int, set[bytes]] = {}
    for index, folder in enumerate(folders):
        on_progress = partial(_advance, progress, progress.done)
        for _, result in runner.map(_list_lmdb, [str(folder)], on_progress):
            if isinstance(result, WorkerDied):
                raise UserError(
                    f"{folder}: the process that read this LMDB {result.describe()}: the LMDB is damaged or truncated."
                )
            keys, labels, sizes = result
            for key, label, size in zip(keys, labels, sizes, strict=True):
                if label is None or label >= 2**31:
                    number = 0 if label is None else label - 2**64 if label >= 2**63 else label
                    fault = f"label {number}, expected 0 to {2**31 - 1:,}" if number else "not a Datum with a label"
                    refused.append((name_text(key), fault))
                    continue
                listing.add(key, label, size, 0, index)
                numbered = _NUMBERED_KEY.fullmatch(key)
                parts = (numbered[1] if numbered else key).split(b"/")
                key_folders.setdefault(label, set()).add(parts[-2] if len(parts) > 1 else b"")
    if not len(listing):
        raise UserError(f"{folders[0]}: {count_noun(len(refused), 'record')}, and not one is a Datum with a label.")
    classes = _class_names(folders[0], class_names, store_classes, key_folders)
    empty = [name for label, name in enumerate(classes) if label not in key_folders]
    if empty and not allow_empty_classes:
        first = " The smallest label is 1: does the LMDB count from 1?" if min(key_folders) == 1 else ""
        raise UserError(
            f"{folders[0]}: {count_noun(len(empty), 'class', 'classes')} without a record: {examples(empty)}.{first} "
            "Import all LMDBs of the split together, or pass --allow-empty-classes."
        )
    if empty:
        say(f"{folders[0]}: {count_noun(len(empty), 'class', 'classes')} without a record: {examples(empty)}.")
    return Source(CaffeReader(tuple(folders)), split, classes, listing, tuple(refused))


def _advance(progress: Progress, done_before: int, counts: Counts) -> None:
    progress.update(done_before + counts.done)


def _class_names(
    folder: Path, file: Path | None, store_classes: Sequence[str], key_folders: dict[int, set[bytes]]
) -> tuple[str, ...]:
    count = max(key_folders) + 1
    names, owner = wanted_classes(file, (), store_classes)
    if names:
        if count > len(names):
            raise UserError(
                f"{folder}: label {count - 1}, but {owner} has {len(names)} classes, "
                f"with the labels 0 to {len(names) - 1}."
            )
        position = {name: label for label, name in enumerate(names)}
        found = sorted((label, name_text(name)) for label, of_label in key_folders.items() for name in of_label)
        are_classes = any(name in position for _, name in found)
        for label, name in found if are_classes else ():
            if position.get(name) != label:
                other = f"{name} has the label {position[name]}" if name in position else "there is no such class"
                raise UserError(
                    f"{folder}: a key of label {label} has the folder {name}, but in {owner} {other}. The classes "
                    f"of the LMDB, or their order, differ from those of {owner}. Give the classes of the LMDB with "
                    "--classes FILE, and build a separate store."
                )
        return names
    owners = {label: name_text(next(iter(found))) for label, found in key_folders.items() if len(found) == 1}
    if len(owners) == count == len(set(owners.values())) and all(owners.values()):
        return tuple(owners[label] for label in range(count))
    return numbered_classes(0, count - 1, str(folder))


def _list_lmdb(folder: str, task_progress: TaskProgress) -> tuple[list[bytes], list[int | None], list[int]]:
    """Return the keys, labels and sizes of the records of one LMDB.

    The label is None if the record is not a Datum with a label.
    """
    keys, labels, sizes = [], [], []
    for key, value in lmdb_shard.read(Path(folder), ADVICE):
        try:
            label = parse_fields(value, len(value)).get(LABEL)
        except DatumError:
            label = None
        keys.append(key)
        labels.append(label if isinstance(label, int) else None)
        sizes.append(len(value))
        task_progress.count()
    return keys, labels, sizes

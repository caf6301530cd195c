"""Photographs inside LMDBs that Caffe's convert_imageset wrote: Datums with an encoded picture, or bare pixels.

Bare pixels are C,H,W in the order blue, green, red (caffe/src/caffe/util/io.cpp, CVMatToDatum); here they become
H,W,RGB. A record goes through the same steps as a file: rescaled where its shorter side is not the store's, encoded,
checksummed. Its key is kept as its source path. These files are another program's: they are read by worker processes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import lmdb
import numpy as np
import numpy.typing as npt

from prep.console import Progress, UserError, count_noun
from prep.images.codec import MAX_PIXELS, BadImage
from prep.inputs.labels import numbered_classes, shown
from prep.inputs.listing import Input, Listing
from prep.inputs.reader import Content, Source
from prep.store import lmdb_shard
from prep.store.datum import CHANNELS, DATA, ENCODED, HEIGHT, LABEL, WIDTH, DatumError, parse_fields
from prep.workers import Counts, Runner, TaskProgress, WorkerDied

_NUMBERED = re.compile(rb"\d{8}_(.*)", re.DOTALL)  # convert_imageset's keys: the line's number, then its path


@dataclass(frozen=True)
class CaffeDatums:
    """Inputs that are records of LMDBs; `at` of an input says which."""

    folders: tuple[Path, ...]

    @property
    def root(self) -> Path:
        """The first, for messages."""
        return self.folders[0]

    def read(self, item: Input) -> Content:
        """A record's file, or its pixels as uint8 (H, W, 3); raises BadImage where it holds neither."""
        with _environment(str(self.folders[item.at])).begin() as txn:
            value = txn.get(item.path)
        if value is None:
            raise UserError(f"{self.folders[item.at]}: key {shown(item.path)} has gone while it was read.")
        return _content(value)

    def head(self, item: Input, size: int) -> bytes:
        """Enough to pass for a picture: records are judged when they are decoded, in a worker."""
        return b"\xff\xd8\xff"[:size]


@lru_cache(maxsize=8)
def _environment(path: str) -> lmdb.Environment:
    return lmdb.open(path, readonly=True, lock=False, subdir=True)


def _content(value: bytes) -> Content:
    try:
        fields = parse_fields(value, len(value))
    except DatumError as error:
        raise BadImage(f"no Datum: {error}") from None
    data = fields.get(DATA, b"")
    if not isinstance(data, bytes):
        raise BadImage("no Datum: its data is a number")
    if not data:
        raise BadImage("a Datum without 8-bit data")
    if fields.get(ENCODED):
        return data
    return _pixels(data, [fields.get(field) for field in (CHANNELS, HEIGHT, WIDTH)])


def _pixels(data: bytes, shape: Sequence[int | bytes | None]) -> npt.NDArray[np.uint8]:
    """Bare C,H,W bytes, blue first, as RGB; one channel is grey."""
    channels, height, width = (n if isinstance(n, int) else 0 for n in shape)
    if channels not in (1, 3) or not 0 < height * width <= MAX_PIXELS or channels * height * width != len(data):
        raise BadImage(f"{len(data):,} bytes for {channels} channels of {height}×{width} px")
    planes = np.frombuffer(data, np.uint8).reshape(channels, height, width)
    return np.ascontiguousarray(np.broadcast_to(planes[::-1], (3, height, width)).transpose(1, 2, 0))


def read_datums(
    folders: Sequence[Path], split: str, names: Path | None, known: Sequence[str], runner: Runner, report: Progress
) -> Source:
    """List the records of Caffe's LMDBs, in the order given, as one split.

    Labels stay what they are. Classes are named by the lines of `names` (synset_words.txt: the first word counts),
    else as the store has them, else by the folders in the keys where each label has one of its own, else by number.
    Raises UserError for a folder that is no LMDB or holds no Datums, and for labels that the names do not cover.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{folders[0]}: one of the LMDBs is named twice.")
    listing, refused = Listing(), []
    folder_of: dict[int, set[bytes]] = {}
    for index, folder in enumerate(folders):
        watch = partial(_advance, report, report.done)
        for _, result in runner.map(_list, [str(folder)], watch):
            if isinstance(result, WorkerDied):
                raise UserError(
                    f"{folder}: the process that read it {result.describe()}: the LMDB is damaged or cut short."
                )
            keys, labels, sizes = result
            for key, label, size in zip(keys, labels, sizes, strict=True):
                if label is None:
                    refused.append((shown(key), "no Datum, or one without a label"))
                    continue
                listing.add(key, label, size, 0, index)
                numbered = _NUMBERED.fullmatch(key)
                parts = (numbered[1] if numbered else key).split(b"/")
                folder_of.setdefault(label, set()).add(parts[-2] if len(parts) > 1 else b"")
    if not len(listing):
        raise UserError(f"{folders[0]}: {count_noun(len(refused), 'record')}, and not one is a Datum with a label.")
    classes = _classes(folders[0], names, known, folder_of)
    return Source(CaffeDatums(tuple(folders)), split, classes, listing, tuple(refused))


def _advance(report: Progress, before: int, counts: Counts) -> None:
    report.update(before + counts.done)


def _classes(
    folder: Path, names: Path | None, known: Sequence[str], folder_of: dict[int, set[bytes]]
) -> tuple[str, ...]:
    most = max(folder_of) + 1
    if names is not None:
        try:
            lines = [line for line in names.read_text(errors="surrogateescape").splitlines() if line.strip()]
        except OSError as error:
            raise UserError(f"--classes {names}: {error.strerror or error}.") from None
        known = [line.split()[0] for line in lines]
        if len(set(known)) != len(known):
            raise UserError(f"--classes {names}: a name occurs twice. One class a line, in the order of the labels.")
    if known:
        if most > len(known):
            raise UserError(
                f"{folder}: label {most - 1}, but {names or 'the store'} has {len(known)} classes, "
                f"0 to {len(known) - 1}."
            )
        return tuple(known)
    owners = [next(iter(found)) if len(found) == 1 else b"" for found in folder_of.values()]
    if len(folder_of) == most and all(owners) and len(set(owners)) == most:
        return tuple(shown(next(iter(folder_of[label]))) for label in range(most))
    return numbered_classes(most, str(folder))


def _list(folder: str, tally: TaskProgress) -> tuple[list[bytes], list[int | None], list[int]]:
    """Keys, labels and sizes of one LMDB's records; a label is None where the record is no Datum or has none."""
    keys, labels, sizes = [], [], []
    for key, value in lmdb_shard.read(Path(folder), "Is it one of Caffe's, and whole?"):
        try:
            label = parse_fields(value, len(value)).get(LABEL)
        except DatumError:
            label = None
        keys.append(key)
        labels.append(label if isinstance(label, int) and label < 2**31 else None)
        sizes.append(len(value))
        tally.count()
    return keys, labels, sizes

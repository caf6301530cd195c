"""Store format: the files of a store, its manifest and the schema version. Both builds and readers use this module.

    store/
      manifest.json               settings, tool versions, classes; for each split its shards, digests and moments
      train/00000/data.mdb …      one LMDB per shard: Caffe Datums under 8-digit keys, in a seeded order
      train/colour.json           mean RGB and colour PCA of the split; the stream reads this file
      train/mean_image.npy        float32 (side_px, side_px, 3): the mean of the central squares of all images
      train/inputs.jsonl          one line for each input that was converted, was left out, has an EXIF orientation
                                  other than 1, or was kept although its decoder warned about it
      train/extra/FIELD.npy …     only with extra fields: the value of each record (prep/store/extra.py)
      val/…

When all files of a split are complete, a new manifest.json replaces the old manifest.json by a rename. manifest.json
therefore names only complete files. These files are never changed in place. Store.open raises StoreError for a store
whose schema number is not SCHEMA. The error message has both numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from prep.console import UserError, did_you_mean, shell_quoted
from prep.files import write_atomic
from prep.schema import ArrayShape, convert, decode, file_sha256, parse_json, read_npy, read_regular, shown
from prep.store.agreement import (
    SPLIT_FILES,
    differences_from_moments,
    digest_json,
    disagreements,
    extra_files,
    inconsistent_statistics,
    split_files,
    split_fingerprint,
)
from prep.store.models import (
    DEFAULT_BACKGROUND,
    DROPPED,
    MAX_COLOR_STATS_BYTES,
    MAX_MANIFEST_BYTES,
    ChannelStats,
    ColorStats,
    ExtraField,
    Manifest,
    Settings,
    Shard,
    Split,
)

__all__ = [
    "BACKGROUNDS",
    "COPY_FOLDER",
    "DEFAULT_BACKGROUND",
    "DROPPED",
    "FILTERS",
    "FORMATS",
    "KIND",
    "MAX_COLOR_STATS_BYTES",
    "SCHEMA",
    "SPLITS",
    "SPLIT_FILES",
    "ChannelStats",
    "ColorStats",
    "ExtraField",
    "Settings",
    "Shard",
    "Split",
    "Store",
    "StoreError",
    "digest_json",
    "extra_files",
    "parse_color_stats",
    "split_files",
    "split_fingerprint",
]

SCHEMA = 1
KIND = "alexnet-store"
SPLITS = ("train", "val")
COPY_FOLDER = ".copy"  # journal of an unfinished `alexprep copy` into this store (see prep.remote.journal)
FORMATS = ("jpeg", "ppm")  # formats of the image in a record
FILTERS = ("area", "bilinear", "bicubic", "lanczos")  # rescaling filters
BACKGROUNDS = ("white", "black", "grey")  # colours behind transparent pixels
ADVICE = "The store is damaged. Build the store again, or take the file from another copy of the store."


class StoreError(UserError):
    """The store is missing, unfinished or damaged, or its schema number is not SCHEMA."""


@dataclass(frozen=True)
class Store:
    """A store on disk, open for reading. `Store.open` returns a Store."""

    root: Path
    settings: Settings
    tools: Mapping[str, str]  # library -> version, for the libraries that determine the records' bytes
    classes: tuple[str, ...]  # names of the classes; a label is an index into `classes`
    splits: Mapping[str, Split]  # by name

    @staticmethod
    def open(root: str | Path) -> Store:
        """Read `root`/manifest.json. Raises StoreError unless `root` is a complete store of this schema version."""
        root = Path(root)
        path = root / "manifest.json"
        if not root.exists():
            if root.parts and root.parts[0] in ("s3:", "gs:", "file:"):
                raise StoreError(
                    f"{root}: a store is read from a local folder. First copy the store with: alexprep copy URL FOLDER"
                )
            raise StoreError(
                f"{root}: no such store. Build a store with: alexprep build-lmdb SOURCE --store {shell_quoted(root)}"
            )
        try:
            content = read_regular(path, MAX_MANIFEST_BYTES, ADVICE, StoreError)
        except (FileNotFoundError, NotADirectoryError):
            hint = "not a store"
            if (root / COPY_FOLDER).is_dir():
                hint = "a copy was not finished: run the same alexprep copy again"
            elif any((root / s / ".build" / "merge.json").exists() for s in SPLITS):
                hint = "a merge was not finished: run the same alexprep merge again"
            elif root.is_dir() and any((root / s).is_dir() for s in SPLITS):
                hint = "a build was not finished: run the same alexprep build-lmdb again"
            raise StoreError(f"{root}: the folder has no manifest.json ({hint}).") from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error}). Build the store again.") from None
        return Store.parse(root, content)

    @staticmethod
    def parse(root: Path, content: bytes, name: str = "") -> Store:
        """Return the store whose manifest.json has these bytes.

        `name` is the name of the store in errors, by default `root`. Raises StoreError if the schema number is not
        SCHEMA, or if a field is missing or wrong.
        """
        name = name or str(root)
        path = f"{name.rstrip('/')}/manifest.json"
        data = parse_json(content, path, ADVICE, StoreError)
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise StoreError(f"{path}: not the manifest of an alexnet store.")
        if data.get("schema") != SCHEMA:
            raise StoreError(
                f"{name} was built with store version {shown(data.get('schema'))}; this program reads version "
                f"{SCHEMA}. Build the store again, or install the alexnet release that wrote the store."
            )
        with_older = {**data, "settings": Settings.with_older(data.get("settings"))} if "settings" in data else data
        manifest = convert(Manifest, with_older, path, ADVICE, StoreError)
        wrong = next(disagreements(manifest, data), "")
        if wrong:
            raise StoreError(f"{path}: {wrong}. {ADVICE}")
        return Store(root, manifest.settings, manifest.tools, manifest.classes, manifest.splits)

    def split(self, name: str) -> Split:
        """Return the split `name`. Raises StoreError if the store has no such split."""
        if name not in self.splits:
            has = ", ".join(self.splits) or "none"
            text = f"{self.root} has no split {name} (it has: {has})."
            if name not in SPLITS:
                raise StoreError(f"{text} Name another --split.{did_you_mean(name, list(self.splits))}")
            command = f"alexprep build-lmdb SOURCE --split {name} --store {shell_quoted(self.root)}"
            raise StoreError(f"{text} Build it: {command}")
        return self.splits[name]

    def shard_paths(self, split: str) -> list[str]:
        """Return the paths of the LMDB folders of a split, in order.

        Raises StoreError if a data.mdb is missing or truncated, or is a link to a file outside of the store.
        """
        paths, root = [], os.path.realpath(self.root)
        for shard in self.split(split).shards:
            file = self.root / shard.path / "data.mdb"
            if not file.is_file():
                raise StoreError(f"{file} is missing from the store, or is not a regular file. Build the store again.")
            if not os.path.realpath(file).startswith(f"{root}/"):
                raise StoreError(
                    f"{file} is a link to {os.path.realpath(file)}, expected a file in the store. {ADVICE}"
                )
            if file.stat().st_size < shard.bytes:  # reading past the end of a mapped file would kill the process
                raise StoreError(
                    f"{file} has {file.stat().st_size:,} bytes, its records need {shard.bytes:,}. "
                    "Build the store again."
                )
            paths.append(str(file.parent))
        return paths

    def color_stats(self, split: str = "train") -> ColorStats:
        """Return the mean and colour PCA of a split.

        Raises StoreError if colour.json is missing or damaged, or does not follow from the moments in the manifest.
        """
        entry, path = self.split(split), self.root / split / "colour.json"
        hint = f"Write the file with: alexprep pca-stats --store {shell_quoted(self.root)} --split {split}"
        try:
            stats = parse_color_stats(read_regular(path, MAX_COLOR_STATS_BYTES, hint, StoreError), str(path), hint)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error}). {hint}") from None
        for what in ("records", "pixels"):
            found, expected = getattr(stats, what), getattr(entry, what)
            if found != expected:
                raise StoreError(f"{path}: {what} is {found:,}, expected {expected:,}, as in manifest.json. {hint}")
        wrong = next(differences_from_moments(stats, entry.moments), "")
        if wrong:
            raise StoreError(f"{path}: {wrong} from the moments in manifest.json. {hint}")
        return stats

    def mean_image(self, split: str = "train") -> npt.NDArray[np.float32]:
        """Return the mean of the central squares of all images of a split: float32 (side_px, side_px, 3), 0..255.

        Raises StoreError if mean_image.npy is missing, damaged or changed.
        """
        side_px = self.settings.side_px
        path = self.root / split / "mean_image.npy"
        try:
            expected = ArrayShape(("<f4",), (side_px, side_px, 3))
            mean: npt.NDArray[np.float32] = read_npy(path, expected, ADVICE, StoreError)
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error}). Build the store again.") from None
        if not (mean.min() >= 0 and mean.max() <= 255):  # a comparison with NaN is False
            raise StoreError(f"{path} has values from {mean.min()} to {mean.max()}, expected 0 to 255. {ADVICE}")
        self.check_file(split, path.name)
        return mean

    def check_file(self, split: str, name: str) -> Path:
        """Check that a file of a split has the digest that the manifest states, and return the path of the file.

        `name` is one of split_files. Raises StoreError if the digests differ, and OSError if the file cannot be read.
        """
        path, expected = self.root / split / name, self.splits[split].account["files"][name]
        digest = file_sha256(path, ADVICE)
        if digest != expected:
            raise StoreError(f"{path} was changed: SHA-256 {digest}, the manifest says {expected}. {ADVICE}")
        return path

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the contents and the order of all records, the class names and the extra fields."""
        return digest_json({name: split.fingerprint for name, split in self.splits.items()})

    def save(self) -> None:
        """Replace manifest.json atomically: readers see either the old manifest or the new manifest."""
        data = {
            "kind": KIND,
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "settings": self.settings.to_json(),
            "tools": dict(self.tools),
            "classes": list(self.classes),
            "splits": {name: split.to_json() for name, split in self.splits.items()},
        }
        data["checksum"] = digest_json(data)
        write_atomic(self.root / "manifest.json", json.dumps(data, indent=1).encode())


def parse_color_stats(content: bytes, name: str, advice: str = ADVICE) -> ColorStats:
    """Return the content of a colour.json.

    Raises StoreError, with `name` and `advice` in its message, for a wrong field, and for fields that contradict each
    other.
    """
    stats = decode(ColorStats, content, name, advice, StoreError)
    wrong = next(inconsistent_statistics(stats), "")
    if wrong:
        raise StoreError(f"{name}: {wrong}. {advice}")
    return stats

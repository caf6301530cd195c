"""Store format: the files of a store, its manifest and the schema version. Both builds and readers use this module.

    store/
      manifest.json               settings, tool versions, classes, splits with their shards, digests, moments
      train/00000/data.mdb …      one LMDB per shard: Caffe Datums under 8-digit keys, in a seeded order
      train/colour.json           mean RGB and colour PCA of the split; the stream reads this file
      train/mean_image.npy        float32 (side_px, side_px, 3): the mean of the central squares of all images
      train/inputs.jsonl          one line for each input that was converted, was left out, has an EXIF orientation
                                  other than 1, or was kept although its decoder warned about it
      val/…

Each time a split is complete, a new manifest.json replaces the old file by a rename. Every file that manifest.json
names therefore exists. The files that manifest.json names are never changed in place. Store.open raises StoreError for
a store whose schema number is not SCHEMA. The error message has both numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from prep.console import UserError, did_you_mean, shell_quoted
from prep.files import write_atomic

SCHEMA = 1
KIND = "alexnet-store"
SPLITS = ("train", "val")
SPLIT_FILES = ("mean_image.npy", "inputs.jsonl")  # files of a split whose digests are in Split.account
COPY_FOLDER = ".copy"  # journal of an unfinished `alexprep copy` into this store (see prep.remote.journal)
FORMATS = ("jpeg", "ppm")  # formats of a record
FILTERS = ("area", "bilinear", "bicubic", "lanczos")  # rescaling filters
BACKGROUNDS = ("white", "black", "grey")  # colours behind transparent pixels
DEFAULT_BACKGROUND = "white"
DROPPED = "dropped"  # Settings.background of stores of older versions, which dropped the alpha channel of images

T = TypeVar("T")


class StoreError(UserError):
    """The store is missing, unfinished, damaged, or of another schema version."""


@dataclass(frozen=True)
class Settings:
    """Options that, with the inputs, determine the bytes of the records. All splits of a store have equal options."""

    side_px: int  # length of the shorter side after rescaling
    keep_aspect: bool  # False: only the central square is stored (section 2 of the paper); True: the whole image
    format: str  # format of the records, "jpeg" or "ppm"
    quality: int  # JPEG quality, 1..100; unused for ppm
    filter: str  # rescaling filter: "area", "bilinear", "bicubic" or "lanczos"
    seed: int  # seed of the record order
    # Manifests of older versions lack the following fields. For each of these fields, from_json sets the value that
    # describes the older versions.
    background: str = DEFAULT_BACKGROUND  # colour behind transparent pixels, one of BACKGROUNDS, or DROPPED
    # JPEGs with more pixels are decoded at 1/2, 1/4 or 1/8 of their size, to save memory; 0: never
    reduce_above: int = 0

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Settings:
        """Return the settings in a manifest, a plan.json or a run.json.

        Raises TypeError for a missing or unknown field.
        """
        return Settings(**{**_OLDER_SETTINGS, **data})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON. A newer field is left out if its value describes what older versions did."""
        return {name: value for name, value in asdict(self).items() if _OLDER_SETTINGS.get(name) != value}


_OLDER_SETTINGS = {"background": DROPPED, "reduce_above": 0}


@dataclass(frozen=True)
class Shard:
    """One LMDB folder of a split."""

    path: str  # path of the shard relative to the store, with forward slashes
    records: int  # number of records
    bytes: int  # size of all Datums, without LMDB's own pages
    digest: str  # SHA-256 over all keys and values in order (see prep.store.lmdb_shard)


@dataclass(frozen=True)
class Split:
    """One complete split."""

    records: int  # number of records
    bytes: int  # size of all Datums
    pixels: int  # number of pixels of all records
    fingerprint: str  # see split_fingerprint
    label_counts: tuple[int, ...]  # number of records of each class
    shards: tuple[Shard, ...]
    moments: Mapping[str, Any]  # exact integers: number of pixels, sum of RGB (3), sum of RGB·RGBᵀ (3×3)
    # Digest of the build plan, counts of inputs, and digests of SPLIT_FILES, as {"plan": SHA-256, "inputs": n, "kept":
    # n, "largest_px": pixels of the largest input kept, "converted": {conversion: n}, "exif_orientation": {value: n},
    # "warnings": {text: n}, "bad": {reason: n}, "files": {name: SHA-256}}. Older versions wrote neither "largest_px"
    # nor "warnings".
    account: Mapping[str, Any]


@dataclass(frozen=True)
class ColorStats:
    """Mean and principal components of the RGB pixels of a split, on the scale 0..255.

    The square roots of `eigenvalues` are standard deviations in grey levels. Krizhevsky's code multiplies each standard
    deviation by a draw from N(0, 0.1). For pixels in [0, 1], divide `eigenvalues` by 255². The eigenvalues in
    fb.resnet.torch are for pixels in [0, 1].
    """

    records: int  # number of records
    pixels: int  # number of pixels
    mean_rgb: tuple[float, ...]  # (3,)
    covariance: tuple[tuple[float, ...], ...]  # (3, 3), grey levels squared
    eigenvalues: tuple[float, ...]  # (3,), descending
    stdevs: tuple[float, ...]  # (3,), grey levels
    eigenvectors: tuple[tuple[float, ...], ...]  # (3, 3): column j for eigenvalue j, with first nonzero entry > 0
    pixel_scale: int  # always 255

    def channel_stats(self, max_value: float = 255) -> ChannelStats:
        """Return mean and standard deviation of each channel, for pixels in 0..`max_value`: 255 (grey levels) or 1."""
        factor = max_value / self.pixel_scale
        stds = (math.sqrt(max(0.0, self.covariance[k][k])) for k in range(3))
        return ChannelStats(
            tuple(factor * mean for mean in self.mean_rgb), tuple(factor * std for std in stds), max_value
        )


class ChannelStats(NamedTuple):
    """Mean and standard deviation of the R, G and B values of pixels, as arguments for transforms.Normalize."""

    mean: Sequence[float]  # (3,)
    std: Sequence[float]  # (3,)
    max_value: float  # value of a white pixel: 255 for grey levels, 1 for pixels in [0, 1]


def _class_names(value: object) -> tuple[str, ...]:
    """Return the classes of a manifest. Raises TypeError if the value is not a list of strings."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"classes: {value!r:.60}, expected a list of strings")
    return tuple(value)


def _from_json(cls: type[T], data: Any, where: str) -> T:
    """Create a `cls` object from a JSON object. Raises StoreError if a field is missing, unknown or of a wrong type."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every caller passes a dataclass
    if cls is Settings and isinstance(data, dict):
        data = {**_OLDER_SETTINGS, **data}
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        content = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise StoreError(f"{where} holds {content}, expected {sorted(names)}. The store is damaged: build it again.")
    for field in fields(cls):  # type: ignore[arg-type]
        if type(data[field.name]) not in _JSON_TYPES[str(field.type).partition("[")[0]]:
            raise StoreError(
                f"{where}: {field.name} is {data[field.name]!r}, expected {field.type}. "
                "The store is damaged: build it again."
            )
    return cls(**{name: _as_tuple(data[name]) for name in names})


_JSON_TYPES: dict[str, tuple[type, ...]] = {  # annotation of a field -> Python types that it allows
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "tuple": (list, tuple),
    "Mapping": (dict,),
}


def _as_tuple(value: Any) -> Any:
    return tuple(_as_tuple(v) for v in value) if isinstance(value, list) else value


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
            content = path.read_bytes()
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

        `name` is the name of the store in errors, by default `root`. Raises StoreError unless the manifest has this
        schema version and all of its fields.
        """
        name = name or str(root)
        path = f"{name.rstrip('/')}/manifest.json"
        try:
            data = json.loads(content)
        except ValueError as error:
            raise StoreError(f"{path}: cannot be read ({error}). Build the store again.") from None
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise StoreError(f"{path}: not the manifest of an alexnet store.")
        if data.get("schema") != SCHEMA:
            raise StoreError(
                f"{name} was built with store version {data.get('schema')}; this program reads version {SCHEMA}. "
                "Build the store again, or install the alexnet release that wrote the store."
            )
        try:
            splits = {}
            for split, raw in data["splits"].items():
                where = f"{path}: split {split}"
                shards = tuple(_from_json(Shard, s, f"{where}: shard") for s in raw["shards"])
                splits[split] = _from_json(Split, {**raw, "shards": shards}, where)
            settings = _from_json(Settings, data["settings"], f"{path}: settings")
            return Store(root, settings, dict(data["tools"]), _class_names(data["classes"]), splits)
        except StoreError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(
                f"{path}: a field is missing or wrong ({error!r}). The store is damaged: build it again."
            ) from None

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

        Raises StoreError if a data.mdb is missing or truncated.
        """
        paths = []
        for shard in self.split(split).shards:
            file = self.root / shard.path / "data.mdb"
            if not file.is_file():
                raise StoreError(f"{file} is missing from the store. Build the store again.")
            if file.stat().st_size < shard.bytes:  # reading past the end of a mapped file would kill the process
                raise StoreError(
                    f"{file} has {file.stat().st_size:,} bytes, its records need {shard.bytes:,}. "
                    "Build the store again."
                )
            paths.append(str(file.parent))
        return paths

    def color_stats(self, split: str = "train") -> ColorStats:
        """Return the mean and colour PCA of a split. Raises StoreError if colour.json is missing or damaged."""
        self.split(split)
        path = self.root / split / "colour.json"
        try:
            return parse_color_stats(path.read_bytes(), str(path))
        except (OSError, ValueError) as error:
            if isinstance(error, StoreError):
                raise
            hint = f"Write the file with: alexprep pca-stats --store {self.root} --split {split}"
            raise StoreError(f"{path}: cannot be read ({error}). {hint}") from None

    def mean_image(self, split: str = "train") -> npt.NDArray[np.float32]:
        """Return the mean of the central squares of all images of a split: float32 (side_px, side_px, 3), 0..255.

        Raises StoreError if mean_image.npy is missing or damaged.
        """
        side_px = self.settings.side_px
        path = self.root / split / "mean_image.npy"
        try:
            mean: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        except Exception as error:  # NumPy parses the header as Python code, so damage can raise any exception
            raise StoreError(f"{path}: cannot be read ({error}). Build the store again.") from None
        if mean.shape != (side_px, side_px, 3) or mean.dtype != np.float32:
            expected = f"float32 {(side_px, side_px, 3)}"
            raise StoreError(f"{path}: {mean.dtype} {mean.shape}, expected {expected}. Build the store again.")
        return mean

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over the contents and the order of all records, and over the names of the classes."""
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
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        data["checksum"] = digest_json(data)
        write_atomic(self.root / "manifest.json", json.dumps(data, indent=1).encode())


def parse_color_stats(content: bytes, name: str) -> ColorStats:
    """Return the content of a colour.json.

    Raises ValueError for text that is not JSON, and StoreError for a wrong field.
    """
    return _from_json(ColorStats, json.loads(content), name)


def split_fingerprint(classes: Sequence[str], shards: Sequence[Shard]) -> str:
    """Return the SHA-256 (hex) of one split, over its class names and the digests of its shards, in order."""
    return digest_json({"classes": list(classes), "shards": [shard.digest for shard in shards]})


def digest_json(data: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

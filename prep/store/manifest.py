"""What a store is on disk: the one format module that its writer and all its readers import.

    store/
      manifest.json               settings, tool versions, classes, splits with their shards, digests, moments
      train/00000/data.mdb …      one LMDB per shard: Caffe Datums under 8-digit keys, in a seeded order
      train/colour.json           mean RGB and colour PCA of the split, which the stream reads
      train/mean_image.npy        float32 (side_px, side_px, 3): the mean of every pixel of the central square
      train/inputs.jsonl          a line for each input that was converted, rotated by EXIF, or left out
      val/…

manifest.json is replaced by rename after a split is whole, so what it names exists. Nothing that it names is ever
changed in place. A reader checks the schema number and refuses another with both numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from prep.console import UserError, shell_quoted
from prep.files import write_atomic

SCHEMA = 1
KIND = "alexnet-store"
SPLITS = ("train", "val")
SPLIT_FILES = ("mean_image.npy", "inputs.jsonl")  # of a split; their digests are in its account
FORMATS = ("jpeg", "ppm")  # of a record
FILTERS = ("area", "bilinear", "bicubic", "lanczos")

T = TypeVar("T")


class StoreError(UserError):
    """A store that is missing, unfinished, damaged, or of another version."""


@dataclass(frozen=True)
class Settings:
    """What the bytes of a store depend on, beside its inputs. Two splits of one store share them."""

    side_px: int  # the shorter side after rescaling
    keep_aspect: bool  # False: the central square only (the paper, section 2)
    format: str  # "jpeg" or "ppm"
    quality: int  # JPEG quality, 1..100; of no meaning for ppm
    filter: str  # "area", "bilinear", "bicubic" or "lanczos"
    seed: int  # of the order of the records


@dataclass(frozen=True)
class Shard:
    """One LMDB folder of a split."""

    path: str  # relative to the store, with forward slashes
    records: int
    bytes: int  # of the Datums, not of the file
    digest: str  # SHA-256 over every key and value in order; see prep.store.lmdb_shard


@dataclass(frozen=True)
class Split:
    """One split, whole. `moments` holds exact integers: pixels, sum of RGB (3), sum of RGB·RGBᵀ (3×3)."""

    records: int
    bytes: int
    pixels: int
    fingerprint: str
    label_counts: tuple[int, ...]
    shards: tuple[Shard, ...]
    moments: Mapping[str, Any]
    account: Mapping[
        str, Any
    ]  # inputs, kept, converted {how: n}, exif_orientation {value: n}, bad {why: n}, files {name: SHA-256}


@dataclass(frozen=True)
class ColorStats:
    """Mean and principal components of the RGB pixels of a split, on the scale 0..255.

    The square roots of `eigenvalues` are standard deviations in grey levels, the quantity that Krizhevsky's code
    multiplies by N(0, 0.1). Divide `eigenvalues` by 255² for pixels in [0, 1], the scale of fb.resnet.torch's
    constants.
    """

    records: int
    pixels: int
    mean_rgb: tuple[float, ...]  # (3,)
    covariance: tuple[tuple[float, ...], ...]  # (3, 3), grey levels squared
    eigenvalues: tuple[float, ...]  # (3,), descending
    stdevs: tuple[float, ...]  # (3,), grey levels
    eigenvectors: tuple[tuple[float, ...], ...]  # (3, 3): column j belongs to eigenvalue j; red component positive
    pixel_scale: int  # always 255


def _build(cls: type[T], data: Any, where: str) -> T:
    """A dataclass from a JSON object that must have exactly its fields."""
    names = [f.name for f in fields(cls)]  # type: ignore[arg-type]  # every caller passes a dataclass
    if not isinstance(data, dict) or sorted(data) != sorted(names):
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise StoreError(f"{where} holds {found}, expected {sorted(names)}. The store is damaged: build it again.")
    for field in fields(cls):  # type: ignore[arg-type]
        if type(data[field.name]) not in _TYPES[str(field.type).partition("[")[0]]:
            raise StoreError(
                f"{where}: {field.name} is {data[field.name]!r}, expected {field.type}. "
                "The store is damaged: build it again."
            )
    return cls(**{name: _frozen(data[name]) for name in names})


_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "str": (str,),
    "bool": (bool,),
    "tuple": (list, tuple),
    "Mapping": (dict,),
}


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value


@dataclass(frozen=True)
class Store:
    """A store on disk, open for reading. Make one with `Store.open`."""

    root: Path
    settings: Settings
    tools: Mapping[str, str]  # name -> version, of what shaped the bytes
    classes: tuple[str, ...]
    splits: Mapping[str, Split]

    @staticmethod
    def open(root: str | Path) -> Store:
        """Read `root`/manifest.json; raises StoreError where there is no whole store of this schema."""
        root = Path(root)
        path = root / "manifest.json"
        if not root.exists():
            raise StoreError(
                f"{root}: no such store. Build one with: alexprep build-lmdb SOURCE --store {shell_quoted(root)}"
            )
        try:
            data = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            unfinished = root.is_dir() and any((root / s).is_dir() for s in SPLITS)
            hint = "a build was not finished: give the same alexprep build-lmdb again" if unfinished else "not a store"
            raise StoreError(f"{root}: no manifest.json in it ({hint}).") from None
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: cannot be read ({error}). Build the store again.") from None
        if not isinstance(data, dict) or data.get("kind") != KIND:
            raise StoreError(f"{path}: not the manifest of an alexnet store.")
        if data.get("schema") != SCHEMA:
            raise StoreError(
                f"{root} was built with store version {data.get('schema')}; this program reads version {SCHEMA}. "
                "Build it again, or install the alexnet release that wrote it."
            )
        try:
            splits = {}
            for name, raw in data["splits"].items():
                where = f"{path}: split {name}"
                shards = tuple(_build(Shard, s, f"{where}: shard") for s in raw["shards"])
                splits[name] = _build(Split, {**raw, "shards": shards}, where)
            settings = _build(Settings, data["settings"], f"{path}: settings")
            return Store(root, settings, dict(data["tools"]), tuple(data["classes"]), splits)
        except StoreError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StoreError(
                f"{path}: {error!r} where a field should be. The store is damaged: build it again."
            ) from None

    def split(self, name: str) -> Split:
        """The split `name`; raises StoreError where the store has none of that name."""
        if name not in self.splits:
            has = ", ".join(self.splits) or "none"
            build = f"Build it: alexprep build-lmdb SOURCE --split {name} --store {shell_quoted(self.root)}"
            mend = build if name in SPLITS else "Name another --split."
            raise StoreError(f"{self.root} has no split {name} (it has: {has}). {mend}")
        return self.splits[name]

    def shard_paths(self, split: str) -> list[str]:
        """The LMDB folders of a split in order; raises StoreError where one is missing or cut short."""
        paths = []
        for shard in self.split(split).shards:
            file = self.root / shard.path / "data.mdb"
            if not file.is_file():
                raise StoreError(f"{file} is missing from the store. Build the store again.")
            if file.stat().st_size < shard.bytes:  # reading past its end would kill the process
                raise StoreError(
                    f"{file} has {file.stat().st_size:,} bytes, its records {shard.bytes:,}. Build it again."
                )
            paths.append(str(file.parent))
        return paths

    def color_stats(self, split: str = "train") -> ColorStats:
        """Mean and colour PCA of a split; raises StoreError where colour.json is missing or damaged."""
        self.split(split)
        path = self.root / split / "colour.json"
        try:
            data = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            hint = f"Write it with: alexprep pca-stats --store {self.root} --split {split}"
            raise StoreError(f"{path}: cannot be read ({error}). {hint}") from None
        return _build(ColorStats, data, str(path))

    def mean_image(self, split: str = "train") -> npt.NDArray[np.float32]:
        """float32 (side_px, side_px, 3), 0..255: the mean over the split of every pixel of the central square."""
        side = self.settings.side_px
        path = self.root / split / "mean_image.npy"
        try:
            mean: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
        except Exception as error:  # a damaged header raises what reading it as Python leads to
            raise StoreError(f"{path}: cannot be read ({error}). Build the store again.") from None
        if mean.shape != (side, side, 3) or mean.dtype != np.float32:
            raise StoreError(f"{path}: {mean.dtype} {mean.shape}, expected float32 {(side, side, 3)}. Build it again.")
        return mean

    @property
    def fingerprint(self) -> str:
        """Digest over the contents and order of all records and the names of the classes (SHA-256, hex)."""
        return digest_json({name: split.fingerprint for name, split in self.splits.items()})

    def save(self) -> None:
        """Replace manifest.json by rename: readers see the old store or the new one, never half of one."""
        data = {
            "kind": KIND,
            "schema": SCHEMA,
            "fingerprint": self.fingerprint,
            "settings": asdict(self.settings),
            "tools": dict(self.tools),
            "classes": list(self.classes),
            "splits": {name: asdict(split) for name, split in self.splits.items()},
        }
        data["checksum"] = digest_json(data)
        write_atomic(self.root / "manifest.json", json.dumps(data, indent=1).encode())


def split_fingerprint(classes: Sequence[str], shards: Sequence[Shard]) -> str:
    """Digest of one split: the names of the classes, then each shard's digest in order."""
    return digest_json({"classes": list(classes), "shards": [shard.digest for shard in shards]})


def digest_json(data: Any) -> str:
    """SHA-256 (hex) of a JSON value in canonical form: sorted keys, no spaces, ASCII."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

"""Typed models of the files of a store: manifest.json, colour.json and inputs.jsonl, with the bounds of each field.

`prep.schema` compares a file with its model. `prep.store.agreement` compares fields with each other, for example sums
that must agree. All objects of manifest.json and colour.json refuse unknown fields, because the schema number in the
manifest determines which fields exist. Lines of inputs.jsonl ignore unknown fields.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NotRequired, TypedDict

from msgspec import Meta, Struct

from prep.console import UserError
from prep.schema import REFUSES_UNKNOWN, Count, Digest, Finite, NonNegative, convert, one_of
from prep.schema.fields import MAX_INT

MAX_MANIFEST_BYTES = 64 << 20  # a manifest of ImageNet has 0.5 MB
MAX_COLOR_STATS_BYTES = 1 << 16
MAX_CLASSES = 1_000_000  # limits the memory for class names; ImageNet-21k has 21,841 classes
MAX_CLASS_NAME = 4096  # largest number of characters
MAX_RECORDS = 100_000_000  # keys have eight digits
MAX_SHARDS = 100_000
MAX_SIDE_PX = 4096
MAX_EXTRA_FIELDS = 100
MAX_WIDTH = 65_536  # largest number of values in a vector
EXTRA_TYPES = ("int", "float", "vector", "text")
DEFAULT_BACKGROUND = "white"
DROPPED = "dropped"  # Settings.background of stores that older versions built: these versions dropped the alpha channel
_OLDER_SETTINGS = {"background": DROPPED, "reduce_above": 0}

Records = Annotated[int, Meta(ge=1, le=MAX_RECORDS)]
ShardPath = Annotated[
    str,
    Meta(pattern=r"^(train|val)/[A-Za-z0-9_-]{1,100}(?![\s\S])", extra={"expected": "a path such as train/00000"}),
]
FieldName = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}(?![\s\S])", extra={"expected": "an identifier such as age"})
]
ClassName = Annotated[str, Meta(min_length=1, max_length=MAX_CLASS_NAME)]
_Reason = Annotated[str, Meta(max_length=65_536)]
Counts = Annotated[dict[_Reason, Count], Meta(max_length=10_000)]
_OF_3 = Meta(min_length=3, max_length=3)
_Three = Annotated[list[Count], _OF_3]
_Level = Annotated[float, Meta(ge=0, le=255)]
_Variance = Annotated[float, Meta(ge=-1e-6, le=65_025)]  # rounding can make the variance of equal pixels negative
_Unit = Annotated[float, Meta(ge=-1.000001, le=1.000001)]


@dataclass(frozen=True)
class Settings:
    """The options of a build that, together with the inputs, determine the records.

    The options are the same for all splits of a store.
    """

    refuses_unknown: ClassVar[bool] = True

    # length of the shorter side after rescaling
    side_px: Annotated[int, Meta(ge=1, le=MAX_SIDE_PX)]
    keep_aspect: bool  # False: only the central square is stored (section 2 of the paper); True: the whole image
    format: Annotated[str, one_of("jpeg", "ppm")]  # format of the records
    quality: Annotated[int, Meta(ge=1, le=100)]  # JPEG quality; unused for ppm
    filter: Annotated[str, one_of("area", "bilinear", "bicubic", "lanczos")]  # rescaling filter
    seed: Count  # seed of the record order
    # Older versions of alexprep did not write the next two fields. with_older adds these fields with the values that
    # describe what the older versions did.
    # colour behind transparent pixels
    background: Annotated[str, one_of("white", "black", "grey", "dropped")] = DEFAULT_BACKGROUND
    # JPEGs with more pixels than this number are decoded at 1/2, 1/4 or 1/8 of their size, to save memory; 0: never
    reduce_above: Count = 0

    @staticmethod
    def from_json(
        data: object, name: str = "settings", advice: str = "", error: Callable[[str], UserError] = UserError
    ) -> Settings:
        """Return the settings in the JSON object `data`. The other arguments and the errors are those of `convert`."""
        return convert(Settings, Settings.with_older(data), name, advice, error)

    @staticmethod
    def with_older(data: object) -> object:
        """Return `data`, the JSON object of settings, with values for the fields that older versions did not write."""
        return {**_OLDER_SETTINGS, **data} if isinstance(data, dict) else data

    def size_fault(self, height: int, width: int) -> str:
        """Return why an image of `height` × `width` px cannot be in a store with these settings, or "" if it can."""
        if not self.keep_aspect and (height, width) != (self.side_px, self.side_px):
            return f"{width:,}×{height:,} px, the images of this store have {self.side_px}×{self.side_px} px"
        if min(height, width) != self.side_px:
            return f"{width:,}×{height:,} px, the shorter side of this store's images is {self.side_px} px"
        return ""

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object. A field is left out if its value is that in _OLDER_SETTINGS."""
        return {name: value for name, value in asdict(self).items() if _OLDER_SETTINGS.get(name) != value}


@dataclass(frozen=True)
class Shard:
    """One LMDB folder of a split."""

    refuses_unknown: ClassVar[bool] = True

    path: ShardPath  # path of the shard relative to the store, with forward slashes
    records: Records  # number of records
    bytes: Count  # size of all Datums, without LMDB's own pages
    digest: Digest  # SHA-256 over all keys and values in order (see prep.store.lmdb_shard)


class MomentsJson(TypedDict):
    """Exact integer sums over all pixels: number of pixels, sum of RGB, sum of RGB·RGBᵀ."""

    pixels: Count
    total: _Three
    outer: Annotated[list[_Three], _OF_3]


class Origin(TypedDict):
    """A split that was merged into another split. If it is itself the result of a merge, it has `sources`, too."""

    fingerprint: Digest
    records: Records
    sources: NotRequired[list[Annotated[Origin, REFUSES_UNKNOWN]]]


class Account(TypedDict):
    """Counts of what became of the inputs of a split, and the digests of the build plan and of files beside shards."""

    plan: Digest
    inputs: Count  # number of inputs: `kept` plus all counts in `bad`
    kept: Count
    # number of pixels of the largest kept input; older versions did not write this field
    largest_px: NotRequired[Count]
    converted: Counts  # {conversion: number of inputs}
    exif_orientation: Counts  # {orientation: number of inputs}
    # {warning: number of kept inputs whose first warning it is}; older versions did not write this field
    warnings: NotRequired[Counts]
    bad: Counts  # {reason: number of inputs that were left out}
    ignored: NotRequired[Counts]  # {reason: number of files that are no inputs}
    files: dict[str, Digest]
    sources: NotRequired[list[Annotated[Origin, REFUSES_UNKNOWN]]]


@dataclass(frozen=True)
class ExtraField:
    """One extra field of a split: a value for each record (prep.store.extra)."""

    refuses_unknown: ClassVar[bool] = True

    type: Annotated[str, one_of(*EXTRA_TYPES)]
    width: Annotated[int, Meta(ge=1, le=MAX_WIDTH)]  # number of values in each vector; 1 for all types except vector
    bytes: Count  # total size of the values of all records


@dataclass(frozen=True)
class Split:
    """One complete split."""

    refuses_unknown: ClassVar[bool] = True

    records: Records  # number of records
    bytes: Count  # size of all Datums
    pixels: Count  # total number of pixels in the images of all records
    fingerprint: Digest  # see split_fingerprint
    # number of records of each class
    label_counts: Annotated[tuple[Count, ...], Meta(min_length=1, max_length=MAX_CLASSES)]
    shards: Annotated[tuple[Shard, ...], Meta(min_length=1, max_length=MAX_SHARDS)]
    moments: Annotated[MomentsJson, REFUSES_UNKNOWN]
    account: Annotated[Account, REFUSES_UNKNOWN]
    # Extra fields by name; stores of older versions have none.
    extra: Annotated[dict[FieldName, ExtraField], Meta(max_length=MAX_EXTRA_FIELDS)] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the split as JSON. An empty `extra` is left out, because older versions did not have this field."""
        return {name: value for name, value in asdict(self).items() if name != "extra" or value}


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """The file manifest.json."""

    kind: Literal["alexnet-store"]
    schema: Literal[1]
    fingerprint: Digest
    settings: Settings
    tools: Annotated[
        dict[Annotated[str, Meta(max_length=100)], Annotated[str, Meta(max_length=1000)]], Meta(max_length=100)
    ]
    classes: Annotated[tuple[ClassName, ...], Meta(min_length=1, max_length=MAX_CLASSES)]
    splits: dict[Annotated[str, one_of("train", "val")], Split]
    checksum: Digest  # SHA-256 of the canonical JSON of all other fields


@dataclass(frozen=True)
class ColorStats:
    """Mean and principal components of the RGB pixels of a split, on the scale 0..255.

    The square roots of `eigenvalues` are standard deviations in grey levels. Krizhevsky's code multiplies each square
    root by a random number from N(0, 0.1²). For pixels in [0, 1], divide `eigenvalues` by 255². The eigenvalues in
    fb.resnet.torch are for pixels in [0, 1].
    """

    refuses_unknown: ClassVar[bool] = True

    records: Records  # number of records
    pixels: Annotated[int, Meta(ge=2, le=MAX_INT)]  # number of pixels
    mean_rgb: Annotated[tuple[_Level, ...], _OF_3]
    covariance: Annotated[tuple[Annotated[tuple[Finite, ...], _OF_3], ...], _OF_3]  # grey levels squared
    eigenvalues: Annotated[tuple[_Variance, ...], _OF_3]  # in descending order
    stdevs: Annotated[tuple[_Level, ...], _OF_3]  # grey levels
    # Column j belongs to eigenvalue j. The first nonzero value of each column is positive.
    eigenvectors: Annotated[tuple[Annotated[tuple[_Unit, ...], _OF_3], ...], _OF_3]
    pixel_scale: Annotated[int, Meta(ge=255, le=255)]  # always 255

    def channel_stats(self, max_value: float = 255) -> ChannelStats:
        """Return mean and standard deviation of each channel, for pixels in 0..`max_value`.

        `max_value` is 255 for grey levels, or 1.
        """
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


class Outcome(TypedDict):
    """One line of inputs.jsonl: the outcome of one input (see prep.store.input_log)."""

    source: _Reason
    fate: Literal["kept", "converted", "kept, with warnings", "bad", "ignored"]
    how: NotRequired[Annotated[list[_Reason], Meta(min_length=1, max_length=100)]]
    why: NotRequired[_Reason]
    warnings: NotRequired[Annotated[list[_Reason], Meta(min_length=1, max_length=1000)]]
    limit: NotRequired[Literal["max_pixels", "time_limit", "on_warning"]]
    pixels: NotRequired[Count]
    seconds: NotRequired[NonNegative]
    exif_orientation: NotRequired[Annotated[int, Meta(ge=0, le=65_535)]]


def outcome_fault(outcome: Mapping[str, Any]) -> str:
    """Return an error text if `outcome` lacks a field that its `fate` or its `limit` requires, otherwise ""."""
    needed = {"bad": "why", "ignored": "why", "kept, with warnings": "warnings"}.get(outcome["fate"], "source")
    also = {"max_pixels": "pixels", "time_limit": "seconds"}.get(outcome.get("limit", ""), "source")
    for missing, cause in (needed, "fate"), (also, "limit"):
        if missing not in outcome:
            return f"has no field {missing}, which is required if {cause} is {outcome[cause]!r}"
    return ""

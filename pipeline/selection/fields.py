"""Types of batches, and the fields of a batch that a user can request with the argument `fields` of a loader."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.augment import Augmentation
from pipeline.records import RecordBatch, Records
from pipeline.sampling import StepDraws
from pipeline.selection.mixture import MixedRecords, Stores
from pipeline.selection.subset import Subset, Weights
from prep.console import WrongArgument, did_you_mean, shell_quoted
from prep.store.manifest import ChannelStats

FieldName = Literal["images", "labels", "keys", "index", "draws", "extra"]
ALL_FIELDS: tuple[FieldName, ...] = get_args(FieldName)
FIELDS = ALL_FIELDS[:-1]  # fields that do not depend on the store
_EXTRA = "extra/"  # prefix of the keys of extra fields in Values


class Batch(NamedTuple):
    """Images and labels of one batch, on the loader's device."""

    images: Tensor
    """RGB in grey levels minus the mean, divided by the divisor and by Augmentation.std: (N, 3, size_px, size_px),
    (N, views, 3, size_px, size_px) for several views, or (N, 3, side, side) for views="square". With layout "NHWC", the
    channels are the last axis."""
    labels: Tensor
    """int64 (N,), indices into the loader's `classes`."""


class FieldBatch(TypedDict, total=False):
    """The fields of one batch that the argument `fields` of the loader names. Tensors are on the loader's device.

    torch's pin_memory and DistributedDataParallel, Lightning's move_data_to_device and accelerate's send_to_device move
    the tensors of a dict to another device, and leave strings as they are.
    """

    images: Tensor
    """As Batch.images."""
    labels: Tensor
    """As Batch.labels: int64 (N,), indices into the loader's `classes`."""
    keys: list[str]
    """N source paths: the input file of each record, relative to the input folder of the split. A path is empty if the
    record has no path."""
    index: Tensor
    """int64 (N,), the numbers of the records in their split: `loader.dataset[number]` decodes a record. If the loader
    mixes several stores, (N, 2): the index of the store, and the number of the record in this store."""
    draws: dict[str, Tensor]
    """The random numbers of the images, from pipeline.sampling.Draws: `offset` int32 (N, 2), row and column of the crop
    in the central square; `flip` int32 (N,), 1 if the image is mirrored; `normal` float64 (N, 3), the standard normal
    numbers of the colour noise; `regions` float64 (N, 11, 2), from draw_regions, only if regions are resized; `effects`
    float64 (N, 32), from draw_effects, only if images can have effects. For several views, the shapes begin with
    (N, views). Only training loaders have random numbers."""
    extra: dict[str, Tensor | list[str]]
    """The extra fields of the records, by name: int64 (N,) for int, float32 (N,) for float, float32 (N, d) for vector,
    and a list of N strings for text. Several views of a record have one value."""


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # The type of a loader's batches. `TrainLoader` without a type argument means `TrainLoader[Batch]`.
    AnyBatch = TypeVar("AnyBatch", bound=Batch | FieldBatch, default=Batch)
else:  # before Python 3.13, a TypeVar of `typing` has no default
    AnyBatch = typing.TypeVar("AnyBatch")


class LoaderOptions(TypedDict, total=False):
    """Arguments that train_loader and eval_loader have in common. The docstring of train_loader describes them."""

    augmentation: Augmentation | None
    normalize: ChannelStats | None
    layout: str
    dtype: str | torch.dtype
    threads: int | None
    shard: int
    world_size: int
    subset: Subset | None
    service: str | None
    service_fallback: str | None
    check: bool | None


class TrainOptions(LoaderOptions, total=False):
    """Keyword-only arguments of train_loader, except `fields`."""

    split: str
    views: int
    weights: Weights | None
    stores: Stores | None


class EvalOptions(LoaderOptions, total=False):
    """Keyword-only arguments of eval_loader, except `fields`."""

    views: int | str
    split: str


def check_fields(fields: Sequence[str] | None, allowed: Sequence[FieldName] = ALL_FIELDS) -> tuple[str, ...] | None:
    """Return the names in `fields` as a tuple. Raises WrongArgument for an unknown name, and if there is no name."""
    if fields is None:
        return None
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    for name in names:
        if name not in allowed:
            why = ", because evaluation draws no random numbers" if name in ALL_FIELDS else ""
            raise WrongArgument(
                f"field {name!r}: expected one of {', '.join(allowed)}{why}.{did_you_mean(name, allowed)}"
            )
    if not names:
        raise WrongArgument(f"fields {fields!r}: expected at least one of {', '.join(allowed)}.")
    return names


def refuse_missing_extra(source: Records | MixedRecords) -> None:
    """Raise WrongArgument if the records have no extra fields, or if mixed stores have different extra fields."""
    if not source.extra_fields:
        root = shell_quoted(source.store.root)
        raise WrongArgument(
            f"fields with extra: split {source.split} of {source.store.root} has no extra fields. Add a field with: "
            f"alexprep build-lmdb SOURCE --store {root} --extra FIELD=CSV"
        )


class Values(NamedTuple):
    """Values that are served with the images of a batch."""

    # The key "keys" for source paths, and a key "extra/FIELD" for each extra field of type text.
    texts: dict[str, list[str]]
    # The key "index", a key "extra/FIELD" for each extra field with numbers, and the names in StepDraws.by_name.
    arrays: dict[str, npt.NDArray[Any]]


def read_values(
    fields: Sequence[str] | None,
    source: Records | MixedRecords,
    records: RecordBatch,
    draws: StepDraws | None,
    views: int,
    is_remote: bool,
) -> Values:
    """Return the values that `fields` names, except images and labels, for N records with `views` images each.

    If `is_remote`, `records` come from a service, which has sent their source paths and the values of their extra
    fields.
    """
    fields, numbers = fields or (), records.numbers[::views]
    texts: dict[str, list[str]] = {}
    arrays: dict[str, npt.NDArray[Any]] = {}
    if "keys" in fields:
        texts["keys"] = list(records.sources[::views] if is_remote else map(source.source, numbers.tolist()))
    if "index" in fields:
        arrays["index"] = source.places(numbers) if isinstance(source, MixedRecords) else numbers.copy()
    if "draws" in fields and draws is not None:
        arrays |= {name: values.copy() for name, values in draws.by_name(views).items()}
    if "extra" in fields:
        for name, column in (records.extra if is_remote else source.extra(numbers)).items():
            if is_remote:
                column = column.take(np.arange(0, len(column), views))
            if column.type == "text":
                texts[_EXTRA + name] = column.texts()
            else:
                arrays[_EXTRA + name] = column.values
    return Values(texts, arrays)


def make_batch(
    fields: Sequence[str],
    images: Tensor,
    labels: Tensor,
    texts: Mapping[str, Sequence[str]],
    arrays: Mapping[str, Tensor],
) -> FieldBatch:
    """Return a batch with the given fields. `texts` and `arrays` have the same keys as in Values."""
    draws = {name: values for name, values in arrays.items() if name != "index" and not name.startswith(_EXTRA)}
    found: dict[str, Tensor | list[str]] = {**arrays, **{name: list(values) for name, values in texts.items()}}
    extra = {name.removeprefix(_EXTRA): found[name] for name in sorted(found) if name.startswith(_EXTRA)}
    values: dict[str, object] = {"images": images, "labels": labels, "draws": draws, "extra": extra, **found}
    return cast(FieldBatch, {name: values[name] for name in fields})

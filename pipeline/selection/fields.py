"""Types of batches, and the fields of a batch that the argument `fields` of a loader names."""

from __future__ import annotations

import typing
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, TypedDict, cast, get_args

import torch
from torch import Tensor

from pipeline.augment import Augmentation
from pipeline.selection.mixture import Stores
from pipeline.selection.subset import Subset, Weights
from prep.console import WrongArgument, did_you_mean
from prep.store.manifest import ChannelStats

FieldName = Literal["images", "labels", "keys", "index", "draws"]
FIELDS: tuple[FieldName, ...] = get_args(FieldName)


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


if TYPE_CHECKING:
    from typing_extensions import TypeVar

    # The type of a loader's batches. `TrainLoader` without a type argument means `TrainLoader[Batch]`.
    AnyBatch = TypeVar("AnyBatch", bound=Batch | FieldBatch, default=Batch)
else:  # before Python 3.13, a TypeVar of `typing` has no default
    AnyBatch = typing.TypeVar("AnyBatch")


class LoaderOptions(TypedDict, total=False):
    """Arguments of both train_loader and eval_loader. The docstring of train_loader describes the arguments."""

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
    """Arguments of train_loader that are given by name."""

    split: str
    views: int
    weights: Weights | None
    stores: Stores | None


class EvalOptions(LoaderOptions, total=False):
    """Arguments of eval_loader that are given by name."""

    views: int | str
    split: str


def check_fields(fields: Sequence[str] | None, allowed: Sequence[FieldName] = FIELDS) -> tuple[str, ...] | None:
    """Return the names of the fields. Raises WrongArgument for a name that is not allowed, and if there is no name."""
    if fields is None:
        return None
    names = (fields,) if isinstance(fields, str) else tuple(fields)
    for name in names:
        if name not in allowed:
            why = ", because evaluation draws no random numbers" if name in FIELDS else ""
            raise WrongArgument(
                f"field {name!r}: expected one of {', '.join(allowed)}{why}.{did_you_mean(name, allowed)}"
            )
    if not names:
        raise WrongArgument(f"fields {fields!r}: expected at least one of {', '.join(allowed)}.")
    return names


def make_batch(
    fields: Sequence[str], images: Tensor, labels: Tensor, keys: Sequence[str], arrays: Mapping[str, Tensor]
) -> FieldBatch:
    """Return the batch of the given fields. `arrays` has the record numbers as "index", and the arrays of the draws."""
    draws = {name: values for name, values in arrays.items() if name != "index"}
    values = {"images": images, "labels": labels, "keys": list(keys), "index": arrays.get("index"), "draws": draws}
    return cast(FieldBatch, {name: values[name] for name in fields})

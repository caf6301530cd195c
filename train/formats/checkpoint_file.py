"""Checks the content of a checkpoint file: the types and ranges of its values, and the shapes of its tensors.

The digest of a checkpoint shows that the file was not altered after it was written, but not who wrote the file. The
content is therefore checked before torch allocates a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from prep.console import UserError
from prep.schema import Digest, convert
from train.config.identity import stream_seed_of
from train.formats.fields import (
    Ancestry,
    ArchitectureFields,
    AugmentationFields,
    Device,
    EnvironmentFields,
    IdentityFields,
    Names,
    Positive,
    RecipeFields,
    Share,
    Step,
    check_identity_fields,
    checked_architecture,
    checked_recipe,
    parameter_shapes,
)
from train.formats.pickled_values import StoredTensor

ADVICE = "Use another checkpoint of the run, or an intact copy of this file."
CUDA_STATE_BYTES = 16  # a GPU's random number generator has a state of two 64-bit integers: seed and offset
TENSORS = ("parameters", "velocity", "random", "random_cuda")


class ScheduleState(Struct, frozen=True):
    """The state of the schedule (Schedule.state_dict). The best error is infinite before the first validation."""

    best_error: Annotated[float, Meta(ge=0)]
    epochs_since_best: Step
    drops: Annotated[int, Meta(ge=0, le=1_000_000)]
    finished: bool


class StreamState(Struct, frozen=True):
    """The state of the training stream (TrainLoader.state_dict)."""

    graph_version: Annotated[int, Meta(ge=0, le=1_000_000)]
    store_fingerprint: Digest
    split: Literal["train", "val"]
    batch_size: Positive
    world_size: Positive
    shard: Annotated[int, Meta(ge=0, le=2**31)]
    seed: Annotated[int, Meta(ge=0)]
    augmentation: AugmentationFields
    layout: Literal["NCHW", "NHWC"]
    dtype: Literal["float32", "float16", "bfloat16"]
    epoch: Annotated[int, Meta(ge=0, le=2**31)]
    step: Step
    normalize: list[Any] | None = None


class BestFields(Struct, frozen=True):
    """The validation with the lowest top-1 error."""

    step: Step
    top1_error: Share


class CheckpointFile(Struct, frozen=True):
    """The values of a checkpoint that are not tensors (train.runs.checkpoint.Checkpoint)."""

    identity: IdentityFields
    model: ArchitectureFields
    recipe: RecipeFields
    classes: Names
    environment: EnvironmentFields
    step: Step
    steps_per_epoch: Annotated[int, Meta(ge=1, le=10**12)]
    validation_due: bool
    schedule: ScheduleState
    devices: Annotated[list[Device], Meta(max_length=2)]
    stream: StreamState
    best: BestFields | None
    ancestry: Ancestry


def check_content(content: Mapping[str, Any], name: str, random_bytes: int) -> None:
    """Raise UserError if the content of a checkpoint cannot come from a run.

    content       the values by name, with a StoredTensor for each tensor
    name          name of the file, for error messages
    random_bytes  size of the state of torch's generator on the CPU
    """
    checked = convert(CheckpointFile, {k: v for k, v in content.items() if k not in TENSORS}, name, ADVICE)
    architecture = checked_architecture(content["model"], f"{name}: model", ADVICE)
    recipe = checked_recipe(content["recipe"], f"{name}: recipe", ADVICE)
    check_identity_fields(checked.identity, architecture, recipe, len(checked.classes), name, ADVICE)
    of_stream = {"store_fingerprint": checked.identity.store_fingerprint, "seed": stream_seed_of(content["identity"])}
    for field, expected in of_stream.items():
        found = getattr(checked.stream, field)
        if found != expected:
            raise UserError(f"{name}: stream.{field} is {found}, expected {expected}, as in identity. {ADVICE}")
    shapes = parameter_shapes(architecture, recipe.crossing, len(checked.classes))
    names_used: set[str] = set()
    for part in ("parameters", "velocity"):
        _check_parameters(content[part], shapes, f"{name}: {part}", names_used)
    _check_state(content["random"], random_bytes, f"{name}: random", names_used)
    _check_cuda_states(content["random_cuda"], checked.devices[: architecture.columns], name, names_used)


def _check_parameters(tensors: Any, shapes: Mapping[str, tuple[int, ...]], name: str, names_used: set[str]) -> None:
    if not isinstance(tensors, dict):
        raise UserError(f"{name} is {type(tensors).__name__}, expected a dict of tensors. {ADVICE}")
    differing = sorted(set(shapes) ^ set(tensors))
    if differing:
        has = "has" if differing[0] in tensors else "lacks"
        raise UserError(f"{name} {has} {differing[0]:.60}, expected {', '.join(shapes)}. {ADVICE}")
    for key, shape in shapes.items():
        check_tensor(tensors[key], ("float32",), shape, f"{name}.{key}", ADVICE)
        _check_alone(tensors[key], f"{name}.{key}", names_used)


def _check_state(tensor: Any, size_bytes: int, name: str, names_used: set[str]) -> None:
    check_tensor(tensor, ("uint8",), (size_bytes,), name, ADVICE)
    _check_alone(tensor, name, names_used)


def _check_cuda_states(states: Any, devices: Sequence[str], name: str, names_used: set[str]) -> None:
    if not isinstance(states, list) or len(states) > 2:
        raise UserError(f"{name}: random_cuda is no list of at most 2 states. {ADVICE}")
    for index, state in enumerate(states):
        _check_state(state, CUDA_STATE_BYTES, f"{name}: random_cuda.{index}", names_used)
    gpus = [device for device in devices if device != "cpu"]
    if devices and len(states) != len(gpus):
        raise UserError(
            f"{name}: random_cuda has {len(states)} states, expected {len(gpus)}, one for each GPU. {ADVICE}"
        )


def check_tensor(tensor: Any, dtypes: Sequence[str], shape: Sequence[int | None], name: str, advice: str) -> None:
    """Raise UserError unless `tensor` is a StoredTensor of this type and shape that fills its storage without gaps.

    dtypes  names of the allowed types, such as "float32"
    shape   expected shape; None in place of a size allows any size
    """
    if not isinstance(tensor, StoredTensor):
        raise UserError(f"{name} is {type(tensor).__name__}, expected a tensor. {advice}")
    fits = len(tensor.shape) == len(shape) and all(e in (None, n) for n, e in zip(tensor.shape, shape, strict=True))
    if not fits:
        expected = tuple("any" if size is None else size for size in shape)
        raise UserError(f"{name} has shape {tensor.shape}, expected {expected}. {advice}".replace("'", ""))
    if tensor.dtype not in dtypes:
        raise UserError(f"{name} has the type {tensor.dtype}, expected {' or '.join(dtypes)}. {advice}")
    if not tensor.is_dense():
        raise UserError(
            f"{name} has strides {tensor.stride} and begins at element {tensor.offset:,} of "
            f"{tensor.storage.elements:,}, expected a tensor that fills its storage without gaps. {advice}"
        )


def _check_alone(tensor: StoredTensor, name: str, names_used: set[str]) -> None:
    """Raise UserError if a tensor of a checkpoint is not on the CPU, or shares its storage with another tensor."""
    if tensor.storage.device != "cpu":
        raise UserError(f"{name} is on the device {tensor.storage.device!r:.40}, expected cpu. {ADVICE}")
    if tensor.storage.key in names_used:
        raise UserError(f"{name} shares the storage {tensor.storage.key!r:.40} with another tensor. {ADVICE}")
    names_used.add(tensor.storage.key)

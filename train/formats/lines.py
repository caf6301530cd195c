"""metrics.jsonl and evaluations.jsonl: a class for each kind of line, called its model, and a reader of these files.

Unknown fields are kept, because other versions of this program write other metrics. After a power cut, a file can end
with arbitrary bytes that no newline follows. The reader ignores these bytes. All lines before them must be complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from prep.schema import Finite, NonNegative, Text, convert, parse_json, read_regular
from train.config.architecture import LAYERS
from train.formats.fields import AboveZero, Positive, Precision, Share, Step

MAX_BYTES = 1 << 30  # largest size of a file of lines; a run of 90 epochs of ImageNet writes about 60 MB

LayerNorms = dict[Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.]{1,64}(?![\s\S])")], Finite]


class TrainLine(Struct, frozen=True):
    """A line of metrics.jsonl for the steps since the previous TrainLine. Version 0.1.0 wrote no `unix_time_s`."""

    epoch: NonNegative
    step: Step
    loss: Finite
    top1_error: Share
    top5_error: Share
    images_per_s: AboveZero
    waiting_share: Finite
    lr: NonNegative
    stream_waiting_share: Finite = 0.0
    gradient_norm: LayerNorms = {}
    weight_norm: LayerNorms = {}
    memory_mb: NonNegative = 0.0
    gpu_memory_mb: list[NonNegative] = []
    unix_time_s: NonNegative = 0.0


class _LineOfKnownLayers(TrainLine, frozen=True):
    """A TrainLine whose layers are in LAYERS. The pattern of their names is therefore not checked.

    The check of the pattern would take a third of the time for reading a line.
    """

    gradient_norm: dict[str, Finite] = {}
    weight_norm: dict[str, Finite] = {}


class ValLine(Struct, frozen=True):
    """A line of metrics.jsonl for a validation. The loss of a network that diverges can be NaN or infinite."""

    epoch: Step
    step: Step
    top1_error: Share
    top5_error: Share
    loss: float
    images: Positive
    unix_time_s: NonNegative = 0.0


class EvaluationLine(Struct, frozen=True):
    """A line of evaluations.jsonl. The loss of a network that diverges can be NaN or infinite."""

    step: Step
    split: Text
    split_fingerprint: Text
    views: Literal[1, 10, "dense"]
    precision: Precision
    top1_error: Share
    top5_error: Share
    loss: float
    images: Positive


class KindField(Struct, frozen=True):
    """The field of a line of metrics.jsonl that says which other fields the line has."""

    kind: Literal["train", "val"]


Models = type[Struct] | Mapping[str, type[Struct]]  # the model of all lines, or {kind of line: model}
METRICS: Models = {"train": TrainLine, "val": ValLine}


def read_lines(path: Path, models: Models, advice: str) -> list[tuple[bytes, dict[str, Any]]]:
    """Return the lines of a file, each as text and as an object that has the types of its model.

    The list is empty if the file does not exist. If the last line has no newline and is not JSON, it is left out,
    together with the lines directly before it that are not JSON. Raises UserError, with the number of the line, for any
    other invalid line. Also raises UserError if the file is not a regular file, or is larger than MAX_BYTES. Raises
    OSError if the file cannot be read.
    """
    try:
        content = read_regular(path, MAX_BYTES, advice)
    except (FileNotFoundError, NotADirectoryError):
        return []
    lines = []
    *complete, cut = content.split(b"\n")
    if cut and not _is_json(cut):
        cut = b""
        while complete and not _is_json(complete[-1]):
            complete.pop()
    for number, text in enumerate(complete, start=1):
        if text.strip():
            lines.append((text, _parse(text, models, f"{path}: line {number}", advice)))
    if cut:
        lines.append((cut, _parse(cut, models, f"{path}: line {len(complete) + 1}", advice)))
    return lines


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: bytes, models: Models, name: str, advice: str) -> dict[str, Any]:
    try:
        line = msgspec.json.decode(text)
        model = models if isinstance(models, type) else models[line["kind"]]
        if model is TrainLine and _has_known_layers(line):
            model = _LineOfKnownLayers
        msgspec.convert(line, model)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        line = _parse_slowly(text, models, name, advice)
    return dict(line)


def _has_known_layers(line: dict[str, Any]) -> bool:
    """Return whether all layers in the norms of a line are in LAYERS."""
    return all(line.get(part, {}).keys() <= set(LAYERS) for part in ("gradient_norm", "weight_norm"))


def _parse_slowly(text: bytes, models: Models, name: str, advice: str) -> Any:
    """Return the object of a line that msgspec refused, such as a line with NaN. Raises UserError for invalid lines."""
    try:
        line = json.loads(text.decode())  # unlike msgspec, json reads NaN and infinite numbers
    except (ValueError, RecursionError):
        line = parse_json(text, name, advice)
    kind = None if isinstance(models, type) else convert(KindField, line, name, advice).kind
    convert(models if isinstance(models, type) else models[str(kind)], line, name, advice)
    return line

"""Typed models of the files in .build, and functions that read these files.

.build is the work folder of an unfinished build or merge. Any release may change the format of these files, so the
models ignore unknown fields.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, NotRequired, TypedDict, TypeVar

from msgspec import Meta, Struct

from prep.console import UserError
from prep.schema import Count, Digest, NonNegative, convert, decode, parse_json, read_regular, shown
from prep.store.agreement import impossible_moments
from prep.store.models import (
    MAX_CLASSES,
    MAX_EXTRA_FIELDS,
    MAX_RECORDS,
    MAX_SHARDS,
    ClassName,
    ExtraField,
    FieldName,
    MomentsJson,
    Outcome,
    Settings,
    ShardPath,
    outcome_fault,
)

RESTART = "The unfinished build cannot be read: pass --restart to discard it."
_MAX_PLAN_BYTES = 64 << 20
_MAX_SUMMARY_BYTES = 64 << 20  # a shard has at most 4096 inputs
_MAX_SMALL_BYTES = 1 << 20

T = TypeVar("T")
_Label = Annotated[int, Meta(ge=0, lt=MAX_CLASSES)]
_Text = Annotated[str, Meta(max_length=65_536)]


class BegunExtra(TypedDict):
    """An extra field of an unfinished build. Its values are in the folder `extra` of the work folder."""

    field: ExtraField
    digest: Digest  # Column.digest of the values of all inputs, in record order


class PlanFile(Struct, frozen=True):
    """The file plan.json: what stays the same when an unfinished build is resumed, and the names of unused files."""

    settings: Settings
    tools: Annotated[dict[str, _Text], Meta(max_length=100)]
    classes: Annotated[tuple[ClassName, ...], Meta(min_length=1, max_length=MAX_CLASSES)]
    # shard k has the inputs edges[k] to edges[k + 1] − 1, in record order
    edges: Annotated[list[Count], Meta(min_length=1, max_length=MAX_SHARDS + 1)]
    id: _Text = ""  # identity of the build
    # BuildPlan.digest, which covers settings, classes and inputs; older versions did not write this field
    digest: Digest | None = None
    source: _Text = ""  # absolute path of the inputs
    refused: tuple[tuple[_Text, _Text], ...] = ()  # (name, reason) of bad inputs that the listing left out
    ignored: tuple[tuple[_Text, _Text], ...] = ()  # (name, reason) of files and folders that are no inputs
    extra: Annotated[dict[FieldName, BegunExtra], Meta(max_length=MAX_EXTRA_FIELDS)] = {}


class BuiltShard(TypedDict):
    """The field `shard` of a Summary. It has the fields of prep.store.models.Shard, but may have 0 records."""

    path: ShardPath
    records: Annotated[int, Meta(ge=0, le=MAX_RECORDS)]
    bytes: Count
    digest: Digest


class Summary(TypedDict):
    """The file NNNNN.json: the summary of one finished shard. A merge writes neither `moments` nor `largest_px`."""

    shard: BuiltShard
    labels: list[tuple[_Label, Count]]  # (label, number of records)
    fates: list[Outcome]  # outcomes of the inputs that get a line in inputs.jsonl
    build: NotRequired[str]  # `id` of the plan
    moments: NotRequired[MomentsJson]
    largest_px: NotRequired[Count]


class PartsFile(Struct, frozen=True):
    """The file parts.json: the division of a build into parts."""

    parts: Annotated[int, Meta(ge=1, le=MAX_SHARDS)]
    command: _Text  # command line of a part, without --part


class MergeFile(Struct, frozen=True):
    """The file merge.json: the digest of the plan of a merge."""

    digest: Digest


# deaths.json: {path of an input: number of worker processes that crashed at the input}
CrashCounts = dict[_Text, Count]
# slow.json: {path of an input: seconds of CPU time after which decoding was stopped}
SlowInputs = dict[_Text, NonNegative]


def read_plan(work_dir: Path, advice: str = RESTART) -> PlanFile:
    """Return the content of plan.json in a work folder.

    Raises OSError if the file cannot be read, and UserError, with `advice` in its message, if the file is damaged.
    """
    path = work_dir / "plan.json"
    data = parse_json(read_regular(path, _MAX_PLAN_BYTES, advice), str(path), advice)
    if isinstance(data, dict) and "settings" in data:
        data = {**data, "settings": Settings.with_older(data["settings"])}
    plan = convert(PlanFile, data, str(path), advice)
    name = next((name for name, count in Counter(plan.classes).items() if count > 1), None)
    if name is not None:
        raise UserError(f"{path}: the list classes has the name {shown(name)} twice, expected once. {advice}")
    if plan.edges != sorted(plan.edges):
        raise UserError(f"{path}: the list edges descends, expected ascending boundaries of shards. {advice}")
    return plan


def read_summary(path: Path, split: str, classes: int) -> Summary:
    """Return the summary of a shard from `path`. The stem of the file name is the number of the shard.

    Raises OSError if the file cannot be read. Raises UserError if the file is damaged or belongs to another shard. Also
    raises UserError if a label is not below `classes`, or if the counts do not add up to the number of records.
    """
    advice = "Run the same command again."
    summary = decode(Summary, read_regular(path, _MAX_SUMMARY_BYTES, advice), str(path), advice)
    shard, labels = summary["shard"], dict(summary["labels"])
    if shard["path"] != f"{split}/{path.stem}":
        raise UserError(f"{path}: shard.path is {shard['path']}, expected {split}/{path.stem}. {advice}")
    if len(labels) != len(summary["labels"]):
        raise UserError(f"{path}: the field labels lists a label twice, expected each label once. {advice}")
    if sum(labels.values()) != shard["records"] or any(label >= classes for label in labels):
        text = f"the field labels has {sum(labels.values())} records and labels up to {max(labels, default=0)}"
        raise UserError(f"{path}: {text}, expected {shard['records']} records and labels below {classes}. {advice}")
    for number, outcome in enumerate(summary["fates"]):
        fault = outcome_fault(outcome)
        if fault:
            raise UserError(f"{path}: fates.{number} {fault}. {advice}")
    wrong = next(impossible_moments(summary["moments"]), "") if "moments" in summary else ""
    if wrong:
        raise UserError(f"{path}: moments: {wrong}. {advice}")
    return summary


def read_work_file(type_: type[T], path: Path, advice: str = RESTART, max_bytes: int = _MAX_SMALL_BYTES) -> T:
    """Return the content of a file of a work folder, checked against `type_`. Raises the same errors as read_plan."""
    return decode(type_, read_regular(path, max_bytes, advice), str(path), advice)

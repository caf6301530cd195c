"""Assembles a split from its finished shards: totals, colour statistics, mean image, inputs.jsonl and manifest."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from prep.build.plan import BuildPlan, BuildPolicy, bad_outcomes, no_image_error, not_images, tool_versions
from prep.build.shard_task import summary_path
from prep.console import UserError, count_noun
from prep.extra.columns import record_positions
from prep.files import save_array, write_atomic
from prep.images.color_stats import Moments, compute_color_stats
from prep.inputs.classes import examples
from prep.inputs.names import name_text
from prep.schema import ArrayShape, file_sha256, read_npy
from prep.store.extra import save_columns
from prep.store.input_log import IGNORED, write_outcomes
from prep.store.manifest import Settings, Shard, Split, Store, split_files, split_fingerprint
from prep.store.models import Account
from prep.store.work_files import Summary


def assemble_split(plan: BuildPlan, root: Path, existing: Store | None, policy: BuildPolicy) -> Store:
    """Write the files of a split whose shards are all built, and then the manifest.

    `root` is the folder of the store. The manifest also lists the splits that the `existing` store already has. Raises
    UserError if a work file of a shard is missing or damaged, or was written for other inputs. Also raises UserError if
    no input is an image, if there are more bad inputs than `policy` allows, or if all inputs of a class are bad and
    `policy` does not allow empty classes.
    """
    source, settings, folder = plan.source, plan.settings, plan.folder
    moments, shards, bad = Moments(), [], len(source.refused)
    labels: Counter[int] = Counter()
    largest_px = 0
    square_sum = np.zeros((settings.side_px, settings.side_px, 3), np.int64)
    for number in range(plan.shard_count):
        summary = plan.shard_summary(number)
        path = summary_path(folder, number)
        if summary is None or "moments" not in summary:
            raise UserError(f"{path} is missing. Run the same command again.")
        square_sum += _read_square_sum(path.with_suffix(".npy"), summary, settings)
        moments += Moments.from_json(summary["moments"])
        labels.update(dict(summary["labels"]))
        largest_px = max(largest_px, summary.get("largest_px", 0))
        shard_bad = len(bad_outcomes(summary["fates"]))
        if summary["shard"]["records"] + shard_bad != plan.count_inputs([number]):
            counted = summary["shard"]["records"] + shard_bad
            raise UserError(
                f"{path} counts {counted:,} inputs, expected {plan.count_inputs([number]):,}. Pass --restart to build "
                "from scratch."
            )
        bad += shard_bad
        if summary["shard"]["records"]:  # DALI cannot open an LMDB without records
            shards.append(Shard(**summary["shard"]))
    if policy.max_bad is not None and bad > policy.max_bad:
        raise UserError(f"{too_many_bad(bad, policy.max_bad)} Raise --max-bad to finish the build.")
    if not policy.allow_empty_classes:
        _refuse_lost_classes(plan, labels)
    inputs, records = len(source.inputs) + len(source.refused), sum(shard.records for shard in shards)
    if not records:
        first = next(outcome for outcome in _outcomes(plan) if outcome["fate"] == "bad")
        raise no_image_error(source, first["why"])
    save_array(folder / "mean_image.npy", (square_sum / records).astype(np.float32))
    columns = plan.extra_columns()
    positions = record_positions(root, shards, len(source.inputs)) if columns else np.empty(0, np.int64)
    extra = save_columns(folder, {name: column.take(positions) for name, column in columns.items()})
    account = write_outcomes(folder / "inputs.jsonl", _outcomes(plan))
    files = {name: file_sha256(folder / name) for name in split_files(extra)}
    split = Split(
        records=records,
        bytes=sum(shard.bytes for shard in shards),
        pixels=moments.pixels,
        fingerprint=split_fingerprint(source.classes, shards, extra, files),
        label_counts=tuple(labels[k] for k in range(len(source.classes))),
        shards=tuple(shards),
        moments=moments.to_json(),
        account=cast(
            Account,
            {
                "plan": plan.digest,
                "inputs": inputs,
                "kept": records,
                "largest_px": largest_px,
                **account,
                "files": files,
            },
        ),
        extra=extra,
    )
    write_color_stats(folder, split)
    splits = {**(existing.splits if existing else {}), source.split: split}
    store = Store(root, settings, tool_versions(), source.classes, splits)
    for number in set(range(plan.shard_count)) - {int(Path(shard.path).name) for shard in shards}:
        shutil.rmtree(folder / f"{number:05d}", ignore_errors=True)
    store.save()
    return store


def _read_square_sum(path: Path, summary: Summary, settings: Settings) -> npt.NDArray[np.int64]:
    """Return the sum of the central squares of a shard's images, int64 (side_px, side_px, 3), from its work file.

    Raises UserError if the file is damaged, or if the sums contradict the shard's summary.
    """
    advice = "Pass --restart to build from scratch."
    expected = ArrayShape(("<i8",), (settings.side_px, settings.side_px, 3))
    square: npt.NDArray[np.int64] = read_npy(path, expected, advice)
    highest = 255 * summary["shard"]["records"]
    if square.min() < 0 or square.max() > highest:
        raise UserError(f"{path} has values from {square.min()} to {square.max()}, expected 0 to {highest}. {advice}")
    sums, total = square.sum(axis=(0, 1)).tolist(), summary["moments"]["total"]
    if not settings.keep_aspect and sums != total:  # the central squares are the whole images
        raise UserError(f"{path} has the sums {sums}, expected {total}, as in {path.stem}.json. {advice}")
    return square


def _refuse_lost_classes(plan: BuildPlan, records_of_label: Counter[int]) -> None:
    """Raise UserError if all inputs of a class were left out because they are bad."""
    source = plan.source
    counts = source.inputs.label_counts(len(source.classes)).tolist()
    lost = [label for label, count in enumerate(counts) if count and not records_of_label[label]]
    if lost and sum(records_of_label.values()):
        names = examples([f"{source.classes[label]} ({count_noun(counts[label], 'input')})" for label in lost])
        names_of_lost = {name_text(item.path) for item in source.inputs if item.label in lost}
        reason = next(outcome for outcome in _outcomes(plan) if outcome["source"] in names_of_lost)
        raise UserError(
            f"{source.reader.root}: {count_noun(len(lost), 'class', 'classes')} would have no photographs, because all "
            f"of their inputs are bad: {names}. The first bad input is {reason['source']}: {reason['why']}. Correct "
            "these inputs, or pass --allow-empty-classes with the same command: finished shards are kept."
        )


def _outcomes(plan: BuildPlan) -> Iterator[Mapping[str, Any]]:
    """Yield the lines of inputs.jsonl: first for ignored inputs, then for refused inputs, then for inputs in shards."""
    yield from ({"source": name, "fate": IGNORED, "why": reason} for name, reason in plan.source.ignored)
    yield from ({"source": name, "fate": "bad", "why": reason} for name, reason in plan.source.refused)
    for number in range(plan.shard_count):
        yield from (plan.shard_summary(number) or {"fates": ()})["fates"]


def too_many_bad(bad: int, max_bad: int) -> str:
    """Return the first sentence of the error message for a build with more than `max_bad` bad inputs."""
    return f"{not_images(bad)}, more than --max-bad {max_bad} allows."


def write_color_stats(folder: Path, split: Split) -> None:
    """Compute the colour statistics of a split from its exact moments, and write them to colour.json for training."""
    stats = compute_color_stats(split.records, Moments.from_json(split.moments))
    write_atomic(folder / "colour.json", json.dumps(asdict(stats)).encode())

"""What is to be built: the inputs of a split in their order, cut into shards, and what earlier builds left of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from PIL import features

from prep.build.shard_task import ShardTask, record_path
from prep.console import UserError
from prep.files import write_atomic
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import Source
from prep.store.manifest import Settings, digest_json
from prep.version import package_version

SHARD_RECORDS = 4096  # at the most: about 100 MB of JPEG, ten seconds of one core
_LEAST_RECORDS, _WANTED_SHARDS = 64, 32  # a small split is cut finer, so that all cores have work


class Plan:
    """The inputs of a split in their order, cut into shards of nearly equal length."""

    def __init__(self, source: Source, folder: Path, settings: Settings, skip_bad: bool) -> None:
        self.source, self.folder, self.settings, self.skip_bad = source, folder, settings, skip_bad
        self.work = folder / ".build"
        self.order = source.inputs.permutation(settings.seed)
        n = len(self.order)
        length = min(SHARD_RECORDS, max(_LEAST_RECORDS, -(-n // _WANTED_SHARDS)))
        self.shards = -(-n // length)
        self.edges = [n * s // self.shards for s in range(self.shards + 1)] if n else [0]
        self.digest = digest_json(
            {"settings": asdict(settings), "classes": source.classes, "inputs": source.inputs.digest()}
        )

    def task(self, number: int) -> ShardTask:
        """All that building one shard takes."""
        start, stop = self.edges[number], self.edges[number + 1]
        inputs = tuple(self.source.inputs[index] for index in self.order[start:stop].tolist())
        source = self.source
        deadly = frozenset(path for path, times in self.deaths().items() if self.skip_bad and times > 1)
        return ShardTask(
            number, start, inputs, source.reader, source.split, self.folder, self.settings, self.skip_bad, deadly
        )

    def deaths(self) -> dict[str, int]:
        """How often a worker died at an input, by its path."""
        try:
            found: dict[str, int] = json.loads((self.work / "deaths.json").read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found

    def note_death(self, path: str) -> None:
        """A worker died at an input."""
        deaths = self.deaths()
        deaths[path] = deaths.get(path, 0) + 1
        write_atomic(self.work / "deaths.json", json.dumps(deaths).encode())

    def inputs_of(self, numbers: Iterable[int]) -> int:
        """How many inputs these shards have."""
        return sum(self.edges[number + 1] - self.edges[number] for number in numbers)

    def sample(self, numbers: Sequence[int], most: int = 16) -> list[ShardTask]:
        """A few inputs of these shards, evenly taken, one to a task."""
        chosen = [numbers[len(numbers) * k // most] for k in range(most)] if numbers else []
        tasks = []
        for number in dict.fromkeys(chosen):
            task = self.task(number)
            share = -(-most // len(set(chosen)))
            step = max(1, len(task.inputs) // share)
            tasks.append(replace(task, inputs=task.inputs[::step][:share], skip_bad=True))
        return tasks

    def record(self, number: int) -> dict[str, Any] | None:
        """What a finished shard's record says; None where there is none."""
        path = record_path(self.folder, number)
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            size = (self.folder / f"{number:05d}" / "data.mdb").stat().st_size
        except (FileNotFoundError, ValueError):
            return None
        return record if path.with_suffix(".npy").exists() and size >= record["shard"]["bytes"] else None

    def has_finished(self) -> bool:
        """Whether any shard, of this plan or another, is recorded here."""
        return any(self.work.glob("[0-9]*.json"))

    def is_done(self, number: int) -> bool:
        """Recorded, and not with a bad picture that this build would not leave out: it may have been mended."""
        record = self.record(number)
        return record is not None and (self.skip_bad or not bad_of(record["fates"]))

    def bad_so_far(self) -> int:
        """Inputs left out by the shards that are finished."""
        records = [self.record(number) for number in range(self.shards) if self.is_done(number)]
        return sum(len(bad_of(record["fates"])) for record in records if record is not None)


def bad_of(fates: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The fates of inputs that were left out."""
    return [fate for fate in fates if fate["fate"] == "bad"]


def touches(plan: Plan, number: int, changed: Mapping[bytes, Any]) -> bool:
    """Whether a shard has any of the inputs that `changed` names by path."""
    start, stop = plan.edges[number], plan.edges[number + 1]
    indices = plan.order[start:stop].tolist() if changed else ()
    return any(plan.source.inputs.path(index) in changed for index in indices)


def changed_inputs(plan: Plan, store: Path) -> dict[bytes, tuple[Input, Input]]:
    """Inputs that changed since a build began, (then, now) by path, where that does no harm.

    A file that was mended before its shard was built is just read. Raises UserError where a finished shard used what
    has changed, where an input has gone or is new, and for other settings or classes.
    """
    try:
        begun = json.loads((plan.work / "plan.json").read_bytes())
        then = Listing.load(plan.work / "inputs.npz")
        classes, settings = begun["classes"], dict(begun["settings"])
        if settings.keys() != asdict(plan.settings).keys():
            raise ValueError("plan.json has other fields")
        tools, edges = dict(begun["tools"]), list(begun["edges"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{plan.work}: {error}. The unfinished build cannot be read: pass --restart to discard it."
        ) from None
    same_settings(plan.settings, settings, store)
    for tool, used in tool_versions().items():
        if tools.get(tool) != used:
            raise UserError(
                f"{store} holds an unfinished build by {tool} {tools.get(tool)}, this is {used}. "
                "Finish it with that version, or pass --restart to discard what was built."
            )
    now = plan.source.inputs
    way_out = "Put it back to go on, pass --restart to discard what was built, or choose another --store."
    if classes != list(plan.source.classes):
        raise UserError(
            f"{store} holds an unfinished build of {len(classes)} classes, this command has "
            f"{len(plan.source.classes)}. {way_out}"
        )
    if now.same_as(then):
        return {}
    odd = then.first_path_difference(now, plan.settings.seed)
    if odd is not None:
        raise UserError(
            f"{store} holds an unfinished build of other inputs: {name_text(odd[0])} {odd[1]} "
            f"({len(then):,} inputs then, {len(now):,} now). {way_out}"
        )
    if edges != plan.edges:
        raise UserError(f"{store} holds an unfinished build of other shards. {way_out}")
    changed = then.changed_inputs(now, plan.settings.seed)
    for number in range(plan.shards):
        record = plan.record(number)
        if record is None:
            continue
        bad = {fate["source"] for fate in bad_of(record["fates"])}
        for item in plan.task(number).inputs:
            if item.path in changed and (name_text(item.path) not in bad or item.label != changed[item.path][0].label):
                before, after = changed[item.path]
                raise UserError(
                    f"{store} holds an unfinished build in which {name_text(item.path)} was another: "
                    f"{_difference(before, after)}. {way_out}"
                )
    return changed


def _difference(before: Input, after: Input) -> str:
    for name, then, now in (("label", before.label, after.label), ("bytes", before.size, after.size)):
        if then != now:
            return f"{name} {then:,}, now {now:,}"
    return f"modified at {before.mtime_ns / 1e9:.3f}, now {after.mtime_ns / 1e9:.3f} (seconds since 1970)"


def same_settings(asked: Settings, found: Mapping[str, Any], store: Path) -> None:
    for field in fields(Settings):
        ask, has = getattr(asked, field.name), found[field.name]
        if ask != has:
            option = "side" if field.name == "side_px" else field.name.replace("_", "-")
            raise UserError(
                f"{store} was begun with --{option} {has}, this command says {ask}. "
                "Give the same settings, pass --restart to discard an unfinished build, or choose another --store."
            )


def tool_versions() -> dict[str, str]:
    """Versions of what shapes the bytes of a record."""
    return {
        "alexnet": package_version(),
        "pillow": version("pillow"),
        "pillow_libjpeg_turbo": str(features.version_feature("libjpeg_turbo") or "none"),
        "simplejpeg": version("simplejpeg"),
        "numpy": np.__version__,
        "lmdb": ".".join(map(str, lmdb.version())),
    }

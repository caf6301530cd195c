"""Merges stores into a new store without loss: the images of the records are copied byte for byte.

Classes with the same name become one class. The classes of the first store keep their labels. The new classes of the
other stores follow in the order of these stores. A record whose label stays the same is copied whole. In other records,
only the label and the checksum change. The records of the new store have the same order as in a store that is built
from all inputs together. If the stores have the same classes and no input was left out, the two stores also have the
same fingerprint.

The same call resumes a merge that was interrupted. store/SPLIT/.build/merge.json holds the digest of the source
records. As in a build (prep/build/split.py), one summary for each finished shard lies beside merge.json.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from prep.build.assemble import write_color_stats
from prep.build.plan import BuildPlan
from prep.build.preflight import free_bytes
from prep.build.resume import (
    discard_build,
    open_existing,
    refuse_foreign_folder,
    remove_temporary_files,
    remove_work_dir,
)
from prep.build.split import disk_errors
from prep.console import DiskFull, Progress, UserError, WrongArgument, bytes_text, count_noun, say
from prep.files import hold_lock, save_array, sync_folder, unique_suffix, write_atomic
from prep.images.color_stats import Moments
from prep.inputs.formats.shards import unpack_location
from prep.inputs.listing import Listing
from prep.inputs.names import name_text
from prep.inputs.reader import Source
from prep.merge.extra import merged_columns, refuse_other_fields
from prep.merge.records import ADVICE, CopyTask, SourceShard, copy_shard, list_shard
from prep.merge.totals import joined_tools, origin, sum_counts
from prep.schema import ArrayShape, file_sha256, read_npy
from prep.store.extra import save_columns
from prep.store.input_log import read_outcomes, write_outcomes
from prep.store.manifest import SPLITS, Settings, Shard, Split, Store, digest_json, split_files, split_fingerprint
from prep.store.models import Account
from prep.store.work_files import RESTART, MergeFile, read_work_file
from prep.workers import Counts, Runner, WorkerDied


@dataclass(frozen=True)
class MergeReader:
    """The reader in the BuildPlan of a merge. Only its `root` is used, because copy_shard reads the records."""

    root: Path

    def read(self, item: object) -> bytes:
        """Not used."""
        raise NotImplementedError

    def head(self, item: object, size: int) -> bytes:
        """Not used."""
        raise NotImplementedError


def merge_stores(
    sources: Sequence[Path], target: Path, runner: Runner, progress: Progress, restart: bool = False
) -> Store:
    """Merge two or more stores into the new store `target`, and return the new store.

    `progress` counts records. If `restart` is true, an unfinished merge in `target` is discarded. The new store has the
    seed of the first store. Raises UserError if fewer than two stores are given, if one of the stores is `target`, or
    if two stores have the same records. Also raises UserError if the settings of the stores differ in more than the
    seed, if their extra fields differ, if `target` holds anything but this merge, or if a record is damaged. Raises
    DiskFull if the disk is full.
    """
    stores = _open_stores(sources, target)
    settings = _common_settings(stores)
    classes = tuple(dict.fromkeys(name for store in stores for name in store.classes))
    refuse_other_fields(stores)
    with disk_errors(target):
        target.mkdir(parents=True, exist_ok=True)
        with hold_lock(target, "build"):
            for split in [name for name in SPLITS if any(name in store.splits for store in stores)]:
                merged = _merge_split(stores, split, classes, settings, target, runner, progress, restart)
    return merged


def count_records(sources: Sequence[Path]) -> int:
    """Return the number of records in all splits of the stores. Raises StoreError if a folder is not a store."""
    return sum(split.records for path in sources for split in Store.open(path).splits.values())


def _open_stores(sources: Sequence[Path], target: Path) -> list[Store]:
    if len(sources) < 2:
        raise WrongArgument(f"{count_noun(len(sources), 'store')} to merge; expected two or more. Name another store.")
    resolved = [path.resolve() for path in sources]
    if target.resolve() in resolved or len(set(resolved)) < len(resolved):
        double = next(path for path, real in zip(sources, resolved, strict=True) if [*resolved, target].count(real) > 1)
        raise WrongArgument(f"{double} is named twice. Name every store once, and a new folder with --store.")
    stores = [Store.open(path) for path in sources]
    owner: dict[tuple[str, str], Path] = {}  # (split, fingerprint) -> the store that has this split
    for store in stores:
        for name, split in store.splits.items():
            other = owner.setdefault((name, split.fingerprint), store.root)
            if other != store.root:
                raise UserError(
                    f"{other} and {store.root}: the split {name} has the same fingerprint in both "
                    f"({split.fingerprint[:16]}), so its photographs would be merged twice. Leave one store out."
                )
    return stores


def _common_settings(stores: Sequence[Store]) -> Settings:
    """Return the settings of the new store. Raises UserError if the records of the stores do not have the same form.

    The new store has the seed of the first store. A background matters only in stores that have transparent inputs.
    """
    common = stores[0].settings
    backgrounds = {store.settings.background for store in stores if _has_converted(store, "alpha", "palette")}
    if len(backgrounds) == 1:
        common = replace(common, background=backgrounds.pop())
    ignored = {"seed"}
    ignored |= {"quality"} if common.format == "ppm" else set()
    ignored |= {"reduce_above"} if not any(_has_converted(store, "reduced") for store in stores) else set()
    for store in stores:
        free = ignored if _has_converted(store, "alpha", "palette") else {*ignored, "background"}
        for name, value in asdict(store.settings).items():
            if value != getattr(common, name) and name not in free:
                raise UserError(
                    f"{store.root}: {name} {value}, but {getattr(common, name)} in another of the stores. Stores can "
                    "be merged only if their records have the same form: build one of the stores again with the "
                    "settings of the other store."
                )
        if store.settings.seed != common.seed:
            say(f"{store.root}: seed {store.settings.seed}; the new store has the first store's seed, {common.seed}.")
    return common


def _has_converted(store: Store, *kinds: str) -> bool:
    """Return whether the store has inputs that were converted in one of these ways."""
    return any(split.account["converted"].get(kind) for split in store.splits.values() for kind in kinds)


def _merge_split(
    stores: Sequence[Store],
    split: str,
    classes: tuple[str, ...],
    settings: Settings,
    target: Path,
    runner: Runner,
    progress: Progress,
    restart: bool,
) -> Store:
    parts = [store for store in stores if split in store.splits]
    label_of = {name: label for label, name in enumerate(classes)}
    labels = [tuple(label_of[name] for name in store.classes) for store in parts]
    shards = tuple(
        SourceShard(Path(path), shard.records, store_labels)
        for store, store_labels in zip(parts, labels, strict=True)
        for path, shard in zip(store.shard_paths(split), store.split(split).shards, strict=True)
    )
    listing = _list_records(shards, runner)
    plan = BuildPlan(Source(MergeReader(parts[0].root), split, classes, listing), target / split, settings, False)
    fingerprints = [store.split(split).fingerprint for store in parts]
    plan.build_id = plan.digest = digest_json({"plan": plan.digest, "sources": fingerprints})
    existing = open_existing(target, plan)
    if existing is not None and existing.classes != classes:
        raise UserError(
            f"{target} has other classes ({len(existing.classes)}) than the stores to merge ({len(classes)}). "
            "Choose another --store."
        )
    if existing is not None and split in existing.splits:
        progress.skip(len(listing))
        remove_temporary_files(target)
        remove_work_dir(plan)
        return existing
    _begin_or_resume(plan, target, restart)
    _report_equal_names(plan)
    _copy_shards(plan, shards, runner, progress)
    merged = _assemble(plan, parts, stores, existing, target)
    remove_work_dir(plan)
    return merged


def _begin_or_resume(plan: BuildPlan, target: Path, restart: bool) -> None:
    path = plan.work_dir / "merge.json"
    if path.exists() and restart:
        discard_build(plan, target)
    remove_temporary_files(target)
    if path.exists():
        if read_work_file(MergeFile, path).digest != plan.digest:
            raise UserError(
                f"{target} holds an unfinished merge of other records. Name the same stores in the same order, pass "
                "--restart to discard the unfinished merge, or choose another --store."
            )
        return
    if plan.work_dir.exists() and any(plan.work_dir.iterdir()):
        raise UserError(f"{target} holds an unfinished build. Finish the build, or choose another --store.")
    refuse_foreign_folder(plan)
    prepared = plan.folder / f".build.{unique_suffix()}"  # one rename makes the folder and its file visible
    prepared.mkdir(parents=True)
    write_atomic(prepared / path.name, json.dumps({"digest": plan.digest}).encode())
    prepared.rename(plan.work_dir)
    sync_folder(plan.folder)


def _report_equal_names(plan: BuildPlan) -> None:
    """Print how many records have the name of another record, because two stores may have the same photograph."""
    listing, order = plan.source.inputs, plan.permutation.tolist()
    pairs = [(a, b) for a, b in pairwise(order) if listing.path(a) == listing.path(b)]
    if pairs:
        equal = sum(listing[a].mtime_ns == listing[b].mtime_ns for a, b in pairs)
        say(
            f"{plan.source.split}: {count_noun(len(pairs), 'record')} with the name of another record, {equal:,} of "
            f"them with the same bytes (first name: {name_text(listing.path(pairs[0][0]))}). All are kept."
        )


def _list_records(shards: Sequence[SourceShard], runner: Runner) -> Listing:
    """Return the records of all shards. Of a record, `mtime_ns` is the CRC-32, and `location` the shard and index."""
    found: dict[int, Listing] = {}
    for (number, shard), result in runner.map(list_shard, list(enumerate(shards)), lambda counts: None):
        if isinstance(result, WorkerDied):
            raise UserError(f"{shard.folder}: the process that read this shard {result.describe()}. {ADVICE}")
        found[number] = result
    listing = Listing()
    for number in range(len(shards)):
        for item in found.pop(number):
            listing.add(item.path, item.label, item.size, item.mtime_ns, item.location)
    return listing


def _copy_shards(plan: BuildPlan, shards: tuple[SourceShard, ...], runner: Runner, progress: Progress) -> None:
    unfinished = [number for number in range(plan.shard_count) if not plan.is_finished(number)]
    inputs = plan.source.inputs
    progress.skip(len(inputs) - plan.count_inputs(unfinished))
    if len(unfinished) < plan.shard_count:
        finished = plan.shard_count - len(unfinished)
        say(f"{plan.source.split}: resuming; {finished:,} of {plan.shard_count:,} shards are finished.")
    indices = [index for number in unfinished for index in plan.input_indices(number)]
    need = sum(inputs[index].size + 4096 for index in indices)
    if need > free_bytes(plan.folder):
        raise DiskFull(
            f"{plan.folder}: {bytes_text(need)} needed, {bytes_text(free_bytes(plan.folder))} free. Free disk space, "
            "or choose another --store."
        )
    done_before = progress.done

    def on_progress(counts: Counts) -> None:
        progress.update(done_before + counts.done, size_bytes=counts.bytes)

    with closing(runner.map(copy_shard, (_task(plan, number, shards) for number in unfinished), on_progress)) as tasks:
        for task, result in tasks:
            if isinstance(result, WorkerDied):
                raise UserError(
                    f"{task.folder}: a worker process {result.describe()}. Run the same command again: finished shards "
                    f"are kept. If this error occurs again: {ADVICE}"
                )


def _task(plan: BuildPlan, number: int, shards: tuple[SourceShard, ...]) -> CopyTask:
    locations = (unpack_location(plan.source.inputs[index].location) for index in plan.input_indices(number))
    first = plan.boundaries[number]
    return CopyTask(number, first, tuple(locations), shards, plan.folder, plan.settings, plan.build_id)


def _assemble(
    plan: BuildPlan, parts: Sequence[Store], stores: Sequence[Store], existing: Store | None, target: Path
) -> Store:
    """Write the files of a split whose shards are all finished, then the manifest."""
    split, folder, settings = plan.source.split, plan.folder, plan.settings
    plan.refresh()
    summaries = [plan.shard_summary(number) for number in range(plan.shard_count)]
    finished = [summary for summary in summaries if summary is not None]
    if len(finished) < plan.shard_count:
        raise UserError(f"{folder}: {plan.shard_count - len(finished)} shards are missing. Run the same command again.")
    shards = tuple(Shard(**summary["shard"]) for summary in finished)
    labels: Counter[int] = Counter()
    for summary in finished:
        labels.update(dict(summary["labels"]))
    merged = [store.split(split) for store in parts]
    moments, records = sum((Moments.from_json(part.moments) for part in merged), Moments()), len(plan.source.inputs)
    save_array(folder / "mean_image.npy", (_square_sum(plan, parts) / records).astype(np.float32))
    logs = [store.check_file(split, "inputs.jsonl") for store in parts]
    totals = write_outcomes(folder / "inputs.jsonl", chain.from_iterable(read_outcomes(log) for log in logs))
    extra = save_columns(folder, merged_columns(parts, split, plan))
    files = {name: file_sha256(folder / name) for name in split_files(extra)}
    account = {
        **sum_counts([part.account for part in merged]),
        **totals,
        "plan": plan.digest,
        "files": files,
        "sources": [origin(part) for part in merged],
    }
    built = Split(
        records=records,
        bytes=sum(shard.bytes for shard in shards),
        pixels=moments.pixels,
        fingerprint=split_fingerprint(plan.source.classes, shards, extra, files),
        label_counts=tuple(labels[label] for label in range(len(plan.source.classes))),
        shards=shards,
        moments=moments.to_json(),
        account=cast(Account, account),
        extra=extra,
    )
    write_color_stats(folder, built)
    splits = {**(existing.splits if existing else {}), split: built}
    store = Store(target, settings, joined_tools(stores), plan.source.classes, splits)
    store.save()
    return store


def _square_sum(plan: BuildPlan, parts: Sequence[Store]) -> npt.NDArray[Any]:
    """Return the sum of the central squares of all records.

    For ppm stores, the workers have already summed the copied pixels. For jpeg stores, the mean images give the sum:
    exactly for up to 65,000 records, and otherwise within the rounding of float32.
    """
    split = plan.source.split
    if plan.settings.format == "ppm":
        side = plan.settings.side_px
        total: npt.NDArray[Any] = np.zeros((side, side, 3), np.int64)
        square = ArrayShape(("<i8",), total.shape)
        for number in range(plan.shard_count):
            total = total + read_npy(plan.work_dir / f"{number:05d}.npy", square, RESTART)
        return total
    means = [(store.mean_image(split).astype(np.float64), store.split(split).records) for store in parts]
    sums = [np.rint(mean * records) for mean, records in means]
    restored: npt.NDArray[Any] = np.sum(sums, axis=0)
    return restored

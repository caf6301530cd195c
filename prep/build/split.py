"""Building a split: cut the inputs into shards, have them built, put the store together.

A build that was killed loses the shards in flight and no more, and the same command again finishes it with the same
fingerprint. While it is unfinished its state is in

    store/train/.build/plan.json         what is being built, to refuse another
    store/train/.build/inputs.npz        its listing, to name an input that has changed since
    store/train/.build/00000.json .npy   one finished shard, see prep.build.shard_task

The order of the records is fixed here: by a keyed hash of their paths, so it depends on nothing but names and seed,
and a stream that reads blocks of neighbors (pipeline.sampling) meets the classes well mixed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from prep.build.plan import Plan, bad_of, changed_inputs, same_settings, tool_versions, touches
from prep.build.preflight import Estimate, estimate, free_bytes, look
from prep.build.shard_task import ShardTask, build_shard, record_path
from prep.console import DiskFull, Progress, UserError, bytes_text, count_noun, disk_error, say
from prep.files import hold_lock, save_array, write_atomic
from prep.images.color_stats import Moments, compute_color_stats
from prep.inputs.names import name_text
from prep.inputs.reader import Source
from prep.store.input_log import write_outcomes
from prep.store.manifest import SPLIT_FILES, SPLITS, Settings, Shard, Split, Store, StoreError, split_fingerprint
from prep.workers import NOT_STARTED, Counts, Runner, WorkerDied

_TEMPORARY = re.compile(
    r"\.(manifest\.json|colour\.json|mean_image\.npy|inputs\.jsonl|inputs\.npz|plan\.json|bad\.jsonl|deaths\.json|\d{5}\.(json|npy)"
    rf"|{'|'.join(SPLITS)})\.\d+\.tmp|\d{{5}}\.\d+\.tmp"
)


@dataclass(frozen=True)
class Policy:
    """What to do with inputs that are no pictures, and with what an earlier build left."""

    skip_bad: bool = False
    max_bad: int | None = None  # of those left out; None: any number
    restart: bool = False  # discard an unfinished build


@dataclass(frozen=True)
class Forecast:
    """What a build would do, as --dry-run says it."""

    inputs: int
    classes: int
    bad: tuple[tuple[str, str], ...]  # (name, why): found by a look at the first bytes, and at what is no file
    done: int  # inputs in shards that are finished
    whole: bool  # the split is there already, of the same inputs and settings
    estimate: Estimate | None  # of what is left; None where nothing is, or the sample held no picture
    free_bytes: int


def build_split(
    source: Source, store: Path, settings: Settings, runner: Runner, report: Progress, policy: Policy = Policy()
) -> Store:
    """Build one split into the folder `store` and return the store; a split that is there already is left as it is.

    Raises UserError where the store or a half-built split has other settings or inputs, where another build is at
    work, at bad inputs as `policy` says, and where a worker died; DiskFull where there is no room.
    """
    plan = Plan(source, store / source.split, settings, policy.skip_bad)
    _refuse_inside(source, store)
    try:
        store.mkdir(parents=True, exist_ok=True)
        with hold_lock(store, "build"):
            existing = _existing(store, plan)
            if existing is not None and source.split in existing.splits:
                _sweep(store)
                report.skip(len(source.inputs))
                shutil.rmtree(plan.work, ignore_errors=True)
                return existing
            if (plan.work / "plan.json").exists() and (policy.restart or not (plan.has_finished() or plan.deaths())):
                _discard(plan, store)  # without plan.json the folder is none of ours
            _start_or_go_on(plan, store)
            _sweep(store)
            todo = [number for number in range(plan.shards) if not plan.is_done(number)]
            left = plan.inputs_of(todo)
            report.skip(len(source.inputs) - left)
            if 0 < len(todo) < plan.shards:
                say(f"{source.split}: {plan.shards - len(todo):,} of {plan.shards:,} shards are finished; going on.")
            bad_before = plan.bad_so_far()
            _refuse_bad(plan, policy, runner.jobs, todo)
            _refuse_full(plan, todo, runner)
            try:
                _run(plan, todo, runner, report, policy, bad_before)
            except DiskFull as error:
                need = _need_text(plan, [number for number in todo if not plan.is_done(number)])
                raise _disk_full(error, store, need) from error
            built = _put_together(plan, store, existing, policy)
            shutil.rmtree(plan.work)
            return built
    except OSError as error:
        told = disk_error(error, f"{store}: {error}")
        if isinstance(told, DiskFull):
            raise _disk_full(told, store) from error
        raise UserError(
            f"{told}. Give the same command again once that is mended: the shards that are finished are kept."
        ) from error


def forecast(source: Source, store: Path, settings: Settings, runner: Runner, policy: Policy = Policy()) -> Forecast:
    """What build_split would do, without writing a byte. Raises UserError where it would refuse to begin."""
    _refuse_inside(source, store)
    plan = Plan(source, store / source.split, settings, policy.skip_bad)
    existing = _existing(store, plan)
    whole = existing is not None and source.split in existing.splits
    todo: Sequence[int] = ()
    if not whole:
        todo = range(plan.shards)
        begun = (plan.work / "plan.json").exists()
        if not begun:
            _refuse_foreign(plan)
        if begun and not policy.restart and plan.has_finished():
            changed = changed_inputs(plan, store)
            todo = [number for number in todo if not plan.is_done(number) or touches(plan, number, changed)]
    left = plan.inputs_of(todo)
    bad = () if whole else (*source.refused, *look(source.reader, source.inputs, runner.jobs))
    guess = estimate(plan.sample(todo), left, runner) if left else None
    return Forecast(
        len(source.inputs) + len(source.refused),
        len(source.classes),
        bad,
        len(source.inputs) - left,
        whole,
        guess,
        free_bytes(store),
    )


def _disk_full(error: Exception, store: Path, need: str = "") -> DiskFull:
    return DiskFull(
        f"{error}: the disk is full. {need}{bytes_text(free_bytes(store))} are free. "
        "Make room and give the same command again: the shards that are finished are kept."
    )


def _existing(store: Path, plan: Plan) -> Store | None:
    """The store, None before its first split is whole; raises UserError where its settings or inputs are others."""
    if not (store / "manifest.json").exists():
        return None
    existing, split = Store.open(store), plan.source.split
    same_settings(plan.settings, asdict(existing.settings), store)
    if split in existing.splits and existing.splits[split].account.get("plan") != plan.digest:
        raise UserError(
            f"{store} holds a split {split} of other inputs ({existing.splits[split].account.get('inputs', 0):,}, this "
            f"command names {len(plan.source.inputs):,}). Choose another --store, or delete this one to build it anew."
        )
    return existing


def _refuse_inside(source: Source, store: Path) -> None:
    """A store among its own photographs would write to the source, and be listed as a class the next time."""
    root, place = source.reader.root.resolve(), store.resolve()
    inside = place.is_relative_to(root) or root == place / source.split if root.is_dir() else place == root.parent
    if inside:
        raise UserError(
            f"--store {store}: that is the place of the source, {source.reader.root}. Choose a folder outside of it."
        )


def _refuse_foreign(plan: Plan) -> None:
    if plan.folder.exists() and set(os.listdir(plan.folder)) - {plan.work.name}:
        raise StoreError(f"{plan.folder} exists but no build of ours began it. Choose another --store, or remove it.")


def _start_or_go_on(plan: Plan, store: Path) -> None:
    path = plan.work / "plan.json"
    if not path.exists():
        _refuse_foreign(plan)
        shutil.rmtree(plan.work, ignore_errors=True)
        plan.work.mkdir(parents=True)
        plan.source.inputs.save(plan.work / "inputs.npz")
        begun = {
            "settings": asdict(plan.settings),
            "tools": tool_versions(),
            "classes": list(plan.source.classes),
            "edges": plan.edges,
        }
        write_atomic(path, json.dumps(begun).encode())
        return
    changed = changed_inputs(plan, store)
    for number in range(plan.shards) if changed else ():
        if touches(plan, number, changed):
            record_path(plan.folder, number).unlink(missing_ok=True)  # only ever where the input was bad
    if changed:
        say(
            f"{plan.source.split}: {count_noun(len(changed), 'input')} changed since this build began, none in use yet."
        )
        plan.source.inputs.save(plan.work / "inputs.npz")


def _refuse_bad(plan: Plan, policy: Policy, jobs: int, todo: Sequence[int]) -> None:
    """Before the long part: raise UserError for what a look at names and first bytes finds to be no picture."""
    bad = list(plan.source.refused)
    if not policy.skip_bad and todo:
        bad += look(plan.source.reader, plan.source.inputs, jobs)
    if not bad or (policy.skip_bad and (policy.max_bad is None or len(bad) <= policy.max_bad)):
        return
    lines = [json.dumps({"source": name, "fate": "bad", "why": why}, ensure_ascii=False) + "\n" for name, why in bad]
    write_atomic(plan.work / "bad.jsonl", "".join(lines).encode())
    allowed = f", --max-bad {policy.max_bad} allowed" if policy.skip_bad else ""
    raise UserError(
        f"{count_noun(len(bad), 'input')} of {len(plan.source.inputs) + len(plan.source.refused):,} "
        f"{'is' if len(bad) == 1 else 'are'} no picture{allowed}, found before any work "
        f"(first: {bad[0][0]}: {bad[0][1]}). "
        f"{plan.work / 'bad.jsonl'} lists all. Mend them, or leave them out with --on-bad skip."
    )


def _refuse_full(plan: Plan, todo: Sequence[int], runner: Runner) -> None:
    """Before the long part: raise DiskFull where the rest will clearly not fit."""
    free = free_bytes(plan.folder)
    left = plan.inputs_of(todo)
    if left * _most_bytes(plan.settings) < free:
        return  # without looking
    guess = estimate(plan.sample(todo), left, runner)
    if guess is None or guess.bytes <= free:
        return
    need = f"{bytes_text(guess.bytes)} needed for {left:,} pictures (judged by {guess.sampled})"
    text = f"{need}, {bytes_text(free)} free"
    if 0.8 * guess.bytes > free:
        raise DiskFull(f"{plan.folder}: {text}. Make room, or choose another --store; nothing was built.")
    say(f"{plan.folder}: {text}; beginning all the same.")


def _most_bytes(settings: Settings) -> int:
    """What a record may take at the most, for pictures up to 4:1."""
    return 3 * settings.side_px**2 * (4 if settings.keep_aspect else 1) + 8192


def _need_text(plan: Plan, todo: Sequence[int]) -> str:
    """How much more is needed, from what the finished shards took."""
    records = [record["shard"] for number in range(plan.shards) if (record := plan.record(number))]
    count = sum(record["records"] for record in records)
    if not count or not todo:
        return ""
    each = sum(record["bytes"] for record in records) / count + 4096
    return f"About {bytes_text(each * plan.inputs_of(todo))} are needed for {plan.inputs_of(todo):,} pictures, "


def _run(plan: Plan, todo: Sequence[int], runner: Runner, report: Progress, policy: Policy, bad_before: int) -> None:
    before = report.done
    refused = len(plan.source.refused)

    def on_progress(counts: Counts) -> None:
        bad = refused + bad_before + counts.bad
        report.update(before + counts.done, bad=bad, size_bytes=counts.bytes)
        if policy.skip_bad and policy.max_bad is not None and bad > policy.max_bad:
            raise UserError(
                f"{_too_many(bad, policy.max_bad)} Mend them, or allow more: the shards that are finished are kept."
            )

    with closing(runner.map(build_shard, _tasks(plan, todo), on_progress)) as results:  # none works on without the lock
        for task, result in results:
            if isinstance(result, WorkerDied) and result.index == NOT_STARTED:
                raise UserError(f"A worker process {result.describe()} before it began. Give the same command again.")
            if isinstance(result, WorkerDied):
                name = name_text(task.inputs[result.index].path)
                plan.note_death(name)
                raise UserError(
                    f"{name}: a worker process {result.describe()} at this file. If memory ran "
                    "out, give the same command again with fewer --jobs: the shards that are finished are kept. "
                    "With --on-bad skip a file at which workers died twice is left out."
                )


def _tasks(plan: Plan, todo: Iterable[int]) -> Iterator[ShardTask]:
    return (plan.task(number) for number in todo)


def _put_together(plan: Plan, store: Path, existing: Store | None, policy: Policy) -> Store:
    """All shards are there: add up their records, write what the stream reads, and last the manifest."""
    source, settings, folder = plan.source, plan.settings, plan.folder
    moments, shards, bad = Moments(), [], len(source.refused)
    labels: Counter[int] = Counter()
    square_sum = np.zeros((settings.side_px, settings.side_px, 3), np.int64)
    for number in range(plan.shards):
        record = plan.record(number)
        if record is None:
            raise UserError(f"{record_path(folder, number)} has gone. Give the same command again.")
        square_sum += np.load(record_path(folder, number).with_suffix(".npy"))
        moments += Moments.from_json(record["moments"])
        labels.update(dict(record["labels"]))
        left_out = len(bad_of(record["fates"]))
        if record["shard"]["records"] + left_out != plan.inputs_of([number]):
            raise UserError(f"{record_path(folder, number)} is of other inputs. Pass --restart to build anew.")
        bad += left_out
        if record["shard"]["records"]:  # DALI cannot open an empty LMDB; a shard is empty where all inputs were bad
            shards.append(Shard(**record["shard"]))
    if policy.max_bad is not None and bad > policy.max_bad:
        raise UserError(f"{_too_many(bad, policy.max_bad)} Allow more to finish.")
    inputs, records = len(source.inputs) + len(source.refused), sum(s.records for s in shards)
    if not records:
        first = next(_fates(plan))
        raise UserError(f"{source.reader.root}: not one of {inputs:,} inputs is a picture (first: {first['why']}).")
    save_array(folder / "mean_image.npy", (square_sum / records).astype(np.float32))
    account = write_outcomes(folder / "inputs.jsonl", _fates(plan))
    split = Split(
        records=records,
        bytes=sum(s.bytes for s in shards),
        pixels=moments.pixels,
        fingerprint=split_fingerprint(source.classes, shards),
        label_counts=tuple(labels[k] for k in range(len(source.classes))),
        shards=tuple(shards),
        moments=moments.to_json(),
        account={
            "plan": plan.digest,
            "inputs": inputs,
            "kept": records,
            **account,
            "files": {name: sha256((folder / name).read_bytes()).hexdigest() for name in SPLIT_FILES},
        },
    )
    write_colour(folder, split)
    splits = {**(existing.splits if existing else {}), source.split: split}
    built = Store(store, settings, tool_versions(), source.classes, splits)
    for number in set(range(plan.shards)) - {int(Path(each.path).name) for each in shards}:
        shutil.rmtree(folder / f"{number:05d}", ignore_errors=True)
    built.save()
    return built


def _fates(plan: Plan) -> Iterator[dict[str, Any]]:
    """Of all inputs that are not plainly kept, in the order of the records."""
    yield from ({"source": name, "fate": "bad", "why": why} for name, why in plan.source.refused)
    for number in range(plan.shards):
        yield from (plan.record(number) or {"fates": ()})["fates"]


def _too_many(bad: int, most: int) -> str:
    return f"{count_noun(bad, 'input')} {'is' if bad == 1 else 'are'} no picture, --max-bad {most} allowed."


def write_colour(folder: Path, split: Split) -> None:
    """Write colour.json, which the stream reads, from the split's exact moments."""
    stats = compute_color_stats(split.records, Moments.from_json(split.moments))
    write_atomic(folder / "colour.json", json.dumps(asdict(stats)).encode())


def _discard(plan: Plan, store: Path) -> None:
    """Remove an unfinished build; renamed first, so that one that is killed here leaves no record without its shard."""
    away = store / f".{plan.folder.name}.{os.getpid()}.tmp"
    os.rename(plan.folder, away)
    shutil.rmtree(away)


def _sweep(store: Path) -> None:
    """Remove what killed builds left under temporary names. Only the holder of the store's lock may."""
    for folder in (store, *(store / split for split in SPLITS), *(store / split / ".build" for split in SPLITS)):
        for name in os.listdir(folder) if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(name):
                left = folder / name
                if left.is_dir():
                    shutil.rmtree(left)
                else:
                    left.unlink()

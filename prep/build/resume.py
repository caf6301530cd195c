"""Starts, resumes and discards builds, and checks which changes are allowed between two runs of a build.

An unfinished build can be resumed if the settings, the tool versions, the classes and the paths of the inputs have not
changed. The content and the label of an input may change until the shard of the input is finished. In a finished shard,
only the content of a bad input may change; the shard is then built again.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from prep.build.limits import InputLimits
from prep.build.plan import BuildPlan, bad_outcomes, tool_versions
from prep.build.shard_task import summary_path
from prep.console import UserError, count_noun, say
from prep.extra.columns import refuse_other_types
from prep.files import sync_folder, unique_suffix, write_atomic
from prep.inputs.listing import Input, Listing
from prep.inputs.names import name_text
from prep.inputs.reader import Source
from prep.store.extra import FOLDER, save_columns
from prep.store.input_log import read_outcomes
from prep.store.manifest import DROPPED, SPLITS, Settings, Store, StoreError
from prep.store.work_files import RESTART, PlanFile, read_plan

_TEMPORARY = re.compile(
    r"(\.(manifest\.json|colour\.json|mean_image\.npy|inputs\.jsonl|inputs\.npz|plan\.json|bad\.jsonl|deaths\.json"
    rf"|slow\.json|parts\.json|probe|build|\d{{5}}\.(json|npy)|[A-Za-z_]\w*(\.offsets)?\.npy|{'|'.join(SPLITS)})|\d{{5}})"
    r"\.\d+(-[0-9a-f]{8})?\.tmp"
)


def start_or_resume(plan: BuildPlan, store: Path) -> None:
    """Begin a new build by writing plan.json and inputs.npz.

    If there is an unfinished build, check it and update its inputs.npz instead. Raises the same errors as
    find_changed_inputs and refuse_foreign_folder.
    """
    path = plan.work_dir / "plan.json"
    if not path.exists():
        shutil.rmtree(plan.work_dir, ignore_errors=True)
        begin_build(plan)
        return
    changed = find_changed_inputs(plan, store)
    begun = read_plan(plan.work_dir)
    if changed:
        for number in range(plan.shard_count):
            if has_changed_input(plan, number, changed):  # in a finished shard, only bad inputs can be in `changed`
                summary_path(plan.folder, number).unlink(missing_ok=True)
        say(
            f"{plan.source.split}: {count_noun(len(changed), 'input')} changed since this build began; "
            "none of them is stored yet."
        )
        plan.source.inputs.save(plan.work_dir / "inputs.npz")
    if begun.digest != plan.digest or begun.refused != plan.source.refused or begun.ignored != plan.source.ignored:
        _write_plan(path, plan, begun.id)


def begin_build(plan: BuildPlan) -> bool:
    """Create the work folder with plan.json and inputs.npz.

    Returns False if another process has just created the folder. Several processes can begin the same build at the same
    time: each prepares a folder and renames it to the work folder, and only one of these renames succeeds.
    """
    refuse_foreign_folder(plan)
    plan.folder.mkdir(parents=True, exist_ok=True)
    prepared = plan.folder / f".build.{unique_suffix()}"
    prepared.mkdir()
    try:
        plan.source.inputs.save(prepared / "inputs.npz")
        save_columns(prepared, plan.extra_columns())
        build_id = secrets.token_hex(8)
        _write_plan(prepared / "plan.json", plan, build_id)
        try:
            os.rename(prepared, plan.work_dir)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            return False
        plan.build_id = build_id
    finally:
        shutil.rmtree(prepared, ignore_errors=True)
    sync_folder(plan.folder)
    return True


def _write_plan(path: Path, plan: BuildPlan, build_id: str) -> None:
    begun = {
        "id": build_id,
        "digest": plan.digest,
        "settings": plan.settings.to_json(),
        "tools": tool_versions(),
        "classes": list(plan.source.classes),
        "edges": plan.boundaries,
        "source": os.path.abspath(plan.source.reader.root),
        "refused": plan.source.refused,
        "ignored": plan.source.ignored,
    }
    if plan.source.extra:
        begun["extra"] = {
            name: {"field": asdict(column.entry()), "digest": plan.extra_digests[name]}
            for name, column in plan.source.extra.items()
        }
    write_atomic(path, json.dumps(begun).encode())


def begun_classes(store: Path, splits: Sequence[str] = SPLITS) -> tuple[str, ...]:
    """Return the classes of an unfinished build of one of `splits`; empty if no build has finished shards."""
    for split in splits:
        work_dir = store / split / ".build"
        if any(work_dir.glob("[0-9]*.json")):
            with suppress(OSError, UserError):  # find_changed_inputs reports a broken plan.json
                return read_plan(work_dir).classes
    return ()


def find_changed_inputs(plan: BuildPlan, store: Path) -> dict[bytes, tuple[Input, Input]]:
    """Return {path: (before, after)} of the inputs that changed since an unfinished build began.

    Raises UserError if the unfinished build cannot be read, if its settings, tool versions, classes, paths or extra
    values differ from `plan`, or if an input of a finished shard changed. For a bad input of a finished shard, only a
    changed label is an error. Sets `plan.build_id`.
    """
    try:
        begun = read_plan(plan.work_dir)
        before = Listing.load(plan.work_dir / "inputs.npz", len(begun.classes), RESTART)
    except OSError as error:
        raise UserError(f"{plan.work_dir}: {error}. {RESTART}") from None
    plan.build_id = begun.id
    check_same_settings(plan.settings, asdict(begun.settings), store)
    for tool, present in tool_versions().items():
        if begun.tools.get(tool) != present:
            raise UserError(
                f"{store} holds an unfinished build by {tool} {begun.tools.get(tool)}, but {present} is installed. "
                f"Finish the build with {tool} {begun.tools.get(tool)}, or pass --restart to discard the build."
            )
    after = plan.source.inputs
    advice = "Undo this change to resume the build, pass --restart to discard the build, or choose another --store."
    if begun.classes != plan.source.classes:
        raise UserError(
            f"{store} holds an unfinished build of other classes ({len(begun.classes)} classes then, "
            f"{len(plan.source.classes)} now). {advice}"
        )
    _check_same_extra(plan, begun, store, advice)
    if after.same_as(before):
        return {}
    difference = before.first_path_difference(after, plan.settings.seed)
    if difference is not None:
        path, what = difference
        raise UserError(
            f"{store} holds an unfinished build of other inputs: {name_text(path)} {what} "
            f"({len(before):,} inputs then, {len(after):,} now). {advice}"
        )
    if begun.edges != plan.boundaries:
        raise UserError(f"{store} holds an unfinished build with other shard boundaries. {advice}")
    changed = before.changed_inputs(after, plan.settings.seed)
    for number in range(plan.shard_count):
        summary = plan.shard_summary(number)
        if summary is None:
            continue
        bad = {outcome["source"] for outcome in bad_outcomes(summary["fates"])}
        for item in plan.task(number).inputs:
            if item.path not in changed:
                continue
            old, new = changed[item.path]
            if name_text(item.path) not in bad or new.label != old.label:
                raise UserError(
                    f"{store} holds an unfinished build in which {name_text(item.path)} was different: "
                    f"{_difference(old, new)}. {advice}"
                )
    return changed


def _check_same_extra(plan: BuildPlan, begun: PlanFile, store: Path, advice: str) -> None:
    """Raise UserError if the extra fields of an unfinished build differ from those in `plan`."""
    before = {name: extra["digest"] for name, extra in begun.extra.items()}
    names, now = ((", ".join(sorted(fields)) or "none") for fields in (before, plan.extra_digests))
    if names != now:
        raise UserError(
            f"{store} holds an unfinished build with the extra fields {names}, this command has {now}. {advice}"
        )
    for name, digest in plan.extra_digests.items():
        if digest != before[name]:
            raise UserError(
                f"{store} holds an unfinished build with other values of --extra {name} (digest {before[name][:16]}, "
                f"this command has {digest[:16]}). {advice}"
            )


def has_changed_input(plan: BuildPlan, number: int, changed: Mapping[bytes, Any]) -> bool:
    """Return whether any input of shard `number` has its path in `changed`."""
    return bool(changed) and any(plan.source.inputs.path(index) in changed for index in plan.input_indices(number))


def _difference(before: Input, after: Input) -> str:
    for name, old, new in (("label", before.label, after.label), ("bytes", before.size, after.size)):
        if old != new:
            return f"{name} {old:,}, now {new:,}"
    if max(before.mtime_ns, after.mtime_ns) < 1 << 32:  # these values are not times but CRC-32s of items of build_from
        return "other content of the same size"
    return f"modified at {before.mtime_ns / 1e9:.3f}, now {after.mtime_ns / 1e9:.3f} (seconds since 1970)"


def background_of(store: Path, restart: bool) -> str | None:
    """Return Settings.background of the store.

    If there is no store, return the setting of an unfinished build, or None if there is no such build either. If
    `restart` is true, an unfinished build does not count, because it will be discarded. For a store that an older
    version of this package built, the result is DROPPED: the older versions dropped the alpha channel, and had no
    setting for the background.
    """
    if (store / "manifest.json").exists():
        return Store.open(store).settings.background
    for split in () if restart else SPLITS:
        with suppress(OSError, UserError):  # find_changed_inputs reports a damaged file
            return read_plan(store / split / ".build").settings.background
    return None


def check_same_settings(requested: Settings, begun: Mapping[str, Any], store: Path) -> None:
    """Raise UserError for the first of the `requested` settings that differs from `begun`.

    `begun` has the settings of the store or of its unfinished build.
    """
    for field in fields(Settings):
        new, old = getattr(requested, field.name), begun[field.name]
        if new != old and field.name == "background" and old == DROPPED:
            raise UserError(
                f"{store} was begun by a version of alexprep that dropped the alpha channel of images, so --background "
                f"{new} cannot be used. Leave out --background, or choose another --store."
            )
        if new != old:
            option = "side" if field.name == "side_px" else field.name.replace("_", "-")
            raise UserError(
                f"{store} was begun with --{option} {old}, this command has {new}. "
                "Use the same settings, pass --restart to discard an unfinished build, or choose another --store."
            )


def refuse_foreign_folder(plan: BuildPlan) -> None:
    """Raise StoreError if the folder of a new split contains anything other than the files of an unfinished build."""
    names = os.listdir(plan.folder) if plan.folder.exists() else []
    if any(name != plan.work_dir.name and not _TEMPORARY.fullmatch(name) for name in names):
        raise StoreError(
            f"{plan.folder} exists but was not begun by alexprep. Choose another --store, or remove the folder."
        )


def discard_build(plan: BuildPlan, store: Path) -> None:
    """Remove an unfinished build.

    The folder is renamed before it is deleted. Even if the process is killed during the deletion, the split's folder
    therefore never contains the summary of a deleted shard.
    """
    discarded = store / f".{plan.folder.name}.{unique_suffix()}"
    os.rename(plan.folder, discarded)
    shutil.rmtree(discarded)


def remove_work_dir(plan: BuildPlan) -> None:
    """Remove the work folder of a finished build.

    The folder is renamed before it is deleted. A process of a killed build may still run on another machine for a
    moment, and cannot write files into the renamed folder.
    """
    discarded = plan.folder / f".build.{unique_suffix()}"
    with suppress(FileNotFoundError):
        os.rename(plan.work_dir, discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def remove_temporary_files(store: Path) -> None:
    """Remove the temporary files and folders of killed builds. The caller must hold the store's lock."""
    for folder in (store, *(store / split / name for split in SPLITS for name in ("", ".build", FOLDER))):
        for name in os.listdir(folder) if folder.is_dir() else ():
            if _TEMPORARY.fullmatch(name):
                path = folder / name
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def open_existing(store: Path, plan: BuildPlan) -> Store | None:
    """Return the open store, or None if the store has no split yet.

    Raises UserError if settings, inputs, or types of extra fields differ from those in `plan`.
    """
    if not (store / "manifest.json").exists():
        return None
    existing, split = Store.open(store), plan.source.split
    check_same_settings(plan.settings, asdict(existing.settings), store)
    classes = plan.source.classes
    if classes != existing.classes:
        label = next(k for k, pair in enumerate(zip_longest(existing.classes, classes)) if pair[0] != pair[1])
        old, new = (names[label] if label < len(names) else "no class" for names in (existing.classes, classes))
        raise UserError(
            f"{store} has {len(existing.classes)} classes, this split has {len(classes)}: label {label} is {old} in "
            f"the store and {new} in the split. All splits of a store must have the same classes in the same order."
        )
    if split in existing.splits and existing.splits[split].account.get("plan") != plan.digest:
        raise UserError(
            f"{store} holds a split {split} of other inputs ({existing.splits[split].account.get('inputs', 0):,} "
            f"inputs then, {len(plan.source.inputs):,} now) or other labels. "
            "Choose another --store, or delete the store to rebuild it."
        )
    if split in existing.splits and plan.limits is not None:
        _check_same_limits(existing, split, plan.limits)
    refuse_other_types(existing, split, plan.source.extra)
    return existing


def _check_same_limits(store: Store, split: str, limits: InputLimits) -> None:
    """Raise UserError if `limits` would keep an input that the finished split left out, or leave out a kept input."""
    changed = ""
    with suppress(OSError, ValueError, KeyError):  # alexprep verify reports a damaged inputs.jsonl
        outcomes = read_outcomes(store.root / split / "inputs.jsonl")
        changed = limits.find_changed(outcomes, store.split(split).account.get("largest_px", 0))
    if changed:
        raise UserError(
            f"{store.root} holds a split {split} that was built with other values of --max-pixels, --on-warning or "
            f"--time-limit. The values of this command would change the treatment of {changed}. Pass the same values "
            "as before, or choose another --store."
        )


def refuse_store_in_source(source: Source, store: Path) -> None:
    """Raise UserError if the build would write into the source, because the next build would list the new files."""
    root, store_path = source.reader.root.resolve(), store.resolve()
    if root.is_dir():
        is_inside = store_path.is_relative_to(root) or root == store_path / source.split
    else:
        is_inside = store_path == root.parent
    if is_inside:
        raise UserError(
            f"--store {store}: the build would write into the source, {source.reader.root}. Choose another folder."
        )

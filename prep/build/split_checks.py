"""Checks of all splits before the first split is built. --dry-run makes the same checks.

A build can take hours. The checks therefore find a fault of the second split before the first split is built. The
checks find wrong labels and classes (prep/inputs), an unfinished build of other inputs, and files that are not images.
The checks also find too little disk space for all splits together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import numpy as np

from prep.build.plan import BuildPolicy, no_image_error, tool_versions
from prep.build.preflight import bad_inputs_error, build_sample, fits_surely, free_bytes, probe, space_error
from prep.build.split import BuildEstimate, open_plan
from prep.console import UserError, bytes_text, count_noun, say
from prep.files import LockHeld, check_output_folder, lock_is_held
from prep.inputs.classes import refuse_empty_classes
from prep.inputs.names import name_text
from prep.inputs.reader import Source
from prep.store.manifest import Settings
from prep.workers import Runner


def check_splits(
    sources: Sequence[Source], store: Path, settings: Settings, runner: Runner, policy: BuildPolicy, with_space: bool
) -> None:
    """Check all splits of a build. If `with_space` is true, also check whether all splits together fit on the disk.

    Raises UserError or DiskFull if the build of any split would be refused.
    """
    compare_splits(sources)
    plans = [open_plan(source, store, settings, policy) for source in sources]
    todo = [(plan, unfinished) for plan, _, unfinished in plans if len(unfinished)]
    for position, (plan, _) in enumerate(todo):
        source = plan.source
        check_classes(source, runner.jobs, policy)
        # The first split is not probed, because its build begins next, probes it, and lists the bad inputs in a file.
        is_strict = position > 0 and not policy.skip_bad
        bad = [*source.refused, *(probe(source.reader, source.inputs, runner.jobs) if is_strict else ())]
        if position > 0 and not policy.allows(len(bad)):
            raise bad_inputs_error(bad, len(source.inputs) + len(source.refused), policy)
    if not with_space or len(todo) < 2:
        return  # the build of a single split checks the disk space itself
    counts = [plan.count_inputs(unfinished) for plan, unfinished in todo]
    if fits_surely(sum(counts), settings, store):
        return
    runner.check_machines(None, todo[0][0].source.reader.root, tool_versions)
    needed = 0
    for (plan, unfinished), count in zip(todo, counts, strict=True):
        estimate = build_sample(plan.sample(unfinished), runner).estimate(count, runner.jobs)
        needed += estimate.bytes if estimate else 0
    _check_space(needed, sum(counts), store)


def _check_space(needed_bytes: int, count: int, store: Path) -> None:
    """Raise DiskFull if the splits surely do not fit on the disk; print a warning if they may not fit."""
    free = free_bytes(store)
    if needed_bytes > free:
        text = f"{bytes_text(needed_bytes)} needed for {count:,} images of all splits, {bytes_text(free)} free"
        if 0.8 * needed_bytes > free:
            raise space_error(store, text)
        say(f"{store}: {text}. The build starts anyway, since the estimate may be too high.")


def check_classes(source: Source, jobs: int, policy: BuildPolicy) -> None:
    """Raise UserError if no input of a class can be an image, so that the class would lose all its inputs.

    Only the size and the first bytes of an input are read. If `policy` stops the build at the first bad input, or
    allows empty classes, nothing is checked.
    """
    if policy.allow_empty_classes or not policy.skip_bad or not len(source.inputs):
        return
    labels = source.inputs.labels()
    order = np.argsort(labels, kind="stable")
    starts = np.searchsorted(labels[order], np.arange(len(source.classes) + 1))
    inputs_of = {k: order[starts[k] : starts[k + 1]].tolist() for k in range(len(source.classes))}
    # Label of a class of which all inputs checked so far are bad -> number of these inputs.
    undecided = {label: 0 for label, indices in inputs_of.items() if indices}
    reasons: list[tuple[str, str]] = []
    lost: list[int] = []
    count = 1
    while undecided:
        batches = {label: inputs_of[label][done : done + count] for label, done in undecided.items()}
        bad = probe(source.reader, source.inputs, jobs, [index for batch in batches.values() for index in batch])
        reasons += bad[: 1000 - len(reasons)]
        bad_of = _count_bad(source, dict(bad), batches)
        undecided = {label: done + len(batches[label]) for label, done in undecided.items() if bad_of[label]}
        lost += [label for label, done in undecided.items() if done == len(inputs_of[label])]
        undecided = {label: done for label, done in undecided.items() if done < len(inputs_of[label])}
        count *= 4
    refuse_empty_classes(str(source.reader.root), [source.classes[label] for label in sorted(lost)], reasons)


def _check_bad_classes(source: Source, bad: dict[str, str], policy: BuildPolicy) -> None:
    """Raise UserError if all inputs of a class are in `bad`, {name: reason}."""
    if policy.allow_empty_classes or not policy.skip_bad or not bad:
        return
    counts = source.inputs.label_counts(len(source.classes))
    for item in source.inputs:
        counts[item.label] -= name_text(item.path) in bad
    had_inputs = set(source.inputs.labels().tolist())
    lost = [name for label, name in enumerate(source.classes) if not counts[label] and label in had_inputs]
    refuse_empty_classes(str(source.reader.root), lost, bad.items())


def _count_bad(source: Source, bad: dict[str, str], batches: dict[int, list[int]]) -> dict[int, bool]:
    """Return {label: whether all inputs of the label's batch are bad}."""
    return {
        label: all(name_text(source.inputs.path(index)) in bad for index in batch) for label, batch in batches.items()
    }


def check_store_folder(store: Path) -> None:
    """Raise UserError if the folder of the store can neither be written to nor be created."""
    check_output_folder(store, "--store")
    folder = next(folder for folder in (store, *store.absolute().parents) if folder.exists())
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--store {store}: no permission to write into {folder}. Choose another folder.")


def compare_splits(sources: Sequence[Source]) -> None:
    """Print a warning if two splits have the same files with the same labels.

    Raise UserError if lines of one label file match images of both splits.
    """
    files = {source.labels_from for source in sources}
    lines = [source.label_lines for source in sources if source.label_lines is not None]
    if len(lines) > 1 and len(files) == 1:
        shared = reduce(np.intersect1d, lines)
        if len(shared):
            paths = [{source.inputs.path(k) for k in range(len(source.inputs))} for source in sources]
            name = name_text(min(set.intersection(*paths), default=b""))
            folders = f"Write the folder of the split before the names, such as {sources[0].split}/{name}, or build"
            raise UserError(
                f"--labels {files.pop()}: {count_noun(len(shared), 'line')} would label images of both splits (first: "
                f"{name + ', ' if name else ''}line {shared[0]}). {folders if name else 'Build'} each split with "
                "--split and its own label file."
            )
    digests = {source.split: source.inputs.digest() for source in sources if len(sources) > 1}
    if len(set(digests.values())) < len(digests):
        say(
            f"{' and '.join(digests)} have the same files with the same labels. Is one split a link to the other split?"
        )


def refuse_estimates(
    sources: Sequence[Source], estimates: Sequence[BuildEstimate], store: Path, jobs: int, policy: BuildPolicy
) -> None:
    """Raise the error that a build would raise, according to the estimates of --dry-run.

    Returns normally if a build would not fail.
    """
    if lock_is_held(store):
        raise LockHeld(
            f"{store}: another build is at work in this folder. Wait until the other command ends, or name "
            "another folder."
        )
    for source, estimate in zip(sources, estimates, strict=True):
        if not estimate.is_built:
            check_classes(source, jobs, policy)
            _check_bad_classes(source, dict(estimate.bad), policy)
            if not policy.allows(len(estimate.bad)):
                raise bad_inputs_error(estimate.bad, estimate.inputs, policy)
            if len(estimate.bad) == estimate.inputs:
                raise no_image_error(source, estimate.bad[0][1])
    needed = sum(estimate.resources.bytes for estimate in estimates if estimate.resources)
    _check_space(needed, sum(estimate.inputs - estimate.done for estimate in estimates), store)

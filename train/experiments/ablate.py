"""Trains the ablations: networks with one part removed or replaced, on one store, with equal seeds and steps.

Each training run has its own run folder, `NAME-seedN`, with the same files as after `alextrain run`. The folder also
has a file ablation.json with the errors on the split val, for one view (the centre crop).

A run is not trained again if its ablation.json has the requested number of steps. A run that was stopped or killed
is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from prep.console import UserError, say
from prep.files import write_atomic
from prep.schema import decode, read_regular, shown
from train.config.ablations import ABLATIONS, BASELINE, Ablation
from train.config.architecture import ARCHITECTURES, Architecture
from train.config.devices import Devices
from train.config.identity import check_identity
from train.config.overrides import apply_overrides, recipe_with_overrides
from train.config.run_config import RunConfig
from train.evaluation.evaluate import evaluate
from train.evaluation.predictions import replica_progress
from train.formats.small_files import MAX_BYTES, AblationFile
from train.model.alexnet import AlexNet
from train.replicas.devices import devices_of_replica
from train.replicas.errors import OtherReplicaFailed
from train.replicas.group import ALONE, ReplicaGroup
from train.runs.run import Run
from train.runs.run_dir import shown_errors
from train.trainer.divergence import Diverged
from train.trainer.loop import fit, validation_stream
from train.trainer.state import load_on_all_ranks

RESULT = "ablation.json"


@dataclass(frozen=True)
class AblationRun:
    """One training run of an ablation, with one seed."""

    ablation: Ablation
    config: RunConfig


@dataclass(frozen=True)
class Outcome:
    """Errors of one ablation: for each seed, an error in 0..1, or None if the training diverged."""

    ablation: Ablation
    runs: tuple[RunConfig, ...]
    top1_errors: tuple[float | None, ...]
    top5_errors: tuple[float | None, ...]


def plan_runs(
    store: Path,
    out: Path,
    recipe: str,
    settings: Sequence[str] = (),
    *,
    only: Sequence[str] = (),  # names of the ablations to train, besides the baseline; empty: all ablations
    seed: int = 0,
    stream_seed: int | None = None,
    seeds: int = 1,
    batch: int | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    gpus: str | None = None,
    service: str | None = None,
    service_fallback: str | None = None,
    threads: int | None = None,
    group: ReplicaGroup = ALONE,
    networks: Mapping[str, Architecture] = ARCHITECTURES,
) -> list[AblationRun]:
    """Return the runs to train, in the order of ABLATIONS.

    An ablation that changes neither recipe nor model is left out.

    Raises the errors of recipe_with_overrides and devices_of_replica.
    """
    base = recipe_with_overrides(recipe, settings, epochs)
    runs = []
    for ablation in ABLATIONS:
        if only and ablation is not BASELINE and ablation.name not in only:
            continue
        changed, architecture = apply_overrides(base, ablation.settings), networks[ablation.model]
        if ablation is not BASELINE and changed == base and ablation.model == BASELINE.model:
            say(f"{ablation.name}: left out, because it does not change recipe {base.name}.")
            continue
        for run_seed in range(seed, seed + seeds):
            config = RunConfig(
                store=store,
                recipe=changed,
                batch_size=batch or base.batch_size,
                seed=run_seed,
                stream_seed=stream_seed,
                model=architecture,
                run_dir=out / f"{ablation.name}-seed{run_seed}",
                devices=_devices(gpus, architecture.columns, group),
                threads=threads,
                replicas=group.size,
                epochs=epochs or base.epochs,
                steps=steps,
                service=service,
                service_fallback=service_fallback,
            )
            runs.append(AblationRun(ablation, config))
    return runs


def _devices(gpus: str | None, columns: int, group: ReplicaGroup) -> Devices:
    """Return the devices of a network. If two GPUs are given, a network of one column takes only the first."""
    if gpus is not None and columns == 1:
        gpus = gpus.split(",")[0] if not group.launched else "1" if gpus == "2" else gpus
    return devices_of_replica(gpus, columns, group)


def ablate(runs: Sequence[AblationRun], group: ReplicaGroup = ALONE) -> list[Outcome]:
    """Train and evaluate the runs for which known_errors returns None. Returns an outcome for each ablation.

    group  the replicas that train each run together

    Raises UserError if the store has no split val. Also raises the errors of train.trainer.loop.fit, except Diverged.
    """
    errors = [_errors(run.config, group) for run in runs]
    outcomes = []
    for ablation in dict.fromkeys(run.ablation for run in runs):
        indices = [index for index, run in enumerate(runs) if run.ablation == ablation]
        top1, top5 = (tuple(errors[index][k] for index in indices) for k in (0, 1))
        outcomes.append(Outcome(ablation, tuple(runs[index].config for index in indices), top1, top5))
    return outcomes


def known_errors(run: Run) -> tuple[float | None, float | None] | None:
    """Return the errors (top-1, top-5), in 0..1, that ablation.json holds; (None, None) if the training diverged.

    Returns None if ablation.json is missing, or if its number of steps is not run.last_step. Raises UserError if the
    file cannot be read or is damaged, or if the folder holds another run.
    """
    path, advice = run.run_dir / RESULT, "Remove this file, and repeat the command to measure the run again."
    try:
        content = read_regular(path, MAX_BYTES, advice)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    result = decode(AblationFile, content, str(path), advice)
    if (result.top1_error is None) != (result.top5_error is None):
        raise UserError(
            f"{path}: top1_error is {shown(result.top1_error)} and top5_error is {shown(result.top5_error)}, expected "
            f"two numbers or two nulls. {advice}"
        )
    check_identity(json.loads(content)["identity"], run.identity, run.run_dir)
    return (result.top1_error, result.top5_error) if result.steps == run.last_step else None


def _errors(config: RunConfig, group: ReplicaGroup) -> tuple[float | None, float | None]:
    run = Run.open(config)
    if "val" not in run.store.splits:
        raise UserError(
            f"{config.store} has no split val, on which ablations are compared. Build this split with --split val."
        )
    known = group.on_first(lambda: known_errors(run))
    if known is not None:
        say(f"{config.run_dir}: trained and measured before.")
        return known[0], known[1]
    say(f"{config.run_dir}: {config.model.name}, recipe {config.recipe.name}")
    errors: tuple[float | None, float | None]
    try:
        fit(run, group=group)
        errors = _measured(run, group)
    except (Diverged, OtherReplicaFailed) as error:
        if isinstance(error, OtherReplicaFailed) and error.kind != Diverged.__name__:
            raise
        say(f"{config.run_dir}: {error}")
        errors = None, None
    with group.together():
        if group.is_first:
            _write_result(run, errors)
    return errors


def _write_result(run: Run, errors: tuple[float | None, float | None]) -> None:
    result = {
        "identity": run.identity,
        "steps": run.last_step,
        "top1_error": errors[0],
        "top5_error": errors[1],
    }
    write_atomic(run.run_dir / RESULT, json.dumps(result, indent=1).encode())


def _measured(run: Run, group: ReplicaGroup) -> tuple[float, float]:
    """Return the errors of the newest checkpoint. Each replica evaluates its part of the split val."""
    config, state = run.config, load_on_all_ranks(run.run_dir, run.identity, group)
    assert state is not None  # `fit` has written a checkpoint
    network = AlexNet(len(run.store.classes), config.recipe, config.devices, config.model)
    network.load_joined_tensors(state.parameters)
    loader = validation_stream(run, group)
    assert loader is not None  # _errors has checked that the store has a split val
    with loader, replica_progress(group, "validation", loader.own_records) as counter:
        result = evaluate(network, loader, counter, group=group)
    return result.top1_error, result.top5_error


def outcome_rows(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return a row for each outcome: errors in %, and differences from the baseline in percentage points.

    A positive difference means that the ablation has the higher error. "paper_top1" is the difference in the paper.
    "top1_difference" is the measured difference: each run is compared with the baseline's run of the same seed. Each
    measured value has a "mean" and a "spread" over the seeds. The spread is the standard deviation, or None if there is
    only one seed.
    """
    base = outcomes[0]
    return [
        {
            "ablation": outcome.ablation.name,
            "source": outcome.ablation.source,
            "runs": [str(config.run_dir) for config in outcome.runs],
            "paper_top1": outcome.ablation.rise_top1,
            "paper_top5": outcome.ablation.rise_top5,
            "top1_error": _statistics(outcome.top1_errors),
            "top5_error": _statistics(outcome.top5_errors),
            "top1_difference": _statistics(_differences(outcome.top1_errors, base.top1_errors)),
            "top5_difference": _statistics(_differences(outcome.top5_errors, base.top5_errors)),
        }
        for outcome in outcomes
    ]


def _differences(errors: Sequence[float | None], base: Sequence[float | None]) -> list[float | None]:
    return [None if a is None or b is None else a - b for a, b in zip(errors, base, strict=True)]


def _statistics(shares: Sequence[float | None]) -> dict[str, float | None]:
    """Return the mean and the spread in percent. Mean and spread are None if a run diverged."""
    percents = [100 * share for share in shares if share is not None]
    if len(percents) < len(shares):
        return {"mean": None, "spread": None}
    return {"mean": mean(percents), "spread": stdev(percents) if len(percents) > 1 else None}


def table_lines(rows: Sequence[Mapping[str, Any]], classes: int = 1000) -> list[str]:
    """Return the rows of `outcome_rows` as a text table. The sources of the paper's differences follow the table.

    With five classes or fewer, the top-5 errors are always 0 and are left out.
    """
    metrics = ("top1", "top5")[: len(shown_errors(classes))]
    widths = [max(width * len(metrics), smallest) for width, smallest in ((7, 14), (13, 17), (13, 18))]

    def line(first: str, *groups: str) -> str:
        paper, errors, differences = (group.rjust(width) for group, width in zip(groups, widths, strict=True))
        return f"{first:12}{paper}  {errors}  {differences}".rstrip()

    heads = [name.removesuffix(" error") for name, _ in shown_errors(classes)]
    narrow, wide = ("".join(f"{head:>{width}}" for head in heads) for width in (7, 13))
    lines = [line("", "paper, points", "measured error, %", "difference, points"), line("", narrow, wide, wide)]
    for row in rows:
        reported = [row[f"paper_{metric}"] for metric in metrics]
        paper = "".join(f"{'' if value is None else format(value, '+.1f'):>7}" for value in reported)
        errors = "".join(f"{_text(row[f'{metric}_error'], ''):>13}" for metric in metrics)
        differences = "".join(f"{_text(row[f'{metric}_difference'], '+'):>13}" for metric in metrics)
        is_baseline = row["ablation"] == BASELINE.name
        lines.append(line(row["ablation"], paper, errors, "" if is_baseline else differences))
    lines.append("Errors with one view (the centre crop). Sources of the paper's differences:")
    return lines + [f"  {row['ablation']}: {row['source']}" for row in rows if row["ablation"] != BASELINE.name]


def _text(statistics: Mapping[str, float | None], sign: str) -> str:
    average, spread = statistics["mean"], statistics["spread"]
    if average is None:
        return "diverged"
    return f"{average:{sign}.1f}" + ("" if spread is None else f" ± {spread:.1f}")

"""`alextrain run`: train a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from prep.console import UserError, WrongArgument, count_noun, json_option, print_json, say, shell_quoted, store_option
from prep.files import no_lock_option
from prep.store.manifest import Store
from train.cli.options import (
    accumulate_option,
    batch_option,
    deterministic_option,
    epochs_option,
    fork_option,
    keep_option,
    members_option,
    model_option,
    one_at_a_time_option,
    recipe_option,
    recipe_settings,
    run_dir_option,
    seed_option,
    service_options,
    steps_option,
    stream_seed_option,
    threads_option,
    training_gpus_option,
    training_precision_option,
)
from train.cli.replicas import check_same_run, replica_group, replica_timeout_option, set_threads
from train.config.choices import MAX_COUNT
from train.experiments.ensemble_options import open_members, requested_ensemble
from train.replicas.group import ALONE, ReplicaGroup
from train.replicas.torchrun import torchrun_rank, wait_for_message
from train.runs.run_dir import DESCRIPTION, has_description, newest_checkpoint

if TYPE_CHECKING:
    from train.runs.ensemble_dir import Ensemble
    from train.runs.run import Run


@click.command()
@training_gpus_option
@store_option
@run_dir_option
@model_option
@recipe_option
@recipe_settings
@batch_option
@accumulate_option
@epochs_option
@steps_option
@seed_option
@stream_seed_option
@members_option
@one_at_a_time_option
@training_precision_option
@deterministic_option
@threads_option
@replica_timeout_option
@service_options
@click.option(
    "--log-every",
    type=click.IntRange(1, MAX_COUNT),
    default=20,
    show_default=True,
    metavar="STEPS",
    help="Number of steps between two lines of metrics.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1, MAX_COUNT),
    default=1000,
    show_default=True,
    metavar="STEPS",
    help="Number of steps between two checkpoints; each epoch also ends with a checkpoint.",
)
@keep_option
@fork_option
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be trained, and train nothing.")
@click.option("-q", "--quiet", is_flag=True, help="Print only errors, warnings and the last line.")
@no_lock_option
@json_option
def run(
    gpus: str | None,
    store: Path,
    run_dir: Path,
    model: str,
    recipe: str,
    settings: list[str],
    batch: int | None,
    accumulate: int,
    epochs: int | None,
    steps: int | None,
    seed: int,
    stream_seed: int | None,
    members: int | None,
    one_at_a_time: bool,
    precision: str | None,
    deterministic: bool,
    threads: int | None,
    replica_timeout: float,
    service: str | None,
    service_fallback: str | None,
    log_every: int,
    checkpoint_every: int,
    keep: int,
    fork: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train AlexNet on a store, or continue the run in --run-dir.

    To continue after a stop or a kill, run the same command again. `alextrain run --run-dir RUN_DIR` also continues the
    run. For a continued run and for a fork (--fork), options that you leave out have the values of the run in
    --run-dir. A run does not keep --service, so pass this option again.

    \b
    Example:
      alextrain run --gpus 0,1 --store store --run-dir run
      alextrain run --run-dir run
      alextrain run --gpus cpu --recipe short --epochs 2
      alextrain run --model half --set lr=0.02 --no-dropout
      alextrain run --run-dir run --fork cooled --set lr=0.001
      alextrain run --service imagenet --service-fallback local
      alextrain run --members 5 --run-dir five
      torchrun --nproc-per-node 4 -m train run --gpus 1 --store store --run-dir run
    """
    options = dict(locals())
    context = click.get_current_context()
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    ensemble = requested_ensemble(options, given)
    if ensemble is not None:
        _check_one_replica(ensemble, run_dir)
        options["threads"] = set_threads(ALONE, threads)
        _run_members(ensemble, options, given)
        return
    with replica_group(replica_timeout) as group:
        options["threads"] = set_threads(group, threads)
        _run(group, options, given)


def _run(group: ReplicaGroup, options: dict[str, Any], given: set[str]) -> None:
    """Train the run. This process is one of the replicas in `group`.

    `options` has the parameters of `run`. `given` has the names of the options that the user typed.
    """
    run_dir, fork, quiet, dry_run = (options[name] for name in ("run_dir", "fork", "quiet", "dry_run"))
    with group.together():
        training = _open_run(group, options, given)
    check_same_run(group, training, fork=fork is not None, dry_run=dry_run)
    if group.is_first:  # the output of the other ranks is suppressed anyway
        _say_description(training, fork or run_dir, quiet and not dry_run)
    if dry_run:
        from train.trainer.fork import preview_fork

        for line in group.on_first(lambda: preview_fork(training, fork)):
            say(line)
    else:
        from train.monitor.console_view import QuietView
        from train.monitor.view import choose_view
        from train.trainer.fork import fork as start_fork
        from train.trainer.loop import fit

        if fork:
            training = start_fork(training, fork, group)
        before = newest_checkpoint(training.run_dir)
        fit(training, choose_view(quiet) if group.is_first else QuietView(), group)
        say(_ending_text(training, before[0] if before else 0))
    if options["as_json"] and group.is_first:
        print_json(_result_json(training, fork or run_dir, dry_run))


def _open_run(group: ReplicaGroup, options: dict[str, Any], given: set[str]) -> Run:
    """Return the run that the options describe. Raises UserError for options that are wrong or do not fit together."""
    run_dir, fork = options["run_dir"], options["fork"]
    opened = None
    has_description, is_run = group.on_first(lambda: _what_is_in(run_dir))
    if fork and not is_run and fork.resolve() != run_dir.resolve():  # a --fork that equals --run-dir is refused later
        raise UserError(f"--run-dir {run_dir}: no such run to fork. Name the folder of a run.")
    if "store" in given or not has_description:  # a missing store is reported before torch is imported
        opened = Store.open(options["store"])
        opened.split("train")
    from train.runs.run import Run
    from train.runs.saved_config import requested_config, saved_config

    saved = saved_config(run_dir, group)
    config = requested_config(options, given, saved, group)
    training = Run.open(config, opened)
    training.check_batch()
    if saved is not None and not options["quiet"]:
        say(f"{run_dir}: options that are not given have the values in {run_dir / DESCRIPTION}.")
    return training


def _what_is_in(run_dir: Path) -> tuple[bool, bool]:
    """Return whether a folder has a run.json, and whether the folder has a run.json or a checkpoint."""
    is_described = has_description(run_dir)
    return is_described, is_described or newest_checkpoint(run_dir) is not None


def _check_one_replica(ensemble: Ensemble, run_dir: Path) -> None:
    """Raise WrongArgument if there are several replicas, which cannot train an ensemble together."""
    rank, size = torchrun_rank()
    if rank > 0:
        wait_for_message()
        raise SystemExit(WrongArgument.exit_code)
    if size > 1:
        raise WrongArgument(
            f"--members {ensemble.members}: the processes of torchrun cannot train an ensemble together. Start the "
            "command without torchrun, or train each member as a run of its own under torchrun: --seed "
            f"{ensemble.seed + 1} --stream-seed {ensemble.stream_seed} --run-dir {shell_quoted(run_dir / 'member-1')}, "
            "and so on."
        )


def _run_members(ensemble: Ensemble, options: dict[str, Any], given: set[str]) -> None:
    """Train the members of an ensemble.

    `options` has the parameters of `run`. `given` has the names of the options that the user typed.
    """
    run_dir, fork, dry_run, quiet = (options[name] for name in ("run_dir", "fork", "dry_run", "quiet"))
    runs = open_members(ensemble, options, given)
    runs[0].check_batch()
    _say_description(runs[0], fork or run_dir, quiet and not dry_run, ensemble)
    if dry_run:
        from train.experiments.ensemble import preview_members

        for line in preview_members(ensemble, runs, fork):
            say(line)
    else:
        from train.experiments.ensemble import fork_members, train_members
        from train.monitor.view import choose_view

        if fork:
            runs = fork_members(fork, ensemble, runs)
        before = _steps_of(runs)
        train_members(fork or run_dir, ensemble, runs, lambda: choose_view(quiet), options["one_at_a_time"])
        steps = _steps_of(runs) - before
        further = "" if steps else f" {runs[0].how_to_train_further}"
        say(
            f"{fork or run_dir}: {count_noun(steps, 'step')} trained, summed over {ensemble.members} networks."
            f"{further} Next: alextrain evaluate {shell_quoted(fork or run_dir)}"
        )
    if options["as_json"]:
        folders = [(fork or run_dir) / run.run_dir.name for run in runs]
        results = [_result_json(run, folder, dry_run) for run, folder in zip(runs, folders, strict=True)]
        shared = {key: value for key, value in results[0].items() if key not in ("run_dir", "train", "val")}
        members = [
            {"seed": run.config.seed, **{key: result[key] for key in ("run_dir", "train", "val")}}
            for run, result in zip(runs, results, strict=True)
        ]
        print_json({"run_dir": str(fork or run_dir), **shared, "members": members})


def _steps_of(runs: Sequence[Run]) -> int:
    """Return the sum of the steps at which the newest checkpoints of the runs were written."""
    return sum(newest[0] for run in runs if (newest := newest_checkpoint(run.run_dir)) is not None)


def _ending_text(training: Run, first_step: int) -> str:
    """Return the last line to print: number of steps trained after `first_step`, and next command."""
    newest = newest_checkpoint(training.run_dir)
    steps = (newest[0] if newest else 0) - first_step
    evaluate = f"alextrain evaluate {shell_quoted(training.run_dir)}"
    if steps > 0:
        return f"{training.run_dir}: {count_noun(steps, 'step')} trained. Next: {evaluate}"
    return (
        f"{training.run_dir}: 0 steps trained, because the run had ended after step {first_step:,}. "
        f"{training.how_to_train_further} Next: {evaluate}"
    )


def _say_description(training: Run, run_dir: Path, quiet: bool, ensemble: Ensemble | None = None) -> None:
    """Print what is trained. If `quiet` is true, print only advice."""
    from train.config.recipe_table import advice_lines

    for line in advice_lines(training.config.recipe, training.config.epochs):
        say(line)
    for line in _description_lines(training, run_dir, ensemble):
        if not quiet:
            say(line)


def _description_lines(training: Run, run_dir: Path, ensemble: Ensemble | None = None) -> list[str]:
    """Return lines that describe a training.

    Two lines describe the network and the settings. Three lines are optional: the learning rate (if it depends on the
    batch size), the note on the recipe, and the service.

    training  the run, or the first member of `ensemble`
    """
    from train.config.devices import describe_devices
    from train.config.recipe_table import rate_lines
    from train.config.recipes import recipe_note
    from train.model.summary import summarize

    config, store = training.config, training.store
    records, classes = store.split("train").records, len(store.classes)
    parameters = sum(row.parameters for row in summarize(classes, config.model, config.recipe))
    seeds = f"seed {config.seed}"
    if ensemble is not None:
        seeds = f"{ensemble.members} networks with seeds {ensemble.seed + 1} to {ensemble.seed + ensemble.members}"
    if config.seed_of_stream != config.seed:
        seeds += f", stream seed {config.seed_of_stream}"
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    if config.replicas > 1:
        parts = f" on {config.replicas} replicas, {config.batch_size // config.replicas} images{parts} each"
    fallback = "this machine decodes" if config.service_fallback else "the run stops with an error"
    note = recipe_note(config.recipe.name)
    service = f"service {config.service} decodes the images; if the service is lost, {fallback}"
    return [
        f"{config.model.name}, {describe_devices(config.devices, config.model.columns)}; "
        f"{count_noun(parameters, 'parameter')}, {count_noun(classes, 'class', 'classes')}",
        f"recipe {config.recipe.name}, batch {config.batch_size}{parts}, {seeds}, "
        f"{config.precision}; "
        f"{records:,} records, {count_noun(training.steps_per_epoch, 'step')} an epoch, "
        f"{count_noun(training.last_step, 'step')} in all, into {run_dir}",
        *rate_lines(config.recipe, config.batch_size),
        *([note] if note else []),
        *([service] if config.service else []),
    ]


def _result_json(training: Run, run_dir: Path, dry_run: bool) -> dict[str, Any]:
    from train.runs.run_dir import last_line, read_metrics

    config = training.config
    lines = [] if dry_run else read_metrics(run_dir)
    return {
        "run_dir": str(run_dir),
        "model": config.model.name,
        "recipe": config.recipe.name,
        "batch_size": config.batch_size,
        "lr": config.recipe.lr * config.recipe.rate_factor(config.batch_size),
        "precision": config.precision,
        "devices": list(config.devices),
        "dry_run": dry_run,
        **{kind: last_line(lines, kind) for kind in ("train", "val")},
    }

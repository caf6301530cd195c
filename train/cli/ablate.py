"""`alextrain ablate`: train the networks of the paper's ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prep.console import json_option, print_json, print_line, say, store_option
from prep.files import check_output_folder, no_lock_option
from prep.store.manifest import Store
from train.cli.options import (
    batch_option,
    epochs_option,
    recipe_option,
    seed_option,
    service_options,
    set_option,
    steps_option,
    stream_seed_option,
    threads_option,
    training_gpus_option,
)
from train.cli.replicas import check_same_run, replica_group, replica_timeout_option, set_threads
from train.config.ablations import ABLATIONS
from train.replicas.group import ReplicaGroup


@click.command()
@store_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="ablations",
    show_default=True,
    help="Folder in which the run folders are created.",
)
@click.option(
    "--only",
    type=click.Choice([ablation.name for ablation in ABLATIONS]),
    multiple=True,
    help="Ablation to train, in addition to the baseline. Repeat the option for several ablations.  [default: all]",
)
@recipe_option
@set_option
@batch_option
@epochs_option
@steps_option
@seed_option
@stream_seed_option
@click.option(
    "--seeds",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    metavar="N",
    help="Number of runs of each ablation. The first run has the seed --seed, the second --seed + 1, and so on.",
)
@training_gpus_option
@threads_option
@replica_timeout_option
@service_options
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be trained, and train nothing.")
@no_lock_option
@json_option
def ablate(replica_timeout: float, **options: Any) -> None:
    """Train networks with one part removed or replaced.

    For each ablation, the command prints the measured increase of the errors over the baseline, which has all parts,
    and the increase that the paper reports. An ablation that was trained before is not trained again. To continue after
    a stop or a kill, run the same command again. All ablations are trained with the same seeds, record order and crops.
    Ablations with the same parameter shapes also start with the same parameters.

    \b
    Example:
      alextrain ablate --store store --out ablations --recipe modern --epochs 20 --seeds 3
      alextrain ablate --recipe short --only no-lrn --only one-gpu
    """
    with replica_group(replica_timeout) as group:
        _ablate(group, **options)


def _ablate(
    group: ReplicaGroup, store: Path, out: Path, dry_run: bool, as_json: bool, threads: int | None, **options: Any
) -> None:
    """Train the networks of the ablations. This process is one of the replicas in `group`."""
    with group.together():
        if group.is_first:
            check_output_folder(out, "--out")
        opened = Store.open(store)
        opened.split("train")
    from train.experiments.ablate import ablate as train_and_measure
    from train.experiments.ablate import outcome_rows, plan_runs, table_lines
    from train.runs.run import Run

    threads = set_threads(group, threads)
    with group.together():
        runs = plan_runs(store, out, threads=threads, group=group, **options)
        opened_runs = [Run.open(planned.config, opened) for planned in runs]
        for training in opened_runs:
            training.check_batch()
    for training in opened_runs:
        check_same_run(group, training)
    if dry_run:
        for planned in runs:
            say(f"{planned.config.run_dir}: {planned.config.model.name}, recipe {planned.config.recipe.name}")
        if as_json and group.is_first:
            print_json({"dry_run": True, "runs": [str(run.config.run_dir) for run in runs]})
        return
    rows = outcome_rows(train_and_measure(runs, group))
    if not group.is_first:
        return
    if as_json:
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        print_json({"store": str(store), **settings, "ablations": rows})
        return
    for line in table_lines(rows, len(opened.classes)):
        print_line(line)

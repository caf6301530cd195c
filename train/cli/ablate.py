"""`alextrain ablate`: train the networks of the paper's ablations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prep.console import json_option, print_json, say, store_option
from prep.files import check_output_folder, no_lock_option
from prep.store.manifest import Store
from train.cli.options import (
    batch_option,
    epochs_option,
    gpus_option,
    recipe_option,
    seed_option,
    service_options,
    set_option,
    steps_option,
    stream_seed_option,
)
from train.config.ablations import ABLATIONS


@click.command()
@store_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="ablations",
    show_default=True,
    help="Folder in which the run folders are made.",
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
@gpus_option
@service_options
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be trained, and train nothing.")
@no_lock_option
@json_option
def ablate(store: Path, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train networks with one part removed or replaced; print the measured and the reported increase of the errors.

    An ablation that was trained before is not trained again. To resume after a stop or a kill, run the same command
    again. All ablations have the same seeds, so they have the same record order and crops. Ablations with the same
    parameter shapes also start with the same parameters.

    \b
    Example:
      alextrain ablate --store store --out ablations --recipe modern --epochs 20 --seeds 3
      alextrain ablate --recipe short --only no-lrn --only one-gpu
    """
    check_output_folder(out, "--out")
    opened = Store.open(store)
    opened.split("train")
    from train.experiments.ablate import ablate as train_and_measure
    from train.experiments.ablate import outcome_rows, plan_runs, table_lines
    from train.runs.run import Run

    runs = plan_runs(store, out, **options)
    for planned in runs:
        Run.open(planned.config, opened).check_batch()
    if dry_run:
        for run in runs:
            say(f"{run.config.run_dir}: {run.config.model.name}, recipe {run.config.recipe.name}")
        if as_json:
            print_json({"dry_run": True, "runs": [str(run.config.run_dir) for run in runs]})
        return
    rows = outcome_rows(train_and_measure(runs))
    if as_json:
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
        print_json({"store": str(store), **settings, "ablations": rows})
        return
    for line in table_lines(rows, len(opened.classes)):
        click.echo(line)

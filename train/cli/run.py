"""`alextrain run` and `ablate`: train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prep.console import UserError, count_noun, json_option, print_json, say, shell_quoted, store_option
from prep.store.manifest import Store
from train.cli.options import (
    accumulate_option,
    batch_option,
    epochs_option,
    fork_option,
    gpus_option,
    keep_option,
    model_option,
    precision_option,
    recipe_option,
    recipe_settings,
    seed_option,
    set_option,
    steps_option,
)
from train.config.ablations import ABLATIONS
from train.config.architecture import ARCHITECTURES

if TYPE_CHECKING:
    from train.runs.run import Run


@click.command()
@gpus_option
@store_option
@click.option("--run-dir", type=click.Path(path_type=Path), default="run", show_default=True, help="Folder of the run.")
@model_option
@recipe_option
@recipe_settings
@batch_option
@accumulate_option
@epochs_option
@steps_option
@seed_option
@precision_option
@click.option(
    "--log-every",
    type=click.IntRange(1),
    default=20,
    show_default=True,
    metavar="STEPS",
    help="Steps between two lines.",
)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    metavar="STEPS",
    help="Steps between two checkpoints, beside each epoch's.",
)
@keep_option
@fork_option
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, and end.")
@click.option("-q", "--quiet", is_flag=True, help="Errors, warnings and the last line only.")
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
    precision: str,
    log_every: int,
    checkpoint_every: int,
    keep: int,
    fork: Path | None,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Train AlexNet on a store. To go on with a run that was stopped or killed, give the same command again.

    \b
    Example:
      alextrain run --gpus 0,1 --store store --run-dir run
      alextrain run --gpus cpu --recipe short --epochs 2
      alextrain run --model half --set lr=0.02 --no-dropout
      alextrain run --run-dir run --fork cooled --set lr=0.001
    """
    opened = Store.open(store)
    opened.split("train")
    from train.config.devices import parse_devices
    from train.config.overrides import recipe_with_overrides
    from train.config.recipe import insensitive_at_init
    from train.config.run_config import RunConfig
    from train.model.precision import set_precision
    from train.runs.run import Run

    chosen, architecture = recipe_with_overrides(recipe, settings, epochs), ARCHITECTURES[model]
    devices = parse_devices(gpus, architecture.columns)
    set_precision(precision, devices)  # refuses early
    config = RunConfig(
        store=store,
        recipe=chosen,
        model=architecture,
        batch_size=batch or chosen.batch_size,
        accumulate=accumulate,
        seed=seed,
        precision=precision,
        run_dir=run_dir,
        devices=devices,
        epochs=epochs or chosen.epochs,
        steps=steps,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        keep=keep,
    )
    training = Run.open(config, opened)
    if insensitive_at_init(chosen):
        say(
            f"recipe {chosen.name}: weights of 0.01 and biases of 1 leave the network almost blind to the picture at "
            "first, and it learns late. --recipe released, the code that made the paper's table, learns sooner."
        )
    for line in _plan_lines(training, fork or run_dir):
        if not quiet or dry_run:
            say(line)
    if dry_run:
        from train.trainer.fork import preview_fork

        say(preview_fork(training, fork))
    else:
        from train.monitor.view import choose_view
        from train.trainer.fork import fork as begin_fork
        from train.trainer.loop import fit

        if fork:
            training = begin_fork(training, fork)
        fit(training, choose_view(quiet))
        say(
            f"{training.run_dir}: trained. Next: alextrain evaluate {shell_quoted(training.run_dir)} --store {shell_quoted(store)}"
        )
    if as_json:
        print_json(_run_answer(training, fork or run_dir, dry_run))


def _plan_lines(training: Run, run_dir: Path) -> list[str]:
    from train.config.devices import describe_devices
    from train.model.summary import summarize

    config, store = training.config, training.store
    records, classes = store.split("train").records, len(store.classes)
    parameters = sum(row.parameters for row in summarize(classes, config.model, config.recipe))
    if not training.steps_per_epoch:
        raise UserError(
            f"--batch {config.batch_size}: {config.store} has {records:,} training records. "
            f"Pass --batch {records} or less."
        )
    parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
    return [
        f"{config.model.name}, {describe_devices(config.devices, config.model.columns)}; "
        f"{count_noun(parameters, 'parameter')}, {count_noun(classes, 'class', 'classes')}",
        f"recipe {config.recipe.name}, batch {config.batch_size}{parts}, seed {config.seed}, {config.precision}; "
        f"{records:,} records, {count_noun(training.steps_per_epoch, 'step')} an epoch, "
        f"{count_noun(training.last_step, 'step')} in all, into {run_dir}",
    ]


def _run_answer(training: Run, run_dir: Path, dry_run: bool) -> dict[str, Any]:
    from train.runs.run_dir import last_of, read_lines

    config = training.config
    lines = [] if dry_run else read_lines(run_dir)
    return {
        "run_dir": str(run_dir),
        "model": config.model.name,
        "recipe": config.recipe.name,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "devices": list(config.devices),
        "dry_run": dry_run,
        **{kind: last_of(lines, kind) for kind in ("train", "val")},
    }


@click.command()
@store_option
@click.option(
    "--out", type=click.Path(path_type=Path), default="ablations", show_default=True, help="Folder of the runs."
)
@click.option(
    "--only",
    type=click.Choice([ablation.name for ablation in ABLATIONS]),
    multiple=True,
    help="One of them, beside the baseline; may be given again.  [default: all]",
)
@recipe_option
@set_option
@batch_option
@epochs_option
@steps_option
@seed_option
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs of each.")
@gpus_option
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be trained, and end.")
@json_option
def ablate(store: Path, out: Path, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Train the network without one part at a time, and set the errors beside the paper's.

    What is trained already is not trained again; an ablation that was stopped or killed goes on when the same command
    is given again. All of them have the same seed, so that parameters, order and windows begin the same.

    \b
    Example:
      alextrain ablate --store store --out ablations --recipe modern --epochs 20 --seeds 3
      alextrain ablate --recipe short --only no-lrn --only one-gpu
    """
    Store.open(store).split("train")
    from train.trainer.ablate import ablate as train_and_measure
    from train.trainer.ablate import outcome_rows, plan_runs, table_lines

    runs = plan_runs(store, out, **options)
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
    for line in table_lines(rows):
        click.echo(line)

"""`alextrain export` and `import`: convert networks to and from the files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prep.console import UserError, bytes_text, json_option, print_json, say, shell_quoted
from prep.files import no_lock_option, output_file
from prep.store.manifest import Store
from train.cli.options import (
    batch_option,
    checkpoint_option,
    epochs_option,
    precision_option,
    recipe_settings,
    run_argument,
    run_dir_option,
    seed_option,
    stream_seed_option,
)
from train.config.architecture import ARCHITECTURES
from train.config.choices import EXPORT_FORMATS
from train.config.recipes import RECIPES


@click.command()
@run_argument
@click.option("--to", "format", type=click.Choice(EXPORT_FORMATS), required=True, help="Format of the file.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    callback=output_file(),
    help="File to write; an existing file is replaced atomically.  [default: alexnet.safetensors, alexnet.pth or "
    "alexnet.onnx in RUN_DIR]",
)
@checkpoint_option
@json_option
def export(run_dir: Path, format: str, out: Path | None, checkpoint: str, as_json: bool) -> None:
    """Write a run's network, class names and preprocessing to one file for other programs.

    \b
    Example:
      alextrain export run --to onnx
      alextrain export run --checkpoint best --to safetensors --out alexnet.safetensors
    """
    from train.convert.export import export as write_export

    folder = run_dir.parent if run_dir.is_file() else run_dir
    out = out or folder / f"alexnet.{'pth' if format == 'torchvision' else format}"
    result = write_export(run_dir, format, out, checkpoint)
    if as_json:
        print_json(result)
        return
    say(f"{out}: step {result['step']:,}, {bytes_text(result['bytes'])}.")
    if format == "torchvision":
        normalization = result["preprocessing"]["normalise"]
        mean, std = (tuple(round(level, 6) for level in normalization[name]) for name in ("mean", "std"))
        approximate = "" if normalization["exact"] else f", approximately: the exact mean image is in {out}"
        say(f"The network expects images normalized by transforms.Normalize(mean={mean}, std={std}){approximate}.")


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from",
    "layout",
    type=click.Choice(["torchvision"]),
    default="torchvision",
    show_default=True,
    help="Format of FILE: torchvision, a state_dict of torchvision's AlexNet.",
)
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    envvar="ALEXNET_STORE",
    show_envvar=True,
    help="Folder of the store.  [default: if FILE is in the folder of a run, the training store of this run; otherwise "
    "./store]",
)
@run_dir_option
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="modern",
    show_default=True,
    help="Hyperparameters with which `alextrain run` can train the new run; a recipe that subtracts a mean image is "
    "refused.",
)
@recipe_settings
@batch_option
@epochs_option
@seed_option
@stream_seed_option
@precision_option
@click.option(
    "--new-fc8",
    is_flag=True,
    help="Initialize the last layer anew. Required if FILE and the store have different classes.",
)
@no_lock_option
@json_option
def import_(file: Path, layout: str, new_fc8: bool, as_json: bool, **options: Any) -> None:
    """Create a run at step 0 from FILE, which is a state_dict of torchvision's AlexNet.

    `alextrain evaluate` accepts the new run. To train the run further, use `alextrain run --run-dir` with the folder of
    the run. The training has the settings that you give to `alextrain import`.

    \b
    Example:
      alextrain import alexnet-owt-7be5be79.pth --store store --run-dir imported
      alextrain import alexnet-owt-7be5be79.pth --run-dir tuned --new-fc8 --set lr=0.001
    """
    if not file.exists():
        raise UserError(f"{file}: no such file. Name a state_dict of torchvision.models.alexnet.")
    options["store"] = store = options["store"] or _store_beside(file)
    Store.open(store).split("train")
    from train.config.devices import parse_devices
    from train.config.overrides import recipe_with_overrides
    from train.config.run_config import RunConfig
    from train.convert.import_torchvision import import_torchvision

    recipe = recipe_with_overrides(options["recipe"], options["settings"], options["epochs"])
    config = RunConfig(
        store=options["store"],
        recipe=recipe,
        model=ARCHITECTURES["torchvision"],
        batch_size=options["batch"] or recipe.batch_size,
        seed=options["seed"],
        stream_seed=options["stream_seed"],
        precision=options["precision"],
        run_dir=options["run_dir"],
        devices=parse_devices(None, ARCHITECTURES["torchvision"].columns),
        epochs=options["epochs"] or recipe.epochs,
    )
    import_torchvision(file, config, new_fc8)
    if as_json:
        print_json({"run_dir": str(config.run_dir), "from": layout, "file": str(file), "recipe": recipe.name})
        return
    run_dir = shell_quoted(config.run_dir)
    say(f"{config.run_dir}: imported. Next: alextrain evaluate {run_dir}, or alextrain run --run-dir {run_dir}")


def _store_beside(file: Path) -> Path:
    """Return the training store of the run whose folder contains `file`.

    Returns `store` if `file` is not in a run folder. Raises UserError if the run's training store is missing.
    """
    from train.runs.run_dir import has_description, read_description
    from train.runs.training_store import missing_store_text, saved_store_path, training_store

    if not has_description(file.parent):
        return Path("store")
    description = read_description(file.parent)
    store = training_store(file.parent, description)
    if store is None:
        raise UserError(missing_store_text(file.parent, saved_store_path(description)))
    return store.root

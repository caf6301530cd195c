"""`alextrain export` and `import`: networks as files of other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prep.console import bytes_text, json_option, print_json, say, shell_quoted, store_option
from prep.store.manifest import Store
from train.cli.options import (
    batch_option,
    checkpoint_option,
    epochs_option,
    precision_option,
    recipe_settings,
    seed_option,
)
from train.config.architecture import ARCHITECTURES
from train.config.choices import EXPORT_FORMATS
from train.config.recipes import RECIPES


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(EXPORT_FORMATS), required=True, help="Which kind of file.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The file; replaced whole.")
@checkpoint_option
@json_option
def export(run_dir: Path, to: str, out: Path, checkpoint: str, as_json: bool) -> None:
    """Write a run's network as a file for other programs, classes and preprocessing along with it.

    \b
    Example:
      alextrain export run --to onnx --out alexnet.onnx
      alextrain export run --checkpoint best --to safetensors --out alexnet.safetensors
    """
    from train.convert.export import export as write

    told = write(run_dir, to, out, checkpoint)
    if as_json:
        print_json(told)
        return
    say(f"{out}: step {told['step']:,}, {bytes_text(told['bytes'])}.")
    if to == "torchvision":
        values = told["preprocessing"]["normalise"]
        mean, std = (tuple(round(level, 6) for level in values[name]) for name in ("mean", "std"))
        exact = "" if values["exact"] else ", near it: a mean image was subtracted, which the file has"
        say(f"Its input is what transforms.Normalize(mean={mean}, std={std}) gives{exact}.")


@click.command(name="import")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--from", "layout", type=click.Choice(["torchvision"]), default="torchvision", show_default=True, help="Whose."
)
@store_option
@click.option("--run-dir", type=click.Path(path_type=Path), default="run", show_default=True, help="Folder of the run.")
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default="modern",
    show_default=True,
    help="Of a training that goes on from here; it may not subtract a mean image.",
)
@recipe_settings
@batch_option
@epochs_option
@seed_option
@precision_option
@click.option("--new-fc8", is_flag=True, help="Begin the last layer anew, for other classes than the file's.")
@json_option
def import_(file: Path, layout: str, new_fc8: bool, as_json: bool, **options: Any) -> None:
    """Make a run, at step 0, of torchvision's weights of AlexNet: a state_dict, FILE.pth.

    `alextrain evaluate` takes it. To train it further, give `alextrain run` --model torchvision and the same --recipe,
    --set, --batch, --epochs, --seed and --precision.

    \b
    Example:
      alextrain import alexnet-owt-7be5be79.pth --store store --run-dir imported
      alextrain import alexnet-owt-7be5be79.pth --run-dir tuned --new-fc8 --set lr=0.001
    """
    Store.open(options["store"]).split("train")
    from train.config.overrides import recipe_with_overrides
    from train.config.run_config import RunConfig
    from train.convert.import_torchvision import import_torchvision

    chosen = recipe_with_overrides(options["recipe"], options["settings"], options["epochs"])
    config = RunConfig(
        store=options["store"],
        recipe=chosen,
        model=ARCHITECTURES["torchvision"],
        batch_size=options["batch"] or chosen.batch_size,
        seed=options["seed"],
        precision=options["precision"],
        run_dir=options["run_dir"],
        epochs=options["epochs"] or chosen.epochs,
    )
    import_torchvision(file, config, new_fc8)
    said = {"run_dir": str(config.run_dir), "from": layout, "file": str(file), "recipe": chosen.name}
    if as_json:
        print_json(said)
        return
    evaluate = f"alextrain evaluate {shell_quoted(config.run_dir)} --store {shell_quoted(config.store)}"
    say(f"{config.run_dir}: imported. Next: {evaluate}")

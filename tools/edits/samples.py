"""Makes one small example of every file that the commands read: stores, unfinished builds, and run folders.

    photos/ more/     photographs in class folders
    photos.csv …      values of the extra fields of these photographs
    store/ other/     finished stores with the splits train and val
    parts/            an unfinished build in two parts: part 1 is built
    ready/            an unfinished build in two parts: both parts are built, and `alexprep join` can complete the store
    merge/            an unfinished merge of store/ and other/
    copy/             an unfinished copy of store/
    export/           a finished export of store/
    run/              a run with checkpoints, evaluations, class probabilities and an index of activations
    imported/         a run that was imported from weights.pth
    ensemble/         two networks that were trained together
    ablations/        the runs of `alextrain ablate`

The networks have 8 to 16 units in a layer, so that a command that loads a network needs no more than a second.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Generator, Iterable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from prep.console import CONTEXT_SETTINGS, Progress, UserError
from prep.workers import TaskProgress

CLASSES = ("ant", "bee", "cat")
TRAIN_IMAGES, VAL_IMAGES = 70, 12  # 70 images make two shards
WIDTHS = (8, 8, 8, 8, 8, 16, 16)  # units of conv1 to fc7


class _Stopped(Exception):
    """Raised by _StoppingRunner after enough tasks."""


class _StoppingRunner:
    """A runner that runs tasks in this process. It raises _Stopped after `after` tasks of the function named `work`."""

    jobs = 1

    def __init__(self, work: str, after: int) -> None:
        self.work, self.after = work, after

    def check_machines(self, folder: Path | None, source: Path, versions: Callable[[], dict[str, str]]) -> None:
        """Do nothing, because all tasks run in this process."""

    def map(self, work: Any, tasks: Iterable[Any], on_progress: Any) -> Generator[tuple[Any, Any], None, None]:
        """Yield each task with its result. Raises _Stopped after `after` tasks of the function named `work`."""
        done = 0
        for task in tasks:
            yield task, work(task, TaskProgress())
            done += work.__name__ == self.work
            if done == self.after:
                raise _Stopped


def use_small_networks() -> None:
    """Give every architecture layers of 8 to 16 units, in this process and in its forks."""
    from train.config.architecture import ARCHITECTURES, Widths

    for name, architecture in ARCHITECTURES.items():
        ARCHITECTURES[name] = replace(architecture, widths=Widths(*WIDTHS))


def call_command(program: str, *words: object) -> None:
    """Run a command in this process. Raises UserError if the exit code is not 0."""
    from importlib import import_module

    group: click.Group = import_module(f"{program}.cli").main
    try:
        group.main([str(word) for word in words], standalone_mode=False)
    except (click.ClickException, click.exceptions.Exit) as error:
        if not isinstance(error, click.exceptions.Exit) or error.exit_code:
            raise UserError(f"{program} {' '.join(map(str, words))}: {error}. The examples cannot be made.") from error


def make_photographs(folder: Path, seed: int) -> Path:
    """Write random images of 40 × 44 px into class folders of the splits train and val, and return `folder`.

    One file in the split train is broken.
    """
    rng = np.random.default_rng(seed)
    for split, count in (("train", TRAIN_IMAGES), ("val", VAL_IMAGES)):
        for number in range(count):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            path = folder / split / CLASSES[number % len(CLASSES)] / f"{seed}_{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels).resize((40, 44), Image.Resampling.BICUBIC)
            image.save(path, "PNG" if number == 3 else "JPEG")
    (folder / "train" / CLASSES[0] / "broken.jpg").write_bytes(b"\xff\xd8\xff" + bytes(40))
    return folder


def write_values(photos: Path) -> tuple[str, ...]:
    """Write a CSV file with a number and a text for each file of `photos`, and return the options --extra."""
    path = photos.with_suffix(".csv")
    names = sorted(str(file.relative_to(photos)) for file in photos.rglob("*.*"))
    path.write_text("path,weight,caption\n" + "".join(f"{name},{k}.5,text {k}\n" for k, name in enumerate(names)))
    return "--extra", f"weight={path}", "--extra", f"caption={path}"


def make_samples(folder: Path) -> None:
    """Write all examples into the empty folder `folder`. This takes about 15 s on one core."""
    use_small_networks()
    before = Path.cwd()
    os.chdir(folder)
    try:
        _make_stores()
        _make_runs()
    finally:
        os.chdir(before)


def _make_stores() -> None:
    build = ("build-lmdb", "--on-bad", "skip", "--jobs", "1", "--side", "256")
    for photos, store, seed in (("photos", "store", 1), ("more", "other", 2)):
        folder = make_photographs(Path(photos), seed)
        call_command("prep", *build, folder, *write_values(folder), "--store", store)
    extra = ("--extra", "weight=photos.csv", "--extra", "caption=photos.csv")
    small = (*build[:-1], "32", "photos/train", *extra, "--split", "train", "--store", "parts", "--part", "1/2")
    call_command("prep", *small)
    for part in ("1/2", "2/2"):  # with --no-lock, the last part does not complete the store; `alexprep join` does
        call_command("prep", *small[:-3], "ready", "--part", part, "--no-lock")
    call_command("prep", "export-files", "export", "--store", "store", "--jobs", "1")

    from prep.merge.stores import merge_stores

    with suppress(_Stopped):
        sources = [Path("store"), Path("other")]
        merge_stores(sources, Path("merge"), _StoppingRunner("copy_shard", 1), Progress(1, "records"))

    from prep.remote.copy_store import planned_copy, run_copy

    with suppress(_Stopped), ExitStack() as stack:
        plan = stack.enter_context(planned_copy("store", "copy"))
        run_copy(plan, _StoppingRunner("copy_file", 3), Progress(1, "MB"))


def _make_runs() -> None:
    import torch

    from train.config.architecture import ARCHITECTURES, TORCHVISION_LAYERS
    from train.config.recipes import RECIPES
    from train.model.alexnet import AlexNet

    torch.set_num_threads(1)
    trained = ("--gpus", "cpu", "--threads", "1", "--batch", "16", "--log-every", "1", "--quiet")
    run = ("run", *trained, "--store", "store", "--recipe", "released", "--epochs", "2", "--checkpoint-every", "3")
    call_command("train", *run, "--run-dir", "run")
    call_command("train", *run, "--run-dir", "ensemble", "--members", "2", "--steps", "2")
    ablate = ("ablate", "--gpus", "cpu", "--threads", "1", "--batch", "16", "--steps", "1", "--recipe", "released")
    call_command("train", *ablate, "--store", "store", "--out", "ablations", "--only", "no-dropout")
    options = ("--store", "store", "--gpus", "cpu")
    call_command("train", "evaluate", "run", *options, "--out", "run.npz")
    Path("picture.png").write_bytes(Path("photos/val/ant/1_0.png").read_bytes())
    call_command("train", "search", "run", "picture.png", *options)
    call_command("train", "report", "run", *options, "--index", "20")

    torch.manual_seed(0)
    network = AlexNet(len(CLASSES), RECIPES["modern"], ("cpu", "cpu"), ARCHITECTURES["torchvision"])
    tensors, state = network.joined_tensors(), {}
    for theirs, ours in TORCHVISION_LAYERS.items():
        for kind in ("weight", "bias"):
            state[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"].clone()
    torch.save(state, "weights.pth")
    imported = ("--store", "store", "--run-dir", "imported", "--batch", "16")
    call_command("train", "import", "weights.pth", *imported)
    call_command("train", "export", "imported", "--to", "torchvision", "--out", "exported.pth")


@click.command(context_settings=CONTEXT_SETTINGS)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write the examples of tools.edit_files into the new folder FOLDER.

    \b
    Example:
      python -m tools.edits.samples samples
    """
    folder.mkdir(parents=True)
    random.seed(0)
    make_samples(folder)


if __name__ == "__main__":
    main()
